// The Python module attnfast._cuda: reads the arguments as attnfast._C does, and queues the kernel on torch's current
// stream of the tensors' device. Compiled with ATTNFAST_SIMT it is the tests' module _simt instead: the same kernels
// under the SIMT emulator, on CPU tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/attention_call.h"
#include "bindings/functions.h"
#include "cuda/dot_attention.h"
#if defined(ATTNFAST_SIMT)
#include "simt/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace attnfast {
namespace {

#if defined(ATTNFAST_SIMT)
constexpr int32_t kDevice = dlpack::kCpu;
constexpr const char* kBackend = "simt";

void* current_stream(int32_t) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
constexpr int32_t kDevice = dlpack::kCuda;
constexpr const char* kBackend = "CUDA";

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (g_exchange_api->current_work_stream == nullptr ||
      g_exchange_api->current_work_stream(dlpack::kCuda, device, &stream) != 0) {
    throw std::runtime_error("torch gave no current stream of cuda:" + std::to_string(device));
  }
  return stream;
}

// The tensors' device is current while a kernel is launched, and then the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};
#endif

[[noreturn]] void refuse(const std::string& what) {
  PyErr_SetString(PyExc_NotImplementedError,
                  ("attnfast has no " + std::string(kBackend) + " kernel with " + what).c_str());
  throw py::error_already_set();
}

py::object forward(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_fwd", items, given, 27, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView weights = args.optional_tensor("weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  CallOf<DotAttentionParams> call;
  call.on_device = kDevice != dlpack::kCpu;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);

  call.set_inputs(query, key, value);
  call.set_results(out, lse, weights, weights_index, weights_mode);
  // Before their values are looked at: what the kernels do not have is refused by name.
  call.params.cu_seqlens_q = static_cast<const int64_t*>(modifiers.cu_seqlens_q.data);
  if (const char* missing = cuda::dot_attention_missing(call.params)) refuse(missing);
  call.set_modifiers(modifiers);
  if (const char* missing = cuda::dot_attention_missing(call.params)) refuse(missing);
  void* stream = current_stream(args.device());
  {
    const py::gil_scoped_release no_gil;
    const DeviceGuard guard(args.device());
    cuda::dot_attention_fwd(call.params, stream);
  }
  return py::none();
}

PyMethodDef g_functions[] = {op_function<forward>("dot_attention_fwd"), {nullptr, nullptr, 0, nullptr}};

void init(const py::object& exchange_api_capsule) { g_exchange_api = exchange_api_from_capsule(exchange_api_capsule); }

}  // namespace
}  // namespace attnfast

namespace py = pybind11;

#if defined(ATTNFAST_SIMT)
PYBIND11_MODULE(_simt, m, py::mod_gil_not_used()) {
  m.doc() = "attnfast's CUDA kernels under the SIMT emulator, for tests.";
  m.def("set_seed", &attnfast::simt::set_seed, py::arg("seed"));
  m.def("launches", [] { return attnfast::simt::counters().launches; });
  m.def("mma_instructions", [] { return attnfast::simt::counters().mma; });
#else
PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "attnfast's CUDA kernels; see _cuda.pyi. Not a public interface.";
  m.def("build_info", [] {
    py::dict info;
    info["architectures"] = ATTNFAST_CUDA_ARCHITECTURES;
    info["runtime"] = CUDART_VERSION;
    return info;
  });
  m.def("device_count", [] {
    int count = 0;
    attnfast::check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
  });
#endif
  m.def("init", &attnfast::init, py::arg("exchange_api_capsule"));
  if (PyModule_AddFunctions(m.ptr(), attnfast::g_functions) != 0) throw py::error_already_set();
}
