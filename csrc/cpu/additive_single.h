// Scores of the additive core for one query, s = sum_d w_d tanh(a_d + k_d): with no second query to share e^2k with,
// tanh itself, and keys are read once where they lie.
// A call of one query forms every score here, whichever kernel runs: forward, weights and backward must agree to the
// last bit, or scores in the hundreds do not cancel against the log-sum-exp.
#pragma once

#include "decode_rows.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

static inline bool single_query(const AttentionParams& p) { return p.query_tokens == 1 && !p.cu_seqlens_q; }

// Rows that are wanted soon: they are fetched while the arithmetic of the tangents runs, a line for each vector.
template <int COUNT>
struct Soon {
  const char* rows[COUNT > 0 ? COUNT : 1];
  int64_t stride[COUNT > 0 ? COUNT : 1];  // bytes

  template <class T>
  void set(int i, const T* first, int64_t elements) {
    rows[i] = reinterpret_cast<const char*>(first);
    stride[i] = elements * int64_t(sizeof(T));
  }
};

// Lanes whose sum is the score of a key. A fresh sum for every few vectors: one chain of additions over all of them
// would cost digits. KEEP: tanhs[padded D] receives the hyperbolic tangents.
template <bool KEEP, int SOON, class R, class T>
ATTNFAST_INLINE Vec<R> single_score_lanes(const T* key, const R* query, const R* weight, Extent<R> depth, R* tanhs,
                                          const Soon<SOON>& soon, int64_t index) {
  constexpr int64_t N = kLanes<R>, kSumDims = 16 * N;
  Vec<R> total{};
  auto term = [&](Vec<R> k, int64_t d) ATTNFAST_LAMBDA {
    Vec<R> t = tanh_quotient(load(query + d) + k);
    if constexpr (KEEP) store(tanhs + d, t);
    ATTNFAST_UNROLL for (int i = 0; i < SOON; i++)
        __builtin_prefetch(soon.rows[i] + index * soon.stride[i] + d * int64_t(sizeof(T)), 0, 2);
    return load(weight + d) * t;
  };
  for (int64_t d = 0; d < depth.whole;) {
    int64_t end = d + kSumDims < depth.whole ? d + kSumDims : depth.whole;
    Vec<R> even{}, odd{};
    for (; d + 2 * N <= end; d += 2 * N) {
      even += term(load_as<R>(key + d), d);
      odd += term(load_as<R>(key + d + N), d + N);
    }
    if (d < end) {
      even += term(load_as<R>(key + d), d);
      d += N;
    }
    total += even + odd;
  }
  if (depth.rest) total += term(load_partial<R>(key + depth.whole, depth.rest), depth.whole);
  return total;
}

// scores[i] of n keys, in whole vectors; KEEP: the tangents of key i at tanhs + i * tanh_stride. add: null, or the keys
// with -inf there are not read and get 0.
template <bool KEEP, int SOON, class R, class T>
__attribute__((noinline)) void single_query_scores(const T* keys, int64_t stride, int n, const R* add, const R* query,
                                                   const R* weight, Extent<R> depth, R* tanhs, int64_t tanh_stride,
                                                   R* scores, const Soon<SOON>& soon) {
  constexpr int N = kLanes<R>;
  for (int i = 0; i < n; i += N) {
    Vec<R> lanes[N] = {};
    for (int r = 0; r < N && i + r < n; r++) {
      if (add && add[i + r] == -infinity<R>()) continue;
      lanes[r] = single_score_lanes<KEEP, SOON, R>(keys + (i + r) * stride, query, weight, depth,
                                                   tanhs + (i + r) * tanh_stride, soon, i + r);
    }
    store(scores + i, sum_of_rows<1, R>(lanes));
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
