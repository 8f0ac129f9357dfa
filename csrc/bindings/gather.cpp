// The weighted gather and the merge of product keys: reads the arguments, fills the parameters, releases the GIL and
// calls the kernel of the chosen ISA.
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/memory_call.h"
#include "cpu/isa.h"

namespace attnfast {
namespace {

struct GatherCall {
  WeightedGatherParams params;
  DType real = DType::kFloat32;
  int64_t bad_position = std::numeric_limits<int64_t>::max();

  GatherCall(const TensorView& indices, const TensorView& weights, const TensorView& values, const TensorView& scales) {
    real = set_gather(params, indices, weights, values, scales);
    params.bad_position = &bad_position;
  }
  GatherCall(const GatherCall&) = delete;

  void check_indices() const {
    if (bad_position == std::numeric_limits<int64_t>::max()) return;
    const std::string size = std::to_string(params.slots);
    reject("indices", "slots in [0, N) = [0, " + size + ") or -1 for none",
           std::to_string(params.indices[bad_position]) + " as pick " + std::to_string(bad_position % params.picks) +
               " of row " + std::to_string(bad_position / params.picks));
  }
};

// Sorts, makes room for the gradient of the values and forms the sums.
void differentiate_values(GatherCall& call, const TensorView& grad_values, PyObject* allocate) {
  WeightedGatherParams& p = call.params;
  if (!gather_fits(p)) {
    reject("indices", "so few elements that a slot and a position fit 64 bits",
           std::to_string(p.outputs * p.picks) + " of " + std::to_string(p.slots) + " slots");
  }
  const int64_t count = p.outputs * p.picks, chunks = (count + kGatherChunk - 1) / kGatherChunk;
  const std::unique_ptr<uint64_t[]> sorted(new uint64_t[static_cast<size_t>(2 * count)]);
  const std::unique_ptr<int64_t[]> chunk_starts(new int64_t[static_cast<size_t>(chunks + 1)]);
  p.sorted = sorted.get();
  p.chunk_starts = chunk_starts.get();
  int64_t different = 0;
  {
    const py::gil_scoped_release no_gil;
    different = kernels().weighted_gather_sort(p);
  }
  call.check_indices();
  py::object made;  // keeps what is allocated alive
  if (grad_values) {
    set_result(grad_values, p.values_dtype, {{"N", p.slots}, {"D_v", p.value_size}}, &p.grad_values);
  } else {
    made = py::reinterpret_steal<py::object>(PyObject_CallFunction(allocate, "L", static_cast<long long>(different)));
    if (!made) throw py::error_already_set();
    if (!PyTuple_Check(made.ptr()) || PyTuple_GET_SIZE(made.ptr()) != 2) {
      throw py::type_error("allocate: expected to return a tuple (rows, grad_values)");
    }
    const TensorView rows = read_tensor(g_exchange_api, PyTuple_GET_ITEM(made.ptr(), 0), "rows");
    const TensorView sums = read_tensor(g_exchange_api, PyTuple_GET_ITEM(made.ptr(), 1), "grad_values");
    void* numbers = nullptr;
    set_result(rows, DType::kInt64, {{"slots that occur", different}}, &numbers);
    set_result(sums, p.values_dtype, {{"slots that occur", different}, {"D_v", p.value_size}}, &p.grad_values);
    p.grad_rows = static_cast<int64_t*>(numbers);
  }
  if (p.grad_values == nullptr) p.grad_values = &different;  // no columns: there is nothing to write, but rows to name
  // Doubles, so that either type fits. Only what chunks cut is ever touched.
  const std::unique_ptr<double[]> partial_sums(new double[static_cast<size_t>(2 * chunks * p.value_size)]);
  p.partial_sums = partial_sums.get();
  const py::gil_scoped_release no_gil;
  if (different > 0 || p.grad_weights != nullptr) kernels().weighted_gather_bwd(p);
}

}  // namespace

py::object weighted_gather_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_fwd", items, given, 5);
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView out = args.tensor("out");
  GatherCall call(indices, weights, values, scales);
  set_gather_out(call.params, call.real, out);
  {
    const py::gil_scoped_release no_gil;
    kernels().weighted_gather_fwd(call.params);
  }
  call.check_indices();
  return py::none();
}

py::object weighted_gather_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_bwd", items, given, 8);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView grad_values = args.optional_tensor("grad_values");
  PyObject* const allocate = items[7];
  GatherCall call(indices, weights, values, scales);
  WeightedGatherParams& p = call.params;
  check_buffer(grad_out, call.real, {{"B", p.outputs}, {"D_v", p.value_size}});
  p.grad_out = grad_out.data;
  if (grad_weights) set_result(grad_weights, call.real, {{"B", p.outputs}, {"K", p.picks}}, &p.grad_weights);
  if (grad_values || allocate != Py_None) {
    if (values.dtype == DType::kInt8) reject("grad_values", "None for values in int8", "a tensor");
    if (grad_values && allocate != Py_None) reject("allocate", "None with grad_values", "a function");
    differentiate_values(call, grad_values, allocate);
  } else if (p.grad_weights != nullptr) {
    {
      const py::gil_scoped_release no_gil;
      kernels().weighted_gather_bwd(p);
    }
    call.check_indices();
  }
  return py::none();
}

py::object product_keys(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("product_keys", items, given, 8);
  ProductKeysParams p;
  read_product_keys(args, p);
  const py::gil_scoped_release no_gil;
  kernels().product_keys(p);
  return py::none();
}

}  // namespace attnfast
