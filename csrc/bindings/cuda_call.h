// What every op of attnfast._cuda needs around its kernels: the device, torch's current stream of it, and the refusal
// of what there is no kernel for. Compiled with ATTNFAST_SIMT the tensors are the CPU's and there is no stream.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/arguments.h"
#if !defined(ATTNFAST_SIMT)
#include <cuda_runtime_api.h>

#include "cuda/error.h"
#endif

namespace attnfast {

#if defined(ATTNFAST_SIMT)
constexpr int32_t kDevice = dlpack::kCpu;
constexpr const char* kBackend = "simt";

inline void* current_stream(int32_t) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
constexpr int32_t kDevice = dlpack::kCuda;
constexpr const char* kBackend = "CUDA";

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cuda::error_text(status));
}

inline void* current_stream(int32_t device) {
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

[[noreturn]] inline void refuse(const std::string& what) {
  PyErr_SetString(PyExc_NotImplementedError,
                  ("attnfast has no " + std::string(kBackend) + " kernel with " + what).c_str());
  throw py::error_already_set();
}

// Queues what `launch(stream)` launches on the current stream of the tensors' device, without the GIL.
template <class Launch>
void queue(int32_t device, Launch launch) {
  void* stream = current_stream(device);
  const py::gil_scoped_release no_gil;
  const DeviceGuard guard(device);
  launch(stream);
}

}  // namespace attnfast
