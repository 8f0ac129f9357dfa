// The k largest sums of a row score and a column score, from the sorted best candidates of each half.
//
// With 1-based ranks, a pair (i, j) has at least i j - 1 pairs before it, so it can be among the first k only if
// i j <= k: 119 pairs for k = 32 where all are 1024. They are not even all looked at. Each row's pairs come in the
// order of its columns, so one pair of each row stands at the front, and row i + 1 need not be there before row i has
// given one; the best of the fronts is taken k times, which yields the picks in order.
//
// Pairs are compared by their exact sums (the rounded sum, then its rounding error), equal ones by their slot. Only
// with exact sums are the halves' orders and the order of the pairs one order, also where rounding makes sums equal.
#include "parallel.h"
#include "simd.h"
#include "weighted_gather.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kSerialPicks = 1 << 12;  // below so many picks a call runs on the calling thread

// The pair at the front of each row, by its parts. Lanes past the rows in play hold -infinity.
template <class R>
struct Fronts {
  R *sum, *error;
  int64_t *slot, *column;  // column: rank; `candidates` where the row has no more
  static int64_t padded(int64_t n) { return (n + kLanes<R> - 1) / kLanes<R> * kLanes<R>; }
  static size_t bytes(int64_t n) { return size_t(padded(n)) * 2 * (sizeof(R) + sizeof(int64_t)); }
  Fronts(int64_t n, void* memory) {
    slot = static_cast<int64_t*>(memory);
    column = slot + padded(n);
    sum = reinterpret_cast<R*>(column + padded(n));
    error = sum + padded(n);
  }
};

template <class R>
ATTNFAST_INLINE void set_front(const Fronts<R>& f, const ProductKeysParams& p, int64_t row, int64_t i, int64_t j) {
  f.column[i] = j;
  if (j == p.candidates) {
    f.sum[i] = -infinity<R>();
    return;
  }
  const int64_t at = row * p.candidates;
  const R a = static_cast<const R*>(p.scores[0])[at + i], b = static_cast<const R*>(p.scores[1])[at + j];
  const R sum = a + b, rest = sum - a;
  const bool finite = sum - sum == R(0);
  // What rounding took from the sum, exactly (Knuth's two-sum).
  f.error[i] = finite ? (a - (sum - rest)) + (b - rest) : R(0);
  f.sum[i] = sum == sum ? sum : infinity<R>();
  f.slot[i] = int64_t(uint64_t(p.indices[0][at + i]) * uint64_t(p.side) + uint64_t(p.indices[1][at + j]));
}

template <class R>
void merge_row(const ProductKeysParams& p, const Fronts<R>& f, int64_t row) {
  constexpr int L = kLanes<R>;
  for (int64_t i = 0; i < Fronts<R>::padded(p.candidates); i++) f.sum[i] = -infinity<R>();
  int64_t rows = 1;  // in play
  set_front(f, p, row, 0, 0);
  for (int64_t pick = 0; pick < p.picks; pick++) {
    Vec<R> top = load(f.sum);
    for (int64_t i = L; i < rows; i += L) {
      const Vec<R> here = load(f.sum + i);
      top = here > top ? here : top;
    }
    const R largest = max_lanes<R>(top);
    int64_t best = -1;
    for (int64_t first = 0; first < rows; first += L) {
      for (uint64_t bits = equal_bits<R>(load(f.sum + first), splat(largest)); bits != 0; bits &= bits - 1) {
        const int64_t i = first + __builtin_ctzll(bits);
        if (i >= rows || f.column[i] == p.candidates) continue;
        if (best < 0 || f.error[i] > f.error[best] || (f.error[i] == f.error[best] && f.slot[i] < f.slot[best]))
          best = i;
      }
    }
    const int64_t at = row * p.picks + pick, column = f.column[best];
    p.slots[at] = f.slot[best];
    p.ranks[0][at] = best;
    p.ranks[1][at] = column;
    set_front(f, p, row, best, column + 1);
    if (best == rows - 1 && rows < p.candidates) set_front(f, p, row, rows++, 0);
  }
}

template <class R>
void merge_task(void* context, int64_t task) {
  const ProductKeysParams& p = *static_cast<const ProductKeysParams*>(context);
  const Fronts<R> fronts(p.candidates, scratch(0, Fronts<R>::bytes(p.candidates)));
  const int64_t begin = task * kRowsPerTask, end = begin + kRowsPerTask < p.rows ? begin + kRowsPerTask : p.rows;
  for (int64_t row = begin; row < end; row++) merge_row<R>(p, fronts, row);
}

}  // namespace

void product_keys(const ProductKeysParams& p) {
  if (p.picks == 0) return;
  parallel_tasks((p.rows + kRowsPerTask - 1) / kRowsPerTask, p.rows * p.picks < kSerialPicks,
                 p.dtype == DType::kFloat64 ? merge_task<double> : merge_task<float>,
                 const_cast<ProductKeysParams*>(&p));
}

}  // namespace attnfast::ATTNFAST_ISA
