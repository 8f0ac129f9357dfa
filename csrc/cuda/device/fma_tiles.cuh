// Tiles in shared memory and their products by fused multiply-adds, in float64 or float32, for the kernels of the dot
// core that take any dtype and any strides.
//
// A block has 8 x 16 threads. A half-warp has rows ty, ty + 8, ... of what the block owns: of a product of tiles the
// columns tx, tx + 16, ..., so that a row's maximum is a shuffle among 16 lanes, and of a sum 16 bytes of every group
// of columns. Rows in shared memory are 16 bytes longer than a multiple of 128: eight neighbours then start in
// different banks. Half types are widened to float32 as they are loaded.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

constexpr int kFmaThreads = 128, kRowGroups = 8, kColumnGroups = 16;

// kRows rows that a block owns, kColumns rows of a tile that it walks to, kHead features of both at once.
template <class Real, int kFeatures, int kOwnRows, int kTileRows>
struct FmaPlan {
  using R = Real;
  using Vector = typename VectorOf<R>::Type;
  static constexpr int kHead = kFeatures, kRows = kOwnRows, kColumns = kTileRows, kWidth = Vector::kSize;
  static constexpr int kRowsOfThread = kRows / kRowGroups, kColumnsOfThread = kColumns / kColumnGroups;
  static constexpr int kGroups = kHead / (kColumnGroups * kWidth);
  static constexpr int kPitch = kHead + kWidth, kWeightPitch = kColumns + kWidth;
  using Products = R[kRowsOfThread][kColumnsOfThread];
};

// Forwards own queries and walk along keys.
template <class R, int kHead>
using FmaForwardPlan = FmaPlan<R, kHead, sizeof(R) == 4 ? 32 : 16, sizeof(R) == 4 ? 32 : 16>;
// Backwards have two tensors on either side, and large heads leave shared memory for fewer rows.
template <class R, int kHead>
constexpr int kGradientColumns = sizeof(R) == 4 && kHead <= 128 ? 32 : 16;
template <class R, int kHead>
constexpr int kGradientRows = sizeof(R) == 8 && kHead > 128 ? 8 : kGradientColumns<R, kHead>;
template <class R, int kHead>
using FmaGradientPlan = FmaPlan<R, kHead, kGradientRows<R, kHead>, kGradientColumns<R, kHead>>;

// The rows of one head in a tensor [T, size]: those of [0, end) are there.
struct FmaRows {
  const Tensor4& tensor;
  int64_t offset, end, size;
};

// Features [begin, begin + kHead) of `rows` rows from `first` on to shared memory, zero where there is nothing. Returns
// whether this thread has met something that is not finite.
template <class P>
ATTNFAST_DEVICE bool load_rows(typename P::R* to, const FmaRows& from, int64_t first, int rows, int64_t begin = 0) {
  using R = typename P::R;
  bool finite = true;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kFmaThreads / 32) {
    const bool there = has_index(first + row, from.end);
    const int64_t offset = from.offset + (first + row) * from.tensor.stride[2];
    for (int d = static_cast<int>(threadIdx.x) % 32; d < P::kHead; d += 32) {
      R x = R(0);
      if (there && begin + d < from.size) {
        x = load_element<R>(from.tensor.data, from.tensor.dtype, offset + (begin + d) * from.tensor.stride[3]);
      }
      to[row * P::kPitch + d] = x;
      finite = finite && x - x == R(0);
    }
  }
  return !finite;
}

// product += own tile^T, of `size` features; beyond them both factors are zero.
template <class P>
ATTNFAST_DEVICE void add_products(const typename P::R* own, const typename P::R* tile, int size,
                                  typename P::Products& product) {
  using Vector = typename P::Vector;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
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

// The same over all features, kHead of them at once, from the tensors: rows of `own_rows` from `own_first` on times
// those of `tile_rows` from `tile_first` on. What shared memory held before is no longer read by anyone when this
// loads, and nobody waits at its end.
template <class P>
ATTNFAST_DEVICE void add_products_of(const FmaRows& own_rows, int64_t own_first, const FmaRows& tile_rows,
                                     int64_t tile_first, typename P::R* own, typename P::R* tile,
                                     typename P::Products& product) {
  for (int64_t d = 0; d == 0 || d < own_rows.size; d += P::kHead) {  // once even of nothing: barriers are relied on
    __syncthreads();
    load_rows<P>(own, own_rows, own_first, P::kRows, d);
    load_rows<P>(tile, tile_rows, tile_first, P::kColumns, d);
    __syncthreads();
    const int64_t rest = own_rows.size - d;
    add_products<P>(own, tile, static_cast<int>(rest < P::kHead ? rest : P::kHead), product);
  }
}

// A thread's part of a sum of rows.
template <class P>
struct FmaSum {
  using R = typename P::R;
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

  ATTNFAST_DEVICE void multiply_row(int i, R factor) {
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g)
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) x[i][g][e] *= factor;
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

  // Row i of this thread times `factor`, as columns [begin, begin + kHead) of the `size` that `offset` is the first of.
  ATTNFAST_DEVICE void store_row(int i, void* data, DType dtype, int64_t offset, int64_t stride, int64_t begin,
                                 int64_t size, R factor) const {
    const int tx = static_cast<int>(threadIdx.x) % kColumnGroups;
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
        const int64_t c = begin + (g * kColumnGroups + tx) * P::kWidth + e;
        if (c < size) store_element(data, dtype, offset + c * stride, x[i][g][e] * factor);
      }
    }
  }

  // Those of this thread's rows that are there, the block's first being row `first`.
  ATTNFAST_DEVICE void store(const FmaRows& to, int64_t first, int64_t begin, R factor) const {
    const int ty = static_cast<int>(threadIdx.x) / kColumnGroups;
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t row = first + ty + i * kRowGroups;
      if (row >= to.end) continue;
      store_row(i, to.tensor.data, to.tensor.dtype, to.offset + row * to.tensor.stride[2], to.tensor.stride[3], begin,
                to.size, factor);
    }
  }
};

}  // namespace attnfast::cuda
