// How many blocks of a kernel fit a multiprocessor, by NVIDIA's own rules (cuda_occupancy.h, plain C++ and part of
// every CUDA toolkit). tools/cuda_budget.py compiles it with the host's compiler and asks it on standard input:
//
//   architecture registers threads static-shared dynamic-shared      one line a kernel
//
// and reads one number a line: blocks for each multiprocessor, 0 where the kernel cannot run.
#include <cstddef>
#include <cstdio>
#include <cstring>

#include <cuda_occupancy.h>

namespace {

struct Device {
  const char* name;
  int major, minor, threads, shared_kib;  // of a multiprocessor
};
// From "Compute Capabilities" in the CUDA programming guide. A block can have all shared memory but 1 KiB, which CUDA
// keeps for itself.
constexpr Device kDevices[] = {
    {"sm_80", 8, 0, 2048, 164}, {"sm_90", 9, 0, 2048, 228}, {"sm_100", 10, 0, 2048, 228}, {"sm_120", 12, 0, 1536, 100}};

cudaOccDeviceProp properties_of(const Device& device) {
  cudaOccDeviceProp p;
  p.computeMajor = device.major;
  p.computeMinor = device.minor;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = device.threads;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 48 * 1024;
  p.sharedMemPerMultiprocessor = static_cast<size_t>(device.shared_kib) * 1024;
  p.numSms = 1;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
  p.reservedSharedMemPerBlock = 1024;
  return p;
}

}  // namespace

int main() {
  char name[32];
  int registers, threads;
  size_t fixed, dynamic;
  while (std::scanf("%31s %d %d %zu %zu", name, &registers, &threads, &fixed, &dynamic) == 5) {
    const Device* device = nullptr;
    for (const Device& each : kDevices) {
      if (std::strcmp(each.name, name) == 0) device = &each;
    }
    if (device == nullptr) {
      std::fprintf(stderr, "cuda_occupancy: unknown architecture %s\n", name);
      return 1;
    }
    const cudaOccDeviceProp properties = properties_of(*device);
    cudaOccFuncAttributes attributes;
    attributes.maxThreadsPerBlock = threads;
    attributes.numRegs = registers;
    attributes.sharedSizeBytes = fixed;
    // As after cudaFuncSetAttribute, which csrc/cuda/launch.h calls: up to all of a multiprocessor's.
    attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    attributes.maxDynamicSharedSizeBytes = properties.sharedMemPerBlockOptin - fixed;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads, dynamic) !=
        CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "cuda_occupancy: %s with %d registers and %d threads is refused\n", name, registers,
                   threads);
      return 1;
    }
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
  return 0;
}
