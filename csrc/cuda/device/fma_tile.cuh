// Tiles of queries and keys in shared memory and their products by fused multiply-adds, for the kernels of the dot core
// that take any dtype and any strides.
//
// A block has 8 x 16 threads. A half-warp owns rows ty, ty + 8, ... of the block's queries: scores at keys tx, tx + 16,
// ..., so that a row's maximum is a shuffle among 16 lanes. Rows in shared memory are 16 bytes longer than a multiple
// of 128: eight neighbours then start in different banks. Half types are widened to float32 as they are loaded.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda::fma_tile {

constexpr int kThreads = 128, kRowGroups = 8, kColumnGroups = 16;

// Of kHead features at once.
template <class R, int kHead>
struct Plan {
  using Vector = typename VectorOf<R>::Type;
  static constexpr int kWidth = Vector::kSize;
  static constexpr int kRows = sizeof(R) == 4 ? 32 : 16, kKeys = kRows;
  static constexpr int kRowsOfThread = kRows / kRowGroups, kKeysOfThread = kKeys / kColumnGroups;
  static constexpr int kGroups = kHead / (kColumnGroups * kWidth);  // of value columns
  static constexpr int kPitch = kHead + kWidth, kWeightPitch = kKeys + kWidth;
};

// Features [begin, begin + kHead) of the rows [first, first + rows) of [T, size] to shared memory, zero where there is
// none. Returns whether this thread has met something that is not finite.
template <class R, int kHead>
ATTNFAST_DEVICE bool load_rows(R* to, const Tensor4& from, int64_t offset, int64_t first, int rows, int64_t end,
                               int64_t begin, int64_t size) {
  bool finite = true;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kThreads / 32) {
    for (int d = static_cast<int>(threadIdx.x) % 32; d < kHead; d += 32) {
      R x = R(0);
      if (first + row < end && begin + d < size) {
        const int64_t at = offset + (first + row) * from.stride[2] + (begin + d) * from.stride[3];
        x = load_element<R>(from.data, from.dtype, at);
      }
      to[row * Plan<R, kHead>::kPitch + d] = x;
      finite = finite && x - x == R(0);
    }
  }
  return !finite;
}

template <class R, int kHead>
using Scores = R[Plan<R, kHead>::kRowsOfThread][Plan<R, kHead>::kKeysOfThread];

// score += queries times keys, of `size` features; beyond them both are zero.
template <class R, int kHead>
ATTNFAST_DEVICE void add_products(const R* queries, const R* keys, int size, Scores<R, kHead>& score) {
  using P = Plan<R, kHead>;
  using Vector = typename P::Vector;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
#pragma unroll 2
  for (int d = 0; d < size; d += P::kWidth) {
    Vector k[P::kKeysOfThread];
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      k[j] = *reinterpret_cast<const Vector*>(keys + (tx + j * kColumnGroups) * P::kPitch + d);
    }
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const Vector q = *reinterpret_cast<const Vector*>(queries + (ty + i * kRowGroups) * P::kPitch + d);
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j)
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) score[i][j] += q.x[e] * k[j].x[e];
    }
  }
}

// The same over all features, kHead of them at once, from the tensors. What shared memory held before is no longer read
// by anyone when this loads, and nobody waits at its end.
template <class R, int kHead>
ATTNFAST_DEVICE void add_products_of(const DotAttentionParams& p, const Rows& r, R* queries, R* keys, int64_t query,
                                     int64_t key, Scores<R, kHead>& score) {
  using P = Plan<R, kHead>;
  for (int64_t d = 0; d == 0 || d < p.head_size; d += kHead) {  // once even of nothing: the barriers are relied on
    __syncthreads();
    load_rows<R, kHead>(queries, p.query, query_offset(r, p.query), query, P::kRows, r.sequence.query_rows, d,
                        p.head_size);
    load_rows<R, kHead>(keys, p.key, key_offset(r, p.key), key, P::kKeys, r.sequence.keys, d, p.head_size);
    __syncthreads();
    const int64_t rest = p.head_size - d;
    add_products<R, kHead>(queries, keys, static_cast<int>(rest < kHead ? rest : kHead), score);
  }
}

}  // namespace attnfast::cuda::fma_tile
