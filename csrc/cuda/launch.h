// Host side of a launch: grid, shared memory beyond the default, and errors that name kernel and shape.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/gather_params.h"
#include "core/params.h"
#include "cuda/ptx.cuh"
#if defined(__CUDACC__)
#include "cuda/error.h"
#endif

namespace attnfast::cuda {

#if defined(__CUDACC__)
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

inline std::string call_text(const char* kernel, const AttentionParams& p) {
  const auto n = [](int64_t x) { return std::to_string(x); };
  return "CUDA kernel " + std::string(kernel) + " (B=" + n(p.batch) + ", H=" + n(p.heads) + ", H_kv=" + n(p.kv_heads) +
         ", T_q=" + n(p.query_tokens) + ", T_k=" + n(p.key_tokens) + ", D=" + n(p.head_size) +
         ", D_v=" + n(p.value_size) + ")";
}

inline std::string call_text(const char* kernel, const TopkParams& p) {
  const auto n = [](int64_t x) { return std::to_string(x); };
  return "CUDA kernel " + std::string(kernel) + " (B=" + n(p.queries) + ", N=" + n(p.slots) + ", D=" + n(p.size) +
         ", k=" + n(p.count) + ")";
}
inline std::string call_text(const char* kernel, const WeightedGatherParams& p) {
  const auto n = [](int64_t x) { return std::to_string(x); };
  return "CUDA kernel " + std::string(kernel) + " (B=" + n(p.outputs) + ", K=" + n(p.picks) + ", N=" + n(p.slots) +
         ", D_v=" + n(p.value_size) + ")";
}
inline std::string call_text(const char* kernel, const ProductKeysParams& p) {
  const auto n = [](int64_t x) { return std::to_string(x); };
  return "CUDA kernel " + std::string(kernel) + " (B=" + n(p.rows) + ", candidates=" + n(p.candidates) +
         ", k=" + n(p.picks) + ", n=" + n(p.side) + ")";
}

// A launch is asynchronous: this reports that it could not be queued, or an error that an earlier one left behind.
template <class Params>
void check_launched([[maybe_unused]] const char* kernel, [[maybe_unused]] const Params& p) {
#if defined(__CUDACC__)
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(call_text(kernel, p) + ": " + error_text(status));
#endif
}

// Without leave a kernel gets 48 KiB of dynamic shared memory.
template <class Kernel, class Params>
void allow_shared([[maybe_unused]] Kernel kernel, [[maybe_unused]] size_t bytes, [[maybe_unused]] const char* name,
                  [[maybe_unused]] const Params& p) {
#if defined(__CUDACC__)
  if (bytes <= 48 * 1024) return;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // it has been reported now
  throw std::runtime_error(call_text(name, p) + ": " + std::to_string(bytes) +
                           " bytes of shared memory are not to be had: " + error_text(status));
#endif
}

inline unsigned checked_grid(const AttentionParams& p, int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) throw std::runtime_error(call_text(kernel, p) + ": more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

// `copies` blocks for each `rows` queries of each head and sample, numbered along x, the only dimension that is large
// enough. Of packed sequences the host knows no lengths: see packed_tile in device/rows.cuh.
inline unsigned grid_of(const AttentionParams& p, int64_t rows, const char* kernel, int64_t copies = 1) {
  const int64_t tiles = p.cu_seqlens_q ? p.query_tokens / rows + p.batch : (p.query_tokens + rows - 1) / rows * p.batch;
  return checked_grid(p, tiles * p.heads * copies, kernel);
}

}  // namespace attnfast::cuda
