// The names of cuda/ptx.cuh for a kernel that runs under the emulator. Each takes the kernel's line along.
#pragma once

#include <bit>

#include "simt/device.h"

#define ATTNFAST_DEVICE inline
#define ATTNFAST_SHARED(name) unsigned char* const name = ::attnfast::simt::shared_memory()
// The stream is ignored: a launch has ended when it returns.
#define ATTNFAST_LAUNCH(kernel, grid, block, shared, stream, ...)                                                 \
  (static_cast<void>(stream), ::attnfast::simt::note_launch(::attnfast::simt::address_of(kernel), block, shared), \
   ::attnfast::simt::launch(#kernel, grid, block, shared, [&] { kernel(__VA_ARGS__); }))

namespace attnfast::ptx {

inline void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, ATTNFAST_SIMT_HERE) {
  simt::mma(simt::MmaType::kBFloat16, d, a, b, ATTNFAST_SIMT_PLACE);
}
inline void mma_f16(float* d, const uint32_t* a, const uint32_t* b, ATTNFAST_SIMT_HERE) {
  simt::mma(simt::MmaType::kFloat16, d, a, b, ATTNFAST_SIMT_PLACE);
}
inline void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, ATTNFAST_SIMT_HERE) {
  simt::mma(simt::MmaType::kTf32, d, a, b, ATTNFAST_SIMT_PLACE);
}
inline void ldmatrix_x4(uint32_t* r, const void* row, ATTNFAST_SIMT_HERE) {
  simt::ldmatrix(r, 4, false, row, ATTNFAST_SIMT_PLACE);
}
inline void ldmatrix_x4_trans(uint32_t* r, const void* row, ATTNFAST_SIMT_HERE) {
  simt::ldmatrix(r, 4, true, row, ATTNFAST_SIMT_PLACE);
}
inline void ldmatrix_x2(uint32_t* r, const void* row, ATTNFAST_SIMT_HERE) {
  simt::ldmatrix(r, 2, false, row, ATTNFAST_SIMT_PLACE);
}
inline void ldmatrix_x2_trans(uint32_t* r, const void* row, ATTNFAST_SIMT_HERE) {
  simt::ldmatrix(r, 2, true, row, ATTNFAST_SIMT_PLACE);
}
inline void load_shared_x4(uint32_t* r, const void* from, ATTNFAST_SIMT_HERE) {
  simt::load_shared_x4(r, from, ATTNFAST_SIMT_PLACE);
}

inline void copy_async_16(void* to, const void* from, bool valid, ATTNFAST_SIMT_HERE) {
  simt::async_copy(to, from, 16, valid ? 16 : 0, ATTNFAST_SIMT_PLACE);
}
inline void copy_async_4(void* to, const void* from, bool valid, ATTNFAST_SIMT_HERE) {
  simt::async_copy(to, from, 4, valid ? 4 : 0, ATTNFAST_SIMT_PLACE);
}
inline void copy_async_commit() { simt::async_commit(); }
template <int NEWEST>
inline void copy_async_wait() {
  simt::async_wait(NEWEST);
}

inline void barrier_sync(int id, int threads, ATTNFAST_SIMT_HERE) {
  simt::barrier_sync(id, threads, 0, "bar.sync", ATTNFAST_SIMT_PLACE);
}
inline void barrier_arrive(int id, int threads, ATTNFAST_SIMT_HERE) {
  simt::barrier_arrive(id, threads, "bar.arrive", ATTNFAST_SIMT_PLACE);
}

// Exact to the last place here; the hardware's are not.
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float tanh_fast(float x) { return std::tanh(x); }

inline float rounded(float x) {
  asm("" : "+x"(x));
  return x;
}
inline double rounded(double x) {
  asm("" : "+x"(x));
  return x;
}

inline int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

inline uint32_t pack_bf16(float low, float high) {
  return simt::to_bfloat16(low) | static_cast<uint32_t>(simt::to_bfloat16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return simt::to_float16(low) | static_cast<uint32_t>(simt::to_float16(high)) << 16;
}
inline float widen_bf16(uint16_t bits) { return simt::from_bfloat16(bits); }
inline float widen_f16(uint16_t bits) { return simt::from_float16(bits); }
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t to_tf32(float x) { return as_bits(simt::to_tf32(x)); }

}  // namespace attnfast::ptx
