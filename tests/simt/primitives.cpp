// The emulator's own tests: every primitive against a formula written for one lane, under many schedules, and every
// report provoked once. Built and run plain, under AddressSanitizer with UBSan, and under ThreadSanitizer
// (tools/simt_tests.py).
#include <cmath>

#include "check.h"

namespace attnfast::simt {
namespace {

constexpr int kThreads = 96;  // three warps
#if defined(__SANITIZE_THREAD__)
constexpr uint32_t kSeeds = 4;  // each kind of schedule once: a fiber costs much there
#else
constexpr uint32_t kSeeds = 12;
#endif

// ---- Shuffles, votes, reductions -------------------------------------------------------------------------------

__global__ void shuffles_kernel(int* out, int operand, int width) {
  const int t = static_cast<int>(threadIdx.x), value = 1000 + t;
  out[t] = __shfl_sync(~0u, value, operand, width);
  out[kThreads + t] = __shfl_up_sync(~0u, value, static_cast<unsigned>(operand), width);
  out[2 * kThreads + t] = __shfl_down_sync(~0u, value, static_cast<unsigned>(operand), width);
  out[3 * kThreads + t] = __shfl_xor_sync(~0u, value, operand, width);
  // 64 bits, and the halves of a warp apart.
  const uint32_t half = t % 32 < 16 ? 0xFFFFu : 0xFFFF0000u;
  const double wide = __shfl_xor_sync(half, value + 0.5, operand & 15);
  out[4 * kThreads + t] = wide == std::floor(wide) + 0.5 ? static_cast<int>(wide) : -1;
}

void test_shuffles() {
  for (int width : {2, 8, 32}) {
    for (int operand : {0, 1, 3, 7, 16, 31}) {
      std::vector<int> out(5 * kThreads, -7);
      ATTNFAST_LAUNCH(shuffles_kernel, Dim3{1}, Dim3{kThreads}, 0, nullptr, out.data(), operand, width);
      for (int t = 0; t < kThreads; ++t) {
        const int lane = t % 32, group = lane - lane % width;
        const auto at = [&](int source) { return 1000 + t - lane + source; };
        const std::string where = " of " + std::to_string(operand) + " in " + std::to_string(width);
        expect(out[t] == at(group + operand % width), "shfl" + where);
        expect(out[kThreads + t] == at(lane - group >= operand ? lane - operand : lane), "shfl_up" + where);
        const bool inside = lane + operand < group + width;
        expect(out[2 * kThreads + t] == at(inside ? lane + operand : lane), "shfl_down" + where);
        const int partner = lane ^ operand;
        expect(out[3 * kThreads + t] == at(partner < group + width ? partner : lane), "shfl_xor" + where);
        expect(out[4 * kThreads + t] == at(lane ^ (operand & 15)), "shfl_xor of a double in half a warp" + where);
      }
    }
  }
}

__global__ void votes_kernel(unsigned* out, unsigned bits) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const int mine = bits >> lane & 1;
  out[t] = __ballot_sync(~0u, mine);
  out[kThreads + t] = static_cast<unsigned>(__any_sync(~0u, mine) * 2 + __all_sync(~0u, mine));
  const unsigned value = bits * 2654435761u >> (lane % 7);
  out[2 * kThreads + t] = __reduce_add_sync(~0u, value);
  out[3 * kThreads + t] = __reduce_max_sync(~0u, value);
  out[4 * kThreads + t] = static_cast<unsigned>(__reduce_min_sync(~0u, static_cast<int>(value)));
  out[5 * kThreads + t] =
      __reduce_and_sync(~0u, value) ^ __reduce_or_sync(~0u, value) * 3 ^ __reduce_xor_sync(~0u, value);
  out[6 * kThreads + t] =
      static_cast<unsigned>(__syncthreads_count(mine) * 4 + __syncthreads_or(mine) * 2 + __syncthreads_and(mine));
}

void test_votes() {
  for (unsigned bits : {0u, 1u, 0x80000001u, 0xFFFFFFFFu, 0x12345678u}) {
    std::vector<unsigned> out(7 * kThreads);
    ATTNFAST_LAUNCH(votes_kernel, Dim3{1}, Dim3{kThreads}, 0, nullptr, out.data(), bits);
    unsigned add = 0, largest = 0, all = ~0u, any = 0, odd = 0, ones = 0;
    int least = 0x7FFFFFFF;
    for (int lane = 0; lane < 32; ++lane) {
      const unsigned value = bits * 2654435761u >> (lane % 7);
      add += value;
      largest = value > largest ? value : largest;
      least = static_cast<int>(value) < least ? static_cast<int>(value) : least;
      all &= value;
      any |= value;
      odd ^= value;
      ones += bits >> lane & 1;
    }
    for (int t = 0; t < kThreads; ++t) {
      expect(out[t] == bits, "ballot");
      expect(out[kThreads + t] == (bits != 0 ? 2u : 0u) + (bits == ~0u ? 1u : 0u), "any, all");
      expect(out[2 * kThreads + t] == add && out[3 * kThreads + t] == largest, "reduce add, max");
      expect(out[4 * kThreads + t] == static_cast<unsigned>(least), "reduce min");
      expect(out[5 * kThreads + t] == (all ^ any * 3 ^ odd), "reduce and, or, xor");
      expect(out[6 * kThreads + t] == 3 * ones * 4 + (ones > 0 ? 2 : 0) + (ones == 32 ? 1 : 0), "block votes");
    }
  }
}

// ---- Barriers, indices, atomics --------------------------------------------------------------------------------

// Each round every thread reads what its neighbour wrote in the round before.
__global__ void rounds_kernel(int* out, int rounds) {
  ATTNFAST_SHARED(raw);
  int* values = reinterpret_cast<int*>(raw);
  const int n = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  values[t] = t;
  for (int i = 0; i < rounds; ++i) {
    __syncthreads();
    const int next = values[(t + 1) % n];
    __syncthreads();
    values[t] = next + 1;
  }
  out[static_cast<int>(blockIdx.x) * n + t] = values[t];
}

void test_rounds() {
  const int n = 70, rounds = 9;  // a last warp that is not full
  std::vector<int> out(3 * n);
  ATTNFAST_LAUNCH(rounds_kernel, Dim3{3}, Dim3{n}, n * sizeof(int), nullptr, out.data(), rounds);
  for (int i = 0; i < 3 * n; ++i) expect(out[i] == (i % n + rounds) % n + rounds, "rounds between barriers");
}

// Two warps produce, one consumes; the producers go on without waiting.
__global__ void named_barriers_kernel(int* out) {
  ATTNFAST_SHARED(raw);
  int* values = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 3; ++i) {
    if (t < 64) {
      if (i > 0) ptx::barrier_sync(2, 96);  // the consumer has read
      values[t] = 10 * i + t;
      ptx::barrier_arrive(1, 96);
    } else {
      ptx::barrier_sync(1, 96);
      out[32 * i + t - 64] = values[t - 64] + values[t - 32];
      if (i < 2) ptx::barrier_arrive(2, 96);
    }
  }
}

