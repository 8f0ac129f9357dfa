// Whether a call is an ordinary one, which Python then takes straight to the kernel.
#include <iterator>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"

namespace attnfast {
namespace {

// What Python's side of torch is asked about every call. Held for the life of the process.
struct TorchProbes {
  PyObject *tensor_type, *parameter_type, *is_neg, *dispatch_modes, *functorch_active, *autocast_enabled, *grad_enabled,
      *forward_ad;
};
TorchProbes g_probes = {};

bool ask(PyObject* function, PyObject* argument = nullptr) {
  const py::object answer = py::reinterpret_steal<py::object>(
      argument == nullptr ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument));
  const int truth = answer ? PyObject_IsTrue(answer.ptr()) : -1;
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

bool attribute(PyObject* object, PyObject* name) {
  const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value.ptr() == Py_True;
}

// Whether tensors are ordinary in themselves: plain CPU tensors of four dimensions and one floating dtype, whose memory
// holds their values. Python spends longer on these questions, one by one, than a small problem takes.
bool ordinary_tensors(PyObject* const* items, int count, dlpack::Tensor* tensors) {
  for (int i = 0; i < count; ++i) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(items[i]));
    if (type != g_probes.tensor_type && type != g_probes.parameter_type) return false;
  }
  // First: a functorch wrapper has no memory to look at, and torch's refusal costs a stack trace.
  if (ask(g_probes.dispatch_modes) || ask(g_probes.functorch_active)) return false;
  for (int i = 0; i < count; ++i) {
    if (g_exchange_api->dltensor_from_py_object_no_sync(items[i], &tensors[i]) != 0) {
      PyErr_Clear();
      return false;
    }
    DType dtype;
    if (tensors[i].device.type != dlpack::kCpu || tensors[i].ndim != 4 || !read_dtype(tensors[i].dtype, &dtype) ||
        !is_floating(dtype) || tensors[i].dtype.code != tensors[0].dtype.code ||
        tensors[i].dtype.bits != tensors[0].dtype.bits) {
      return false;
    }
  }
  for (int i = 0; i < count; ++i)
    if (ask(g_probes.is_neg, items[i])) return false;
  return true;
}

}  // namespace

py::object ordinary_call(PyObject* const* items, Py_ssize_t given) {
  ArgReader("ordinary_call", items, given, 3);  // for its checks
  static PyObject* const kCpu = PyUnicode_InternFromString("cpu");
  static PyObject* const kLevel = PyUnicode_InternFromString("_current_level");
  static PyObject* const kRequiresGrad = PyUnicode_InternFromString("requires_grad");
  const py::object no = py::int_(0);
  dlpack::Tensor tensors[3];
  if (!ordinary_tensors(items, 3, tensors) || ask(g_probes.autocast_enabled, kCpu)) return no;
  const py::object level = py::reinterpret_steal<py::object>(PyObject_GetAttr(g_probes.forward_ad, kLevel));
  if (!level) throw py::error_already_set();
  if (PyLong_AsLong(level.ptr()) >= 0) return no;
  const int64_t *query = tensors[0].shape, *key = tensors[1].shape, *value = tensors[2].shape;
  for (int i = 0; i < 2; ++i)
    if (query[i] != key[i] || query[i] != value[i]) return no;
  if (query[3] != key[3] || key[2] != value[2]) return no;
  bool gradient = false;
  for (int i = 0; i < 3 && !gradient; ++i) gradient = attribute(items[i], kRequiresGrad);
  return py::int_(gradient && ask(g_probes.grad_enabled) ? -query[3] : query[3]);
}

py::object ordinary_gradient(PyObject* const* items, Py_ssize_t given) {
  ArgReader("ordinary_gradient", items, given, 1);
  dlpack::Tensor tensor;
  return py::bool_(ordinary_tensors(items, 1, &tensor) && !ask(g_probes.grad_enabled));
}

void set_torch_probes(const py::tuple& probes) {
  PyObject** const slots[] = {&g_probes.tensor_type,    &g_probes.parameter_type,   &g_probes.is_neg,
                              &g_probes.dispatch_modes, &g_probes.functorch_active, &g_probes.autocast_enabled,
                              &g_probes.grad_enabled,   &g_probes.forward_ad};
  if (probes.size() != std::size(slots)) {
    throw py::value_error("probes: expected " + std::to_string(std::size(slots)) + " objects, got " +
                          std::to_string(probes.size()));
  }
  for (size_t i = 0; i < std::size(slots); ++i) *slots[i] = py::object(probes[i]).release().ptr();
}

}  // namespace attnfast
