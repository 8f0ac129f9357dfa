// CUDA's own names for a kernel that runs under the emulator: what nvcc declares without an include. Kernels include
// cuda/ptx.cuh, which includes this when nvcc is not the compiler.
//
// There is no __shared__: a kernel declares its shared memory with ATTNFAST_SHARED, so that it has an exact size.
#pragma once

#include <math.h>  // overloaded functions without std::, as CUDA has them

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/lane.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::attnfast::simt::thread_index())
#define blockIdx (::attnfast::simt::block_index())
#define blockDim (::attnfast::simt::block_size())
#define gridDim (::attnfast::simt::grid_size())

using dim3 = attnfast::simt::Dim3;

// Default arguments are evaluated where the call stands: the kernel's line.
#define ATTNFAST_SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define ATTNFAST_SIMT_PLACE (::attnfast::simt::Place{file, line})

inline void __syncthreads(ATTNFAST_SIMT_HERE) {
  attnfast::simt::barrier_sync(0, attnfast::simt::kAllThreads, 0, "__syncthreads", ATTNFAST_SIMT_PLACE);
}
inline int __syncthreads_count(int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::barrier_sync(0, attnfast::simt::kAllThreads, predicate != 0, "__syncthreads_count",
                                      ATTNFAST_SIMT_PLACE);
}
inline int __syncthreads_or(int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::barrier_sync(0, attnfast::simt::kAllThreads, predicate != 0, "__syncthreads_or",
                                      ATTNFAST_SIMT_PLACE) != 0;
}
inline int __syncthreads_and(int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::barrier_sync(0, attnfast::simt::kAllThreads, predicate == 0, "__syncthreads_and",
                                      ATTNFAST_SIMT_PLACE) == 0;
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, ATTNFAST_SIMT_HERE) {
  attnfast::simt::warp_sync(mask, ATTNFAST_SIMT_PLACE);
}
// Orders everything before it against everything after any later fence of any thread. That is more than a GPU promises:
// a race may hide behind a fence, nothing sound is reported.
inline void __threadfence() { attnfast::simt::fence(); }
inline void __threadfence_block() { attnfast::simt::fence(); }

namespace attnfast::simt {

template <class T>
inline T shuffle_value(uint32_t mask, T value, Shuffle kind, int operand, int width, const char* operation,
                       Place place) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, kind, operand, width, operation, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace attnfast::simt

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::shuffle_value(mask, value, attnfast::simt::Shuffle::kIndex, lane, width, "__shfl_sync",
                                       ATTNFAST_SIMT_PLACE);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::shuffle_value(mask, value, attnfast::simt::Shuffle::kUp, static_cast<int>(distance), width,
                                       "__shfl_up_sync", ATTNFAST_SIMT_PLACE);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::shuffle_value(mask, value, attnfast::simt::Shuffle::kDown, static_cast<int>(distance), width,
                                       "__shfl_down_sync", ATTNFAST_SIMT_PLACE);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::shuffle_value(mask, value, attnfast::simt::Shuffle::kXor, lanes, width, "__shfl_xor_sync",
                                       ATTNFAST_SIMT_PLACE);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::ballot(mask, predicate != 0, "__ballot_sync", ATTNFAST_SIMT_PLACE);
}
inline int __any_sync(uint32_t mask, int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::ballot(mask, predicate != 0, "__any_sync", ATTNFAST_SIMT_PLACE) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::ballot(mask, predicate != 0, "__all_sync", ATTNFAST_SIMT_PLACE) == mask;
}

// Of 32-bit integers, as the hardware has them since sm_80.
template <class T>
inline T __reduce_add_sync(uint32_t mask, T value, ATTNFAST_SIMT_HERE) {
  return static_cast<T>(attnfast::simt::reduce(mask, static_cast<uint32_t>(value), attnfast::simt::Reduce::kAdd,
                                               std::is_signed_v<T>, "__reduce_add_sync", ATTNFAST_SIMT_PLACE));
}
template <class T>
inline T __reduce_min_sync(uint32_t mask, T value, ATTNFAST_SIMT_HERE) {
  return static_cast<T>(attnfast::simt::reduce(mask, static_cast<uint32_t>(value), attnfast::simt::Reduce::kMin,
                                               std::is_signed_v<T>, "__reduce_min_sync", ATTNFAST_SIMT_PLACE));
}
template <class T>
inline T __reduce_max_sync(uint32_t mask, T value, ATTNFAST_SIMT_HERE) {
  return static_cast<T>(attnfast::simt::reduce(mask, static_cast<uint32_t>(value), attnfast::simt::Reduce::kMax,
                                               std::is_signed_v<T>, "__reduce_max_sync", ATTNFAST_SIMT_PLACE));
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::reduce(mask, value, attnfast::simt::Reduce::kAnd, false, "__reduce_and_sync",
                                ATTNFAST_SIMT_PLACE);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::reduce(mask, value, attnfast::simt::Reduce::kOr, false, "__reduce_or_sync",
                                ATTNFAST_SIMT_PLACE);
}
inline uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value, ATTNFAST_SIMT_HERE) {
  return attnfast::simt::reduce(mask, value, attnfast::simt::Reduce::kXor, false, "__reduce_xor_sync",
                                ATTNFAST_SIMT_PLACE);
}

// Atomics are relaxed, as CUDA's are: they do not race with one another, and order nothing else.
namespace attnfast::simt {

template <class T, class Next>
inline T atomic_update(T* address, Next next) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  auto* word = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T value;
    std::memcpy(&value, &old, sizeof(T));
    const T updated = next(value);
    Bits bits;
    std::memcpy(&bits, &updated, sizeof(T));
    if (__atomic_compare_exchange_n(word, &old, bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return value;
  }
}

}  // namespace attnfast::simt

template <class T>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  return attnfast::simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
inline T atomicMax(T* address, std::type_identity_t<T> value) {
  return attnfast::simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* address, std::type_identity_t<T> value) {
  return attnfast::simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicExch(T* address, std::type_identity_t<T> value) {
  return attnfast::simt::atomic_update(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return attnfast::simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