void test_named_barriers() {
  std::vector<int> out(96);
  ATTNFAST_LAUNCH(named_barriers_kernel, Dim3{1}, Dim3{96}, 64 * sizeof(int), nullptr, out.data());
  for (int i = 0; i < 3; ++i)
    for (int t = 0; t < 32; ++t) expect(out[32 * i + t] == 20 * i + 2 * t + 32, "named barriers");
}

__global__ void early_return_kernel(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (t % 2 == 1) return;
  out[t] = __syncthreads_count(1);  // of those that are left
}

__global__ void atomics_kernel(int* sums, float* total, unsigned long long* wide) {
  const int t = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  atomicAdd(&sums[t % 5], t);
  atomicMax(&sums[5], t);
  atomicMin(&sums[6], -t);
  atomicCAS(&sums[7], t, t + 1);
  atomicAdd(total, 0.5f);
  atomicAdd(wide, 1ull << 33);
}

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + block * 1000 + thread;
}

void test_block() {
  std::vector<int> out(64, -1);
  ATTNFAST_LAUNCH(early_return_kernel, Dim3{1}, Dim3{64}, 0, nullptr, out.data());
  for (int t = 0; t < 64; ++t) expect(out[t] == (t % 2 == 1 ? -1 : 32), "a barrier of those that have not returned");

  std::vector<int> sums(8, 0);
  float total = 0;
  unsigned long long wide = 0;
  ATTNFAST_LAUNCH(atomics_kernel, Dim3{3}, Dim3{50}, 0, nullptr, sums.data(), &total, &wide);
  for (int i = 0; i < 5; ++i) expect(sums[i] == 30 * i + 5 * 29 * 15, "atomicAdd");
  expect(sums[5] == 149 && sums[6] == -149 && sums[7] >= 1, "atomicMax, atomicMin, atomicCAS");
  expect(total == 75 && wide == 150ull << 33, "atomicAdd of float and of 64 bits");

  std::vector<unsigned> seen(2 * 3 * 2 * 60);
  ATTNFAST_LAUNCH(indices_kernel, (Dim3{2, 3, 2}), (Dim3{5, 4, 3}), 0, nullptr, seen.data());
  for (unsigned i = 0; i < seen.size(); ++i) expect(seen[i] == 1 + i / 60 * 1000 + i % 60, "indices, each once");
}

