// Rows of a table that a kernel finds by index: elements in their stored type, 16 bytes at a time where rows are
// aligned for it, and how the threads of a block share columns and rows.
#pragma once

#include "core/gather_params.h"
#include "cuda/device/elements.cuh"

namespace attnfast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class R, class T>
ATTNFAST_DEVICE R widen(T x) {
  return static_cast<R>(x);
}
template <class R>
ATTNFAST_DEVICE R widen(BFloat16 x) {
  return static_cast<R>(ptx::widen_bf16(x.bits));
}
template <class R>
ATTNFAST_DEVICE R widen(Float16 x) {
  return static_cast<R>(ptx::widen_f16(x.bits));
}

template <class T, int kSize>
struct alignas(16) Pack {
  T x[kSize];
};

// A team of 2^k <= 32 lanes shares a row: a lane has `kElements` columns of each tile of columns.
template <class T, bool kVector>
struct Columns {
  // Where rows cannot be read 16 bytes at a time, neighbouring lanes take neighbouring elements.
  static constexpr int kElements = kVector ? 16 / static_cast<int>(sizeof(T)) : 4;
  int64_t first;  // of the tile
  int lane, lanes;

  ATTNFAST_DEVICE int64_t column(int e) const {
    return first + (kVector ? static_cast<int64_t>(lane) * kElements + e : lane + static_cast<int64_t>(e) * lanes);
  }
};

// The lane's columns of a row; zero beyond the `size` columns that there are.
template <class T, bool kVector, int kElements = Columns<T, kVector>::kElements, class C>
ATTNFAST_DEVICE Pack<T, kElements> load_columns(const T* row, int64_t stride, int64_t size, const C& columns) {
  static_assert(C::kElements == kElements);
  if (kVector && columns.column(kElements - 1) < size) {
    return *reinterpret_cast<const Pack<T, kElements>*>(row + columns.column(0));
  }
  Pack<T, kElements> pack = {};
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int64_t column = columns.column(e);
    if (column < size) pack.x[e] = row[column * stride];
  }
  return pack;
}

// Adds up what the `members` teams of an output have in `sum`, in the order of the members, for member 0; all threads
// of the block come here. `shared` holds kElements numbers for each thread.
template <class R, int kElements>
ATTNFAST_DEVICE void add_members(R (&sum)[kElements], int members, int member, int lanes, R* shared) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int e = 0; e < kElements; ++e) shared[thread * kElements + e] = sum[e];
  __syncthreads();
  if (member != 0) return;
  for (int m = 1; m < members; ++m) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum[e] += shared[(thread + m * lanes) * kElements + e];
  }
}

}  // namespace attnfast::cuda
