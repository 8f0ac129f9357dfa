// What forward and backward of the weighted gather share: rows of a table found by index, and dot products with them.
#pragma once

#include "../core/gather_params.h"
#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr double kSerialElements = 1 << 15;  // below so many elements read, a call runs on the calling thread
constexpr int64_t kGatherAhead = 12;         // rows between a prefetch and its use
constexpr int64_t kPicksPerTask = 1024;      // of the passes in the order of the picks
constexpr int kLineBytes = 64;

// An index is read once: what is checked is what is used, even if somebody writes to the tensor meanwhile.
ATTNFAST_INLINE int64_t read_index(const int64_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

// Whether `slot` is one; reports it if it is neither that nor -1.
ATTNFAST_INLINE bool check_slot(const WeightedGatherParams& p, int64_t slot, int64_t position) {
  if (__builtin_expect(uint64_t(slot) < uint64_t(p.slots), 1)) return true;
  if (slot != -1) {
    int64_t known = __atomic_load_n(p.bad_position, __ATOMIC_RELAXED);
    while (position < known &&
           !__atomic_compare_exchange_n(p.bad_position, &known, position, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  return false;
}

// A row of the table, from column `first` on. Where columns are apart they are brought together in `packed`.
template <class T>
ATTNFAST_INLINE const T* table_row(const WeightedGatherParams& p, int64_t slot, int64_t first, int64_t count,
                                   T* packed) {
  const T* row = static_cast<const T*>(p.values) + slot * p.values_stride[0] + first * p.values_stride[1];
  if (p.values_stride[1] == 1) return row;
  for (int64_t i = 0; i < count; i++) packed[i] = row[i * p.values_stride[1]];
  return packed;
}
// Into the second-level cache: the first has too few lines under way for rows that come from memory, which costs a
// third of the speed. A hint only: `slot` need not be one.
template <class T>
ATTNFAST_INLINE void prefetch_row(const WeightedGatherParams& p, int64_t slot, int64_t first, int64_t count) {
  const char* row = reinterpret_cast<const char*>(
      uint64_t(p.values) + (uint64_t(slot) * uint64_t(p.values_stride[0]) + uint64_t(first)) * sizeof(T));
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kLineBytes) __builtin_prefetch(row + i, 0, 2);
}

// The dot product of a row with R[n]; its order of additions depends on n alone.
template <class R, class T>
ATTNFAST_INLINE R dot_row(const T* row, const R* x, int64_t n) {
  constexpr int L = kLanes<R>;
  Vec<R> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    ATTNFAST_UNROLL for (int j = 0; j < 4; j++) sum[j] += load_as<R>(row + i + j * L) * load(x + i + j * L);
  for (; i + L <= n; i += L) sum[0] += load_as<R>(row + i) * load(x + i);
  if (i < n) sum[1] += load_partial<R>(row + i, int(n - i)) * load_partial<R>(x + i, int(n - i));
  return sum_lanes<R>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