// ---- Tensor cores ----------------------------------------------------------------------------------------------

// Where a fragment's elements lie, written as strides and not as the formulas that the emulator uses: (lane % 4, lane /
// 4) and the bits of the element's number each add a multiple. Positions count down the columns: row + rows * column of
// A and C, column + columns * row of B.
struct Layout {
  int lane[2], element[3];
  int position(int l, int e) const {
    return l % 4 * lane[0] + l / 4 * lane[1] + (e & 1) * element[0] + (e >> 1 & 1) * element[1] + (e >> 2) * element[2];
  }
};
constexpr Layout kA16 = {{32, 1}, {16, 8, 128}}, kB16 = {{16, 1}, {8, 64, 0}};
constexpr Layout kA8 = {{16, 1}, {8, 64, 0}}, kB8 = {{8, 1}, {32, 0, 0}};
constexpr Layout kC = {{32, 1}, {16, 8, 0}};

__global__ void mma_kernel(MmaType type, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  if (type == MmaType::kBFloat16) ptx::mma_bf16(d + 4 * lane, a + 4 * lane, b + 2 * lane);
  if (type == MmaType::kFloat16) ptx::mma_f16(d + 4 * lane, a + 4 * lane, b + 2 * lane);
  if (type == MmaType::kTf32) ptx::mma_tf32(d + 4 * lane, a + 4 * lane, b + 2 * lane);
}

void test_mma() {
  for (MmaType type : {MmaType::kBFloat16, MmaType::kFloat16, MmaType::kTf32}) {
    const bool tf32 = type == MmaType::kTf32;
    const int inner = tf32 ? 8 : 16;
    // Small whole numbers, exact in every type; no two rows or columns alike.
    std::vector<float> a(16 * inner), b(inner * 8), c(16 * 8);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < inner; ++k) a[m + 16 * k] = static_cast<float>((m * 7 + k * 5 + m * k) % 13 - 6);
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < inner; ++k) b[n + 8 * k] = static_cast<float>((n * 3 + k * 11 + n * n * k) % 17 - 8);
    for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(i % 19);
    std::vector<uint32_t> a_bits(128), b_bits(64);
    std::vector<float> d(128);
    for (int lane = 0; lane < 32; ++lane) {
      const auto put = [&](std::vector<uint32_t>& bits, int base, int e, float x) {
        if (tf32) {
          bits[base + e] = ptx::to_tf32(x);
        } else {
          const uint32_t half = type == MmaType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
          bits[base + e / 2] |= half << (e % 2 * 16);
        }
      };
      for (int e = 0; e < (tf32 ? 4 : 8); ++e) put(a_bits, 4 * lane, e, a[(tf32 ? kA8 : kA16).position(lane, e)]);
      for (int e = 0; e < (tf32 ? 2 : 4); ++e) put(b_bits, 2 * lane, e, b[(tf32 ? kB8 : kB16).position(lane, e)]);
      for (int e = 0; e < 4; ++e) d[4 * lane + e] = c[kC.position(lane, e)];
    }
    ATTNFAST_LAUNCH(mma_kernel, Dim3{1}, Dim3{32}, 0, nullptr, type, a_bits.data(), b_bits.data(), d.data());
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int at = kC.position(lane, e), m = at % 16, n = at / 16;
        float wanted = c[at];
        for (int k = 0; k < inner; ++k) wanted += a[m + 16 * k] * b[n + 8 * k];
        expect(d[4 * lane + e] == wanted, "mma, row " + std::to_string(m) + " column " + std::to_string(n));
      }
    }
  }
}

