// Tiles of the gradient kernels that multiply by fused multiply-adds, in float64 or float32.
//
// A block has 8 x 16 threads. A half-warp owns rows ty, ty + 8, ... of what the block owns: of a product of tiles the
// columns tx, tx + 16, ..., of a sum 16 bytes of every group of columns. Rows in shared memory are 16 bytes longer than
// a multiple of 128: eight neighbours then start in different banks.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

constexpr int kFmaThreads = 128, kRowGroups = 8, kColumnGroups = 16;

template <class R, int kHead>
struct FmaPlan {
  using Vector = typename VectorOf<R>::Type;
  static constexpr int kWidth = Vector::kSize;
  // Rows that a block owns, and rows of a tile that it walks to. Large heads leave shared memory for fewer.
  static constexpr int kColumns = sizeof(R) == 4 && kHead <= 128 ? 32 : 16;
  static constexpr int kRows = sizeof(R) == 8 && kHead > 128 ? 8 : kColumns;
  static constexpr int kRowsOfThread = kRows / kRowGroups, kColumnsOfThread = kColumns / kColumnGroups;
  static constexpr int kGroups = kHead / (kColumnGroups * kWidth);
  static constexpr int kPitch = kHead + kWidth, kWeightPitch = kColumns + kWidth;
};

// Rows [first, first + rows) of [T, size] to shared memory, zero from `end` on. Returns whether this thread has met
// something that is not finite.
template <class R, int kHead>
ATTNFAST_DEVICE bool load_tile(R* to, const Tensor4& from, int64_t b, int64_t h, int64_t first, int rows, int64_t end,
                               int64_t size) {
  const int64_t offset = offset4(from, b, h, first, 0);
  bool finite = true;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kFmaThreads / 32) {
    for (int d = static_cast<int>(threadIdx.x) % 32; d < kHead; d += 32) {
      R x = R(0);
      if (first + row < end && d < size) {
        x = load_element<R>(from.data, from.dtype, offset + row * from.stride[2] + d * from.stride[3]);
      }
      to[row * FmaPlan<R, kHead>::kPitch + d] = x;
      finite = finite && x - x == R(0);
    }
  }
  return !finite;
}

// product = own tile^T; beyond `size` both factors are zero.
template <class R, int kHead>
ATTNFAST_DEVICE void multiply_tiles(
    const R* own, const R* tile, int64_t size,
    R (&product)[FmaPlan<R, kHead>::kRowsOfThread][FmaPlan<R, kHead>::kColumnsOfThread]) {
  using P = FmaPlan<R, kHead>;
  using Vector = typename P::Vector;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
    for (int j = 0; j < P::kColumnsOfThread; ++j) product[i][j] = R(0);
#pragma unroll 2
  for (int d = 0; d < size; d += P::kWidth) {
    Vector column[P::kColumnsOfThread];
#pragma unroll
    for (int j = 0; j < P::kColumnsOfThread; ++j) {
      column[j] = *reinterpret_cast<const Vector*>(tile + (tx + j * kColumnGroups) * P::kPitch + d);
    }
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const Vector row = *reinterpret_cast<const Vector*>(own + (ty + i * kRowGroups) * P::kPitch + d);
#pragma unroll
      for (int j = 0; j < P::kColumnsOfThread; ++j)
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) product[i][j] += row.x[e] * column[j].x[e];
    }
  }
}

// A thread's part of a sum of rows.
template <class R, int kHead>
struct FmaSum {
  using P = FmaPlan<R, kHead>;
  using Vector = typename P::Vector;
  R x[P::kRowsOfThread][P::kGroups][P::kWidth];

  ATTNFAST_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int g = 0; g < P::kGroups; ++g)
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) x[i][g][e] = R(0);
  }

  // += weights tile; `select`: the tile may hold anything in rows that a weight hides.
  ATTNFAST_DEVICE void add(const R* weights, const R* tile, bool select) {
    const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
#pragma unroll 1
    for (int k = 0; k < P::kColumns; k += P::kWidth) {
      Vector weight[P::kRowsOfThread];
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        weight[i] = *reinterpret_cast<const Vector*>(weights + (ty + i * kRowGroups) * P::kWeightPitch + k);
      }
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
#pragma unroll
        for (int g = 0; g < P::kGroups; ++g) {
          const Vector v =
              *reinterpret_cast<const Vector*>(tile + (k + e) * P::kPitch + (g * kColumnGroups + tx) * P::kWidth);
#pragma unroll
          for (int i = 0; i < P::kRowsOfThread; ++i) {
            if (select && is_hidden(weight[i].x[e])) continue;
#pragma unroll
            for (int c = 0; c < P::kWidth; ++c) x[i][g][c] += weight[i].x[e] * v.x[c];
          }
        }
      }
    }
  }

  // Rows [first, end) times `factor`.
  ATTNFAST_DEVICE void store(const Tensor4& to, int64_t b, int64_t h, int64_t first, int64_t end, int64_t size,
                             R factor) const {
    const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t row = first + ty + i * kRowGroups;
      if (row >= end) continue;
      const int64_t base = offset4(to, b, h, row, 0);
#pragma unroll
      for (int g = 0; g < P::kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) {
          const int c = (g * kColumnGroups + tx) * P::kWidth + e;
          if (c < size) store_element(to.data, to.dtype, base + c * to.stride[3], x[i][g][e] * factor);
        }
      }
    }
  }
};

}  // namespace attnfast::cuda
