// Weighted sums of table rows: out[b] = sum_j weights[b, j] * values[indices[b, j]]. The rows lie anywhere in memory,
// so the work is waiting for them: a block of columns of the sum stays in registers, its rows are added one after the
// other, and the row kGatherAhead picks later is prefetched meanwhile. Each output row belongs to one task and is
// summed in the order of its picks.
#include "gather_rows.h"
#include "parallel.h"
#include "weighted_gather.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockVectors = 16;  // of 32 registers
#else
constexpr int kBlockVectors = 8;  // of 16
#endif

struct Gather {
  const WeightedGatherParams* p;
  int64_t share;  // outputs of one task
};

template <class R>
ATTNFAST_INLINE void store_sum(const WeightedGatherParams& p, int64_t at, Vec<R> sum, int count) {
  visit_dtype<R>(p.out_dtype, [&](auto tag) ATTNFAST_LAMBDA {
    using O = decltype(tag);
    if constexpr (!std::is_same_v<O, bool> && (std::is_same_v<R, O> || std::is_same_v<R, float>) &&
                  !(std::is_same_v<R, float> && std::is_same_v<O, double>)) {
      O* out = static_cast<O*>(p.out) + at;
      if (count == kLanes<R>) return store_as(out, sum);
      alignas(64) O part[kLanes<R>];
      store_as(part, sum);
      for (int i = 0; i < count; i++) out[i] = part[i];
    }
  });
}

// Columns [first, first + columns) of output b, `columns` filling NV vectors, the last of them perhaps in part.
template <class R, class T, int NV>
ATTNFAST_INLINE void gather_block(const WeightedGatherParams& p, int64_t b, int64_t first, int64_t columns, T* packed) {
  constexpr int L = kLanes<R>;
  const int rest = int(columns - (NV - 1) * L);  // of the last vector
  const int64_t begin = b * p.picks;
  const int64_t next_first = first + columns;  // the block after this one, of this output or the next
  const int64_t next_columns = p.value_size - next_first < columns ? p.value_size - next_first : columns;
  Vec<R> sum[NV];
  ATTNFAST_UNROLL for (int i = 0; i < NV; i++) sum[i] = zero<R>();
  for (int64_t j = 0; j < p.picks; j++) {
    const int64_t ahead = j + kGatherAhead;
    if (ahead < p.picks)
      prefetch_row<T>(p, read_index(p.indices + begin + ahead), first, columns);
    else if (next_columns > 0 && ahead - p.picks < p.picks)
      prefetch_row<T>(p, read_index(p.indices + begin + ahead - p.picks), next_first, next_columns);
    else if (next_columns == 0 && begin + ahead < p.outputs * p.picks)
      prefetch_row<T>(p, read_index(p.indices + begin + ahead), 0, columns);
    const int64_t slot = read_index(p.indices + begin + j);
    if (!check_slot(p, slot, begin + j)) continue;
    R weight = static_cast<const R*>(p.weights)[begin + j];
    if constexpr (std::is_same_v<T, int8_t>) weight *= p.scales[slot];
    const T* row = table_row<T>(p, slot, first, columns, packed);
    ATTNFAST_UNROLL for (int i = 0; i < NV - 1; i++) sum[i] += load_as<R>(row + i * L) * weight;
    const T* last = row + (NV - 1) * L;
    sum[NV - 1] += (rest == L ? load_as<R>(last) : load_partial<R>(last, rest)) * weight;
  }
  const int64_t at = b * p.value_size + first;
  ATTNFAST_UNROLL for (int i = 0; i < NV; i++) store_sum<R>(p, at + i * L, sum[i], i < NV - 1 ? L : rest);
}

// The columns from `first` on, as long as they fill blocks of NV vectors; then smaller blocks.
template <class R, class T, int NV>
ATTNFAST_INLINE void gather_blocks(const WeightedGatherParams& p, int64_t b, int64_t first, T* packed) {
  constexpr int L = kLanes<R>;
  for (; p.value_size - first > (NV - 1) * L; first += NV * L) {
    const int64_t left = p.value_size - first;
    gather_block<R, T, NV>(p, b, first, left < NV * L ? left : NV * L, packed);
  }
  if constexpr (NV > 1) {
    if (first < p.value_size) gather_blocks<R, T, NV / 2>(p, b, first, packed);
  }
}

template <class R, class T>
void gather_task(void* context, int64_t task) {
  const Gather& g = *static_cast<const Gather*>(context);
  const WeightedGatherParams& p = *g.p;
  const int64_t begin = task * g.share, end = begin + g.share < p.outputs ? begin + g.share : p.outputs;
  alignas(64) T packed[kBlockVectors * kLanes<R>];
  for (int64_t b = begin; b < end; b++) gather_blocks<R, T, kBlockVectors>(p, b, 0, packed);
}

template <class R>
void gather(const WeightedGatherParams& p) {
  Gather g{&p, p.picks > 0 && p.picks < kPicksPerTask ? kPicksPerTask / p.picks : 1};
  const bool serial = double(p.outputs) * double(p.picks + 1) * double(p.value_size) < kSerialElements;
  visit_table<R>(p.values_dtype, [&](auto tag) {
    parallel_tasks((p.outputs + g.share - 1) / g.share, serial, gather_task<R, decltype(tag)>, &g);
  });
}

}  // namespace

void weighted_gather_fwd(const WeightedGatherParams& p) {
  if (p.values_dtype == DType::kFloat64)
    gather<double>(p);
  else
    gather<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