// The four matrices are written to shared memory as they are numbered, rows `pitch` elements apart.
__global__ void ldmatrix_kernel(uint32_t* out, int pitch) {
  ATTNFAST_SHARED(raw);
  auto* shared = reinterpret_cast<uint16_t*>(raw);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) shared[i / 8 * pitch + i % 8] = static_cast<uint16_t>(i);
  __syncwarp();
  const uint16_t* row = shared + lane * pitch;
  ptx::ldmatrix_x4(out + 12 * lane, row);
  ptx::ldmatrix_x4_trans(out + 12 * lane + 4, row);
  ptx::ldmatrix_x2(out + 12 * lane + 8, row);
  ptx::ldmatrix_x2_trans(out + 12 * lane + 10, lane < 16 ? row : nullptr);  // only 16 rows are read
}

void test_ldmatrix() {
  for (int pitch : {8, 64}) {
    std::vector<uint32_t> out(32 * 12);
    reset_counters();
    ATTNFAST_LAUNCH(ldmatrix_kernel, Dim3{1}, Dim3{32}, 32 * pitch * 2, nullptr, out.data(), pitch);
    // Rows side by side fill all banks; rows 128 bytes apart all want the same four: 7 more passes for each of 12
    // matrices.
    expect(counters().bank_conflicts == (pitch == 8 ? 0u : 84u), "bank conflicts of ldmatrix");
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 12; ++i) {
        const bool transposed = (i >= 4 && i < 8) || i >= 10;
        const int m = i < 8 ? i % 4 : i % 2, row = lane / 4, column = 2 * (lane % 4);
        uint32_t wanted[2];
        for (int e = 0; e < 2; ++e) {
          const int element = transposed ? (column + e) * 8 + row : row * 8 + column + e;
          wanted[e] = static_cast<uint32_t>(64 * m + element);
        }
        expect(out[12 * lane + i] == (wanted[0] | wanted[1] << 16), "ldmatrix " + std::to_string(i));
      }
    }
  }
}

// Lane l reads the 16 bytes at chunk l * stride % 32 of shared memory.
__global__ void load_kernel(uint32_t* out, int stride) {
  ATTNFAST_SHARED(raw);
  auto* shared = reinterpret_cast<uint32_t*>(raw);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * 32; i += 32) shared[i] = static_cast<uint32_t>(i);
  __syncwarp();
  ptx::load_shared_x4(out + 4 * lane, shared + lane * stride % 32 * 4);
}

