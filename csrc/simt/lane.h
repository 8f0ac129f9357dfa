// What a CUDA thread asks of the emulator; device.h and ptx.h wrap it in the names that kernels use.
#pragma once

#include <cstring>
#include <type_traits>

#include "simt/simt.h"

namespace attnfast::simt {

// ---- Where am I ------------------------------------------------------------------------------------------------
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();
int lane_index();
unsigned char* shared_memory();

// ---- Barriers of a block ---------------------------------------------------------------------------------------
constexpr int kAllThreads = 0;
// Named barrier `id` for `threads` threads (kAllThreads: all that have not returned). Returns the sum of `value` over
// them.
int barrier_sync(int id, int threads, int value, const char* operation, Place place);
void barrier_arrive(int id, int threads, const char* operation, Place place);
// __threadfence: see device.h.
void fence();

// ---- Warp operations -------------------------------------------------------------------------------------------
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width, const char* operation,
                 Place place);
uint32_t ballot(uint32_t mask, bool predicate, const char* operation, Place place);
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce(uint32_t mask, uint32_t value, Reduce kind, bool is_signed, const char* operation, Place place);
void warp_sync(uint32_t mask, Place place);

// ---- Tensor cores ----------------------------------------------------------------------------------------------
enum class MmaType { kBFloat16, kFloat16, kTf32 };
// d += a b for a 16 x 8 tile d; inner size 16 (bfloat16, float16) or 8 (tf32). What a tensor core makes of a float32
// that is no tf32 is not defined: it is reported.
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Place place);
// `count` (1, 2 or 4) matrices of 8 x 8 elements of 16 bits; lane 8 m + r points to row r of matrix m.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, Place place);
// 16 bytes, by each lane of a warp together, so that bank conflicts can be counted.
void load_shared_x4(uint32_t* registers, const void* from, Place place);

// ---- Asynchronous copies ---------------------------------------------------------------------------------------
// `bytes` (4, 8 or 16) to shared memory, of which the first `valid` come from `source` and the rest are zero.
void async_copy(void* destination, const void* source, int bytes, int valid, Place place);
void async_commit();
void async_wait(int newest);  // waits for all groups but the `newest` ones

[[noreturn]] void fail(const std::string& what);

// ---- Conversions, exact or rounded to nearest even -------------------------------------------------------------
float from_bfloat16(uint16_t bits);
float from_float16(uint16_t bits);
uint16_t to_bfloat16(float x);
uint16_t to_float16(float x);
float to_tf32(float x);  // to nearest, ties away from zero, as cvt.rna does

}  // namespace attnfast::simt
