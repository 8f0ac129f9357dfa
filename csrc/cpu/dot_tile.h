// What the dot core's passes after the forward share: a loaded query panel, and the probabilities of a tile recomputed
// from lse.
#pragma once

#include "softmax_rows.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

static inline const DotAttentionParams& dot_params(const HeadContext& c) {
  return static_cast<const DotAttentionParams&>(*c.p);
}

// Whether the products of a call are those of bfloat16 pairs. One rule for all passes: scores that the backward and the
// weights recompute must be the forward's, bit for bit.
static inline bool uses_pairs(const AttentionParams& p) {
  return ATTNFAST_PAIRS && p.native_bf16 && p.query.dtype == DType::kBFloat16;
}
// f(R{}, T{}) with the type of the sums and that of the operands, T = R or BFloat16 for pairs.
template <class F>
static inline void visit_operands(const AttentionParams& p, F f) {
  if (p.query.dtype == DType::kFloat64) return f(double{}, double{});
#if ATTNFAST_PAIRS
  if (uses_pairs(p)) return f(float{}, BFloat16{});
#endif
  f(float{}, float{});
}

// One panel of queries, packed for the score products.
template <class R, class T>
struct QueryPanel {
  int64_t q0;
  int nq;
  const Packed<T>* packed;  // Q^T [D][panel] (or [D / 2][panel] of pairs), times ScoreScale::query
  const R* minus_lse;       // [panel]; -inf where the row sees nothing
  const R* minus_log;       // null, or what is to be added to minus_lse (see split_huge_lse)
};

template <class R, class T>
bool split_huge_lse(const HeadContext& c, int64_t q0, int nq, const Packed<T>* packed, R* minus_lse, R* minus_log,
                    R* keys_copy, R* P, ScoreScratch<R>& scratch) {
  return split_huge_lse<R>(
      c, q0, nq, score_scale(dot_params(c).scale).score, minus_lse, minus_log, P, scratch,
      [&](const ScoreTile<R>& tile, R* P) {
        const AttentionParams& p = *c.p;
        int vectors = (tile.nq + kLanes<R> - 1) / kLanes<R>;
        Rows<T> keys = operand_rows<T>(p.key, c.key_offset(p.key, tile.k0), tile.nk, p.head_size, keys_copy);
        raw_scores<R, T>(keys, steps_of<T>(p.head_size), packed, P, tile.nk, vectors, tile.bands_or_null());
      });
}

// P[key][query] = exp(score - lse) of one tile, before dropout; exactly 0 where masked.
// With a soft cap, `slope` receives the derivative of the cap.
template <class R, class T>
__attribute__((noinline)) void probability_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<T> keys,
                                                const QueryPanel<R, T>& panel, R* P, R* slope) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  const R* table = exp2_table<R>();
  if (c.p->softcap > 0 || panel.minus_log) {
    raw_scores<R, T>(keys, steps_of<T>(c.p->head_size), panel.packed, P, tile.nk, vectors, tile.bands_or_null());
    finish_probabilities<R>(c, tile, score_scale(dot_params(c).scale).score, panel.minus_lse, panel.minus_log, P,
                            slope);
    return;
  }
  bool plain = tile.plain();
  R factor = R(score_scale(dot_params(c).scale).score);
  // lse is subtracted at the end, not put into the accumulators first: it is larger than most scores, and every one of
  // the D additions would be rounded at its size.
  score_product<R, T>(keys, steps_of<T>(c.p->head_size), panel.packed, nullptr, P, tile.nk, vectors,
                      tile.bands_or_null(), R(0), [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                        constexpr int M = decltype(m)::value;
                        Vec<R> shift = load(panel.minus_lse + N * j);
                        ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = x[i] * factor + shift;
                        if (!plain) {
                          ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = tile.modify(x[i], r + i, j);
                        }
                        exp2_block<R, M>(x, table);
                        ATTNFAST_UNROLL for (int i = 0; i < M; i++) store(P + (r + i) * W + N * j, x[i]);
                      });
}

// P[key][query] = softmax over the keys of a tile that holds all keys: what probability_tile gives with the lse of the
// forward, without needing it.
template <class R, class T>
__attribute__((noinline)) void softmax_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<T> keys,
                                            const QueryPanel<R, T>& panel, R* P) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  R factor = R(score_scale(dot_params(c).scale).score);
  bool plain = tile.plain();
  raw_scores<R, T>(keys, steps_of<T>(c.p->head_size), panel.packed, P, tile.nk, vectors, tile.bands_or_null());
  for (int j = 0; j < vectors; j++) {
    Vec<R> maximum = splat(-infinity<R>());
    for (int k = 0; k < tile.nk; k++) {
      Vec<R> x = rounded<R>(load(P + k * W + N * j) * factor);
      if (!plain) x = tile.modify(x, k, j);
      maximum = x > maximum ? x : maximum;
    }
    Vec<R> base = maximum == -infinity<R>() ? Vec<R>{} : maximum;
    Vec<R> sum = exponentials<R>(tile, factor, base, j, 0, tile.nk, P);
    Vec<R> inverse = sum == R(0) ? Vec<R>{} : R(1) / sum;
    for (int k = 0; k < tile.nk; k++) store(P + k * W + N * j, load(P + k * W + N * j) * inverse);
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