void test_load_shared() {
  // Eight lanes at once: neighbours are in different banks, every second chunk makes two lanes share, every eighth all;
  // one chunk for all is a broadcast.
  const std::pair<int, uint64_t> cases[] = {{1, 0}, {2, 4}, {4, 12}, {8, 12}, {0, 0}};
  for (const auto& [stride, conflicts] : cases) {
    std::vector<uint32_t> out(4 * 32);
    reset_counters();
    ATTNFAST_LAUNCH(load_kernel, Dim3{1}, Dim3{32}, 512, nullptr, out.data(), stride);
    expect(counters().bank_conflicts == conflicts,
           "bank conflicts of ld.shared.v4: " + std::to_string(counters().bank_conflicts));
    for (int i = 0; i < 128; ++i) {
      expect(out[i] == static_cast<uint32_t>(i / 4 * stride % 32 * 4 + i % 4), "ld.shared.v4, " + std::to_string(i));
    }
  }
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if ((bits & 0x7C00) != 0x7C00 || (bits & 1023) == 0) {
      expect(to_float16(from_float16(half)) == half, "float16 there and back");
    }
    if ((bits & 0x7F80) != 0x7F80 || (bits & 127) == 0) {
      expect(to_bfloat16(from_bfloat16(half)) == half, "bfloat16 there and back");
    }
  }
  expect(from_float16(0x3C00) == 1 && from_float16(0x0001) == 0x1p-24f && from_float16(0xFBFF) == -65504, "float16");
  expect(to_float16(2049) == to_float16(2048) && to_float16(2051) == to_float16(2052), "float16 rounds half to even");
  expect(to_float16(65519) == 0x7BFF && to_float16(65520) == 0x7C00 && to_float16(1e-9f) == 0, "float16 at its ends");
  expect(to_bfloat16(257) == to_bfloat16(256) && to_bfloat16(259) == to_bfloat16(260), "bfloat16 rounds half to even");
  expect(std::isnan(from_bfloat16(to_bfloat16(NAN))) && std::isnan(from_float16(to_float16(NAN))), "NaN stays NaN");
  expect(to_tf32(1 + 0x1p-11f) == 1 + 0x1p-10f && to_tf32(1 + 0x1p-12f) == 1, "tf32 rounds half away");
  expect(to_tf32(-1 - 0x1p-11f) == -1 - 0x1p-10f && to_tf32(0x1.FFFp0f) == 2 && std::isinf(to_tf32(0x1.FFFFFEp127f)),
         "tf32 rounds into the next binade");
  expect(std::isinf(to_tf32(INFINITY)) && std::isnan(to_tf32(NAN)) && std::isnan(to_tf32(ptx::as_float(0x7F800001u))),
         "tf32 has infinity and NaN");
  expect(ptx::pack_bf16(1, -2) == (0x3F80u | 0xC000u << 16) && ptx::pack_f16(1, -2) == (0x3C00u | 0xC000u << 16),
         "pack");
}

// ---- cp.async and shared memory --------------------------------------------------------------------------------

__global__ void copies_kernel(const float* from, float* out, int* poisoned) {
  ATTNFAST_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 3; ++group) {
    ptx::copy_async_16(shared + 4 * (32 * group + t), from + 4 * (32 * group + t), t % 5 != 0);
    ptx::copy_async_commit();
  }
  int nan = 0;
  for (int i = 0; i < 3; ++i) nan += std::isnan(shared[4 * (32 * i + t)]) << i;
  ptx::copy_async_wait<1>();
  for (int i = 0; i < 3; ++i) nan += std::isnan(shared[4 * (32 * i + t)]) << (3 + i);
  ptx::copy_async_wait<0>();
  for (int i = 0; i < 12; ++i) out[12 * t + i] = shared[4 * (32 * (i / 4) + t) + i % 4];
  poisoned[t] = nan;
}

void test_copies() {
  std::vector<float> from(3 * 128 + 4), out(12 * 32);
  std::vector<int> poisoned(32);
  float* aligned = from.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) ++aligned;
  for (int i = 0; i < 384; ++i) aligned[i] = static_cast<float>(i + 1);
  ATTNFAST_LAUNCH(copies_kernel, Dim3{1}, Dim3{32}, 384 * sizeof(float), nullptr, aligned, out.data(), poisoned.data());
  for (int t = 0; t < 32; ++t) {
    expect(poisoned[t] == (7 | 4 << 3), "what has not been waited for is NaN");
    for (int i = 0; i < 12; ++i) {
      const float wanted = t % 5 == 0 ? 0 : static_cast<float>(4 * (32 * (i / 4) + t) + i % 4 + 1);
      expect(out[12 * t + i] == wanted, "cp.async");
    }
  }
}

