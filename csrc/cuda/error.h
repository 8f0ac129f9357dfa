// What CUDA's runtime says went wrong. Its own text for a machine without a driver speaks of versions. CUDA's header is
// brought by nvcc or by bindings/cuda_call.h.
#pragma once

#include <string>

namespace attnfast::cuda {

inline std::string error_text(cudaError_t status) {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  int driver = 0;
  if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
    if (driver == 0) return "there is no NVIDIA driver on this machine (cudaErrorInsufficientDriver)";
    return "the NVIDIA driver is too old: it has CUDA " + version(driver) + ", this build of attnfast needs " +
           version(CUDART_VERSION) + " (cudaErrorInsufficientDriver)";
  }
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

}  // namespace attnfast::cuda
