// The one file with inline PTX, and everything else in a kernel that depends on the compiler: shared memory, launches,
// tensor cores, asynchronous copies, approximate functions, conversions. Where nvcc is not the compiler the same names
// come from simt/ptx.h, and the kernel runs on the CPU.
//
// All instructions are of sm_80 and run on every later architecture. Operands are described in simt/lane.h.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#define ATTNFAST_DEVICE __device__ __forceinline__

// Dynamic shared memory, aligned to 16 bytes; a kernel has no other.
#define ATTNFAST_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// kernel<<<grid, block, shared bytes, stream>>>(arguments); the kernel's name may hold commas if it is in parentheses.
#define ATTNFAST_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

namespace attnfast::ptx {

ATTNFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Tensor cores: d += a b, d 16 x 8 -------------------------------------------------------------------------
ATTNFAST_DEVICE void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTNFAST_DEVICE void mma_f16(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTNFAST_DEVICE void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTNFAST_DEVICE void ldmatrix_x4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
ATTNFAST_DEVICE void ldmatrix_x4_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
ATTNFAST_DEVICE void ldmatrix_x2(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
ATTNFAST_DEVICE void ldmatrix_x2_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from shared memory, by each lane of a warp together: the emulator counts bank conflicts.
ATTNFAST_DEVICE void load_shared_x4(uint32_t* r, const void* from) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(from))
               : "memory");
}

// ---- Asynchronous copies --------------------------------------------------------------------------------------
// 16 bytes to shared memory, past the first-level cache; zeros where not `valid`, and the source is then not read.
ATTNFAST_DEVICE void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
ATTNFAST_DEVICE void copy_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
ATTNFAST_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the `NEWEST` groups committed last are on their way; of this thread: others need a barrier to see them.
template <int NEWEST>
ATTNFAST_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// ---- Named barriers of a block --------------------------------------------------------------------------------
ATTNFAST_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ATTNFAST_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Functions ------------------------------------------------------------------------------------------------
// 2^x, 1 / x and tanh as the hardware has them: a few units in the last place, subnormal numbers are zero. tanh has
// about eleven good bits.
ATTNFAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTNFAST_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTNFAST_DEVICE float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, which the compiler may not merge with what is done to it next: a product is rounded before something is added.
ATTNFAST_DEVICE float rounded(float x) {
  asm("" : "+f"(x));
  return x;
}
ATTNFAST_DEVICE double rounded(double x) {
  asm("" : "+d"(x));
  return x;
}

// x, of which the compiler knows nothing here: what is computed from it is not computed ahead, outside of a loop, where
// it would take a register for all of the loop.
ATTNFAST_DEVICE int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Conversions: 16-bit floats are held as their bits ---------------------------------------------------------
ATTNFAST_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
ATTNFAST_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
ATTNFAST_DEVICE float widen_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
ATTNFAST_DEVICE float widen_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
ATTNFAST_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
ATTNFAST_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
// To nearest, ties away from zero: the only rounding that all architectures have. The low 13 bits are zero then.
ATTNFAST_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace attnfast::ptx

#else
#include "simt/ptx.h"
#endif