__global__ void uninitialised_kernel(int* out) {
  ATTNFAST_SHARED(raw);
  const int t = static_cast<int>(threadIdx.x);
  uint16_t half;
  std::memcpy(&half, raw + 2 * t, 2);
  out[t] = std::isnan(reinterpret_cast<float*>(raw)[t]) && std::isnan(reinterpret_cast<double*>(raw)[t / 2]) &&
           std::isnan(ptx::widen_f16(half)) && std::isnan(ptx::widen_bf16(half));
}

void test_shared_memory() {
  std::vector<int> out(32);
  ATTNFAST_LAUNCH(uninitialised_kernel, Dim3{1}, Dim3{32}, 128, nullptr, out.data());
  for (int nan : out) expect(nan == 1, "shared memory begins as NaN in every type");
}

// ---- Reports ---------------------------------------------------------------------------------------------------

enum Wrong {
  kDeadlock,
  kDivergentWarp,
  kNotInMask,
  kSourceNotInMask,
  kDivergentBarrier,
  kBarrierSize,
  kBarrierId,
  kLdmatrixOutside,
  kLdmatrixMisaligned,
  kNotTf32,
  kVectorMisaligned,
  kCopyMisaligned,
  kCopyOutside,
  kCopyPending
};

__global__ void wrong_kernel(Wrong wrong, const float* global) {
  ATTNFAST_SHARED(raw);
  const int t = static_cast<int>(threadIdx.x);
  uint32_t registers[4];
  switch (wrong) {
    case kDeadlock:
      if (t < 40)
        __syncthreads();
      else
        ptx::barrier_sync(3, 64);
      break;
    case kDivergentWarp:
      if (t < 16)
        __shfl_sync(~0u, t, 0);
      else
        __ballot_sync(~0u, t);
      break;
    case kNotInMask:
      __shfl_sync(0xFFFFu, t, 0);
      break;
    case kSourceNotInMask:
      if (t % 32 < 16) __shfl_sync(0xFFFFu, t, 20);
      break;
    case kDivergentBarrier:
      if (t < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case kBarrierSize:
      ptx::barrier_sync(1, 40);
      break;
    case kBarrierId:
      ptx::barrier_sync(16, 64);
      break;
    case kLdmatrixOutside:
      ptx::ldmatrix_x4(registers, raw + 16 * (t + 40));
      break;
    case kLdmatrixMisaligned:
      ptx::ldmatrix_x4(registers, raw + 8);
      break;
    case kNotTf32: {
      const uint32_t a[4] = {0, 0, ptx::as_bits(t == 9 ? 1 + 0x1p-11f : 1.0f), 0}, b[2] = {};
      float d[4] = {};
      ptx::mma_tf32(d, a, b);
      break;
    }
    case kVectorMisaligned:
      ptx::load_shared_x4(registers, raw + 4);
      break;
    case kCopyMisaligned:
      ptx::copy_async_16(raw + 16 * t, global + 1, true);
      break;
    case kCopyOutside:
      ptx::copy_async_16(raw + 1024, global, true);
      break;
    case kCopyPending:
      ptx::copy_async_16(raw + 16 * t, global, true);
      ptx::copy_async_commit();
      break;
  }
}

void test_reports() {
  alignas(16) static float global[4 * 64];
  struct Case {
    Wrong wrong;
    const char* wanted;
  };
  const Case cases[] = {{kDeadlock, "deadlock"},
                        {kDivergentWarp, "divergent warp operation"},
                        {kNotInMask, "not in its own mask"},
                        {kSourceNotInMask, "lane 20, which is not in the mask"},
                        {kDivergentBarrier, "divergent barrier"},
                        {kBarrierSize, "a barrier of 40 threads"},
                        {kBarrierId, "no barrier 16"},
                        {kLdmatrixOutside, "outside of shared memory"},
                        {kLdmatrixMisaligned, "misaligned, at byte 8"},
                        {kNotTf32, "thread 9 (warp 0 lane 9) in mma.sync"},
                        {kNotTf32, "0x3F801000 has not been rounded to tf32"},
                        {kVectorMisaligned, "misaligned, at byte 4"},
                        {kCopyMisaligned, "not aligned to 16 bytes"},
                        {kCopyOutside, "outside of shared memory"},
                        {kCopyPending, "returned with 1 cp.async not waited for"}};
  for (const Case& c : cases) {
    const std::string report =
        reported([&] { ATTNFAST_LAUNCH(wrong_kernel, Dim3{1}, Dim3{64}, 64 * 16, nullptr, c.wrong, global); });
    expect(contains(report, c.wanted), std::string("a report of ") + c.wanted + ", got: " + report);
    expect(contains(report, "kernel wrong_kernel, block (0,0,0)"), "a report names its kernel: " + report);
  }
  const std::string deadlock =
      reported([&] { ATTNFAST_LAUNCH(wrong_kernel, Dim3{1}, Dim3{64}, 1024, nullptr, kDeadlock, global); });
  expect(contains(deadlock, "warp 1 lanes 0-7: waiting in __syncthreads at primitives.cpp:"), deadlock);
  expect(contains(deadlock, "warp 1 lanes 8-31: waiting in bar.sync at primitives.cpp:"), deadlock);
  expect(contains(reported([&] {
                    ATTNFAST_LAUNCH(wrong_kernel, (Dim3{1, 70000}), Dim3{64}, 0, nullptr, kDeadlock, global);
                  }),
                  "a grid of"),
         "a grid that is too large");
  // The emulator goes on after a failure.
  test_rounds();
}

// One mma with registers from standard input, lane by lane (four words of A and two of B in hexadecimal, four numbers
// of C), and its four results a lane; what ldmatrix_kernel makes of the numbers 0 to 255. Nothing here knows a fragment
// map: tests/test_fragment_maps.py brings that of CuTe.
int run_mma(MmaType type) {
  std::vector<uint32_t> a(128), b(64);
  std::vector<float> d(128);
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) complete = std::scanf("%x", &a[4 * lane + i]) == 1 && complete;
    for (int i = 0; i < 2; ++i) complete = std::scanf("%x", &b[2 * lane + i]) == 1 && complete;
    for (int i = 0; i < 4; ++i) complete = std::scanf("%f", &d[4 * lane + i]) == 1 && complete;
  }
  if (!complete) return 2;
  ATTNFAST_LAUNCH(mma_kernel, Dim3{1}, Dim3{32}, 0, nullptr, type, a.data(), b.data(), d.data());
  for (float x : d) std::printf("%.9g\n", x);
  return 0;
}

int run_ldmatrix() {
  constexpr int kPitch = 8;
  std::vector<uint32_t> out(32 * 12);
  ATTNFAST_LAUNCH(ldmatrix_kernel, Dim3{1}, Dim3{32}, 32 * kPitch * 2, nullptr, out.data(), kPitch);
  for (uint32_t x : out) std::printf("%u\n", x);
  return 0;
}

}  // namespace
}  // namespace attnfast::simt

// Without an argument: all tests. With one: the instruction of that name, see run_mma.
int main(int count, char** arguments) {
  using namespace attnfast::simt;
  const std::string instruction = count > 1 ? arguments[1] : "";
  if (instruction == "ldmatrix") return run_ldmatrix();
  if (instruction == "bf16") return run_mma(MmaType::kBFloat16);
  if (instruction == "f16") return run_mma(MmaType::kFloat16);
  if (instruction == "tf32") return run_mma(MmaType::kTf32);
  test_conversions();
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    set_seed(seed);
    test_shuffles();
    test_votes();
    test_rounds();
    test_named_barriers();
    test_block();
    test_mma();
    test_ldmatrix();
    test_load_shared();
    test_copies();
    test_shared_memory();
    test_reports();
  }
  std::printf("simt primitives: %d failures\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
