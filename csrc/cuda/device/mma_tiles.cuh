// Tiles of the kernels of the dot core that multiply on tensor cores: 16-bit rows in shared memory, and sums in C
// fragments.
//
// Rows are a multiple of 128 bytes, and the 16-byte chunk c of row r lies at chunk c ^ (r % 8): eight rows of one
// column of chunks, which ldmatrix wants at once, are then in different banks. A block has four warps, a warp 16 rows
// of what the block owns; a lane with g = lane / 4 and t = lane % 4 holds of a C fragment rows g and g + 8, and columns
// 2 t and 2 t + 1 of every eight.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

constexpr int kMmaWarps = 4, kMmaThreads = 32 * kMmaWarps, kMmaRows = 16 * kMmaWarps;

struct MmaBFloat16 {
  ATTNFAST_DEVICE static void mma(float* d, const uint32_t* a, const uint32_t* b) { ptx::mma_bf16(d, a, b); }
  ATTNFAST_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  ATTNFAST_DEVICE static float widen(uint16_t bits) { return ptx::widen_bf16(bits); }
  static constexpr uint16_t kExponent = 0x7F80;
};
struct MmaFloat16 {
  ATTNFAST_DEVICE static void mma(float* d, const uint32_t* a, const uint32_t* b) { ptx::mma_f16(d, a, b); }
  ATTNFAST_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_f16(low, high); }
  ATTNFAST_DEVICE static float widen(uint16_t bits) { return ptx::widen_f16(bits); }
  static constexpr uint16_t kExponent = 0x7C00;
};

template <int kHead>
ATTNFAST_DEVICE int swizzled_at(int row, int chunk) {
  return row * kHead + ((chunk ^ (row & 7)) << 3);
}

// Rows [first, first + rows) of a [T, size] matrix on their way to shared memory, zero from `end` on.
template <int kHead>
ATTNFAST_DEVICE void copy_rows(uint16_t* to, const uint16_t* from, int64_t stride, int64_t first, int rows, int64_t end,
                               int64_t size) {
  constexpr int kChunks = kHead / 8;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += kMmaThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = first + row < end && chunk * 8 < size;
    ptx::copy_async_16(to + swizzled_at<kHead>(row, chunk), valid ? from + (first + row) * stride + chunk * 8 : from,
                       valid);
  }
}

// product = own tile^T, for the 16 rows of this warp and kTile rows of the tile.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void multiply_rows(const uint16_t* own, const uint16_t* tile, float (*product)[4]) {
  [[maybe_unused]] constexpr int kStepsAtOnce = kHead <= 128 ? 4 : 1;  // as many as leave the registers to the sums
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) product[n][i] = 0;
#pragma unroll kStepsAtOnce
  for (int k = 0; k < kHead / 16; ++k) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, own + swizzled_at<kHead>(lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kTile / 8; n += 2) {
      // Rows as they lie are the transposed factor as mma wants it: matrices of 8 rows by 8 features, features first.
      uint32_t fragment[4];
      ptx::ldmatrix_x4(fragment, tile + swizzled_at<kHead>(n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      T::mma(product[n], a, fragment);
      T::mma(product[n + 1], a, fragment + 2);
    }
  }
}

// sum += weights tile, the weights rounded to 16 bits: their C fragments are then A fragments.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void add_weighted_rows(const float (*weight)[4], const uint16_t* tile, float (*sum)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const uint32_t a[4] = {T::pack(weight[2 * k][0], weight[2 * k][1]), T::pack(weight[2 * k][2], weight[2 * k][3]),
                           T::pack(weight[2 * k + 1][0], weight[2 * k + 1][1]),
                           T::pack(weight[2 * k + 1][2], weight[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kHead / 8; n += 2) {
      uint32_t fragment[4];
      ptx::ldmatrix_x4_trans(fragment, tile + swizzled_at<kHead>(k * 16 + lane % 16, n + lane / 16));
      T::mma(sum[n], a, fragment);
      T::mma(sum[n + 1], a, fragment + 2);
    }
  }
}

template <class T, int kHead, int kTile>
ATTNFAST_DEVICE bool has_strange_rows(const uint16_t* tile) {
  bool strange = false;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kHead / 8; i += kMmaThreads) {
    const Halves8 chunk = *reinterpret_cast<const Halves8*>(tile + 8 * i);
#pragma unroll
    for (int e = 0; e < 8; ++e) strange = strange || (chunk.x[e] & T::kExponent) == T::kExponent;
  }
  return strange;
}

// Where a tile holds something that is not finite and something in it is hidden: adds what is visible of such a row,
// and clears it for the product that follows. Every warp of the block comes here together.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void take_strange_rows(uint16_t* tile, const float (*weight)[4], float (*sum)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  constexpr int kChunks = kHead / 8;
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {  // unrolled for the weights' registers
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const int row = n * 8 + k;
      bool strange = false;
      for (int d = lane; d < kHead; d += 32) {
        strange = strange || (tile[swizzled_at<kHead>(row, d / 8) + d % 8] & T::kExponent) == T::kExponent;
      }
      if (!__any_sync(0xFFFFFFFFu, strange)) continue;
      const int holder = lane - t + k / 2;  // of the weights of this lane's rows
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float even = weight[n][2 * r], odd = weight[n][2 * r + 1];
        const float w = __shfl_sync(0xFFFFFFFFu, k % 2 == 0 ? even : odd, holder);
        if (is_hidden(w)) continue;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint16_t* x = tile + swizzled_at<kHead>(row, c) + 2 * t;
          sum[c][2 * r] += w * T::widen(x[0]);
          sum[c][2 * r + 1] += w * T::widen(x[1]);
        }
      }
    }
  }
  __syncthreads();  // all have taken what they may see
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kTile; row += kMmaWarps) {
    bool strange = false;
    for (int d = lane; d < kHead; d += 32) {
      strange = strange || (tile[row * kHead + d] & T::kExponent) == T::kExponent;
    }
    if (!__any_sync(0xFFFFFFFFu, strange)) continue;
    for (int d = lane; d < kHead; d += 32) tile[row * kHead + d] = 0;
  }
  __syncthreads();
}

// Rows that start at multiples of 16 bytes and have no gaps.
inline bool rows_are_aligned(const Tensor4& x, int64_t size) {
  bool good = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && size % 8 == 0 && (x.stride[3] == 1 || size == 0);
  for (int i = 0; i < 3; ++i) good = good && x.stride[i] % 8 == 0;
  return good;
}

}  // namespace attnfast::cuda
