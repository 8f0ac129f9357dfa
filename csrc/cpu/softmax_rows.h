// From the raw scores of a tile to probabilities, and from tiles to finished rows: soft cap, online softmax, the state
// of a panel of rows, probabilities recomputed from lse. Nothing here knows how a score is formed: a core writes raw
// scores to P[key][query] and says which factor makes base-2 scores of them.
#pragma once

#include "parallel.h"
#include "score_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// softcap * tanh(s / softcap) in base 2, from raw scores of which `factor` makes base-2 scores. `slope`, if given,
// receives the derivative 1 - tanh^2.
template <class R>
void apply_softcap(const AttentionParams& p, double factor, R* scores, int nk, int vectors, R* slope) {
  R cap = R(p.softcap * kLog2e), inverse = R(factor / (p.softcap * kLog2e));
  for (int k = 0; k < nk; k++)
    for (int j = 0; j < vectors; j++) {
      int64_t i = k * kPanel<R> + j * kLanes<R>;
      Vec<R> t = tanhv(load(scores + i) * inverse);
      store(scores + i, t * cap);
      if (slope) store(slope + i, R(1) - t * t);
    }
}

template <class R>
struct PanelState {
  alignas(64) R minus_max[kPanel<R>];
  alignas(64) R sum[kPanel<R>];  // 0: nothing visible yet
  bool lazy;                     // every row has seen a key: the lazy maximum may be used
};

// Scores beyond this are rounded before the maximum is taken off, so that the largest gives exactly 0. Below it,
// product and difference are rounded once, which is more exact; but what rounding takes off a huge score exceeds any
// exponent.
constexpr double kHugeScore = 0x1p20;
template <class R>
static inline bool any_huge(const R* row, int count) {
  bool huge = false;
  for (int i = 0; i < count; i++) {
    R size = row[i] < R(0) ? -row[i] : row[i];
    huge |= size > R(kHugeScore) && size != infinity<R>();
  }
  return huge;
}

// P[key] = exp2(score - base) for a vector of queries and the keys [first, last), the scores being P times
// `multiplier`, modified; their sums.
template <class R>
ATTNFAST_INLINE Vec<R> exponentials(const ScoreTile<R>& tile, R multiplier, Vec<R> base, int j, int first, int last,
                                    R* P) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  bool plain = tile.plain();
  alignas(64) R bases[N];
  store(bases, base);
  Vec<R> sum{};
  if (__builtin_expect(any_huge<R>(bases, N), 0)) {
    for (int k = first; k < last; k++) {
      Vec<R> x = tile.modify(rounded<R>(load(P + k * W + N * j) * multiplier), k, j);
      Vec<R> e = exp2v<R>(x - base);
      sum += e;
      store(P + k * W + N * j, e);
    }
    return sum;
  }
  for (int k = first; k < last; k++) {
    // Scaled and shifted in one rounding, before anything is added: exact where it matters, near the maximum.
    Vec<R> x = load(P + k * W + N * j) * multiplier - base;
    Vec<R> e = exp2v<R>(plain ? x : tile.modify(x, k, j));
    sum += e;
    store(P + k * W + N * j, e);
  }
  return sum;
}

// One step of the online softmax: `P` holds the raw scores of a tile, of which `factor` makes base-2 scores, and
// receives their exponentials against the true maximum of what was seen; the running output is rescaled where that
// grew.
template <class R>
__attribute__((noinline)) void softmax_step(const HeadContext& c, const ScoreTile<R>& tile, double factor, R* P, R* out,
                                            int64_t value_pad, PanelState<R>& state) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  bool capped = c.p->softcap > 0, plain = tile.plain();
  if (capped) apply_softcap<R>(*c.p, factor, P, tile.nk, vectors, nullptr);
  R multiplier = capped ? R(1) : R(factor);
  state.lazy = true;
  for (int j = 0; j < vectors; j++) {
    Vec<R> old_sum = load(state.sum + N * j);
    Vec<R> old = old_sum == R(0) ? splat(-infinity<R>()) : -load(state.minus_max + N * j), maximum = old;
    int first, last;
    keys_of_vector<R>(c, tile, j, first, last);
    for (int k = first; k < last; k++) {
      Vec<R> x = rounded<R>(load(P + k * W + N * j) * multiplier);
      if (!plain) x = tile.modify(x, k, j);
      maximum = x > maximum ? x : maximum;
    }
    Vec<R> base = maximum == -infinity<R>() ? Vec<R>{} : maximum;
    Vec<R> sum = exponentials<R>(tile, multiplier, base, j, first, last, P);
    clear_other_keys<R>(tile, j, first, last, P);
    Vec<R> rescale = exp2v<R>(old - base);
    sum += old_sum == R(0) ? Vec<R>{} : old_sum * rescale;
    store(state.minus_max + N * j, -base);
    store(state.sum + N * j, sum);
    for (int i = 0; i < N; i++) {
      int q = N * j + i;
      if (q >= tile.nq) break;
      if (sum[i] == R(0)) state.lazy = false;
      if (old_sum[i] != R(0) && rescale[i] != R(1))
        for (int64_t d = 0; d < value_pad; d += N)
          store(out + q * value_pad + d, load(out + q * value_pad + d) * rescale[i]);
    }
  }
}

// Where the unfinished rows of a call go whose keys are split: [splits][rows].
template <class R>
struct RowPartials {
  int64_t splits, rows_total, value_pad;
  R *partial_out, *partial_max, *partial_sum;  // only if splits > 1
};

// Rows [q0, q0 + nq) of one panel are finished: write them, or hand them to the merge.
template <class R>
void finish_panel(const RowPartials<R>& f, const HeadContext& c, int64_t q0, int nq, int64_t split, const R* out,
                  const PanelState<R>& state) {
  const AttentionParams& p = *c.p;
  for (int q = 0; q < nq; q++) {
    int64_t row = c.row(q0 + q);
    if (f.splits > 1) {
      int64_t slot = split * f.rows_total + row;
      f.partial_max[slot] = -state.minus_max[q];
      f.partial_sum[slot] = state.sum[q];
      if (state.sum[q] != R(0))
        for (int64_t d = 0; d < f.value_pad; d += kLanes<R>)
          store(f.partial_out + slot * f.value_pad + d, load(out + q * f.value_pad + d));
      continue;
    }
    R sink = p.sink ? static_cast<const R*>(p.sink)[c.group > 1 ? c.h * c.group + q0 + q : c.h] * R(kLog2e) : R(0);
    SoftmaxResult<R> done = close_row<R>({-state.minus_max[q], state.sum[q]}, p.sink, sink);
    if (p.lse) static_cast<R*>(p.lse)[row] = done.lse;
    if (state.sum[q] == R(0))
      store_zero_row<R>(p.out, c.query_offset(p.out, q0 + q), p.value_size);
    else
      store_row<R>(p.out, c.query_offset(p.out, q0 + q), p.value_size, out + q * f.value_pad, done.output_scale);
  }
}

// Merges the partial states of one row over the splits, in order.
template <class R>
void merge_row(const AttentionParams& p, const RowPartials<R>& f, int64_t group, int64_t row) {
  int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  R maximum = -infinity<R>();
  for (int64_t i = 0; i < f.splits; i++) {
    int64_t slot = i * f.rows_total + row;
    if (f.partial_sum[slot] != R(0) && f.partial_max[slot] > maximum) maximum = f.partial_max[slot];
  }
  R* out = static_cast<R*>(scratch(0, size_t(f.value_pad) * sizeof(R)));
  for (int64_t d = 0; d < f.value_pad; d++) out[d] = R(0);
  R sum = 0;
  for (int64_t i = 0; i < f.splits; i++) {
    int64_t slot = i * f.rows_total + row;
    if (f.partial_sum[slot] == R(0)) continue;
    R w = exp2_real(f.partial_max[slot] - maximum);
    sum += w * f.partial_sum[slot];
    const R* part = f.partial_out + slot * f.value_pad;
    for (int64_t d = 0; d < f.value_pad; d += kLanes<R>) store(out + d, load(out + d) + load(part + d) * w);
  }
  int64_t head = group > 1 ? h * group + q : h;
  R sink = p.sink ? static_cast<const R*>(p.sink)[head] * R(kLog2e) : R(0);
  SoftmaxResult<R> done = close_row<R>({maximum, sum}, p.sink, sink);
  if (p.lse) static_cast<R*>(p.lse)[row] = done.lse;
  int64_t offset = offset4(p.out, b, h, q, 0);
  if (sum == R(0))
    store_zero_row<R>(p.out, offset, p.value_size);
  else
    store_row<R>(p.out, offset, p.value_size, out, done.output_scale);
}

template <class R>
void load_panel_lse(const HeadContext& c, int64_t q0, int nq, R* minus_lse) {
  const R* lse = static_cast<const R*>(c.p->lse) + c.row(q0);
  for (int q = 0; q < kPanel<R>; q++) {
    R x = q < nq ? lse[q] : R(0);
    minus_lse[q] = x == -infinity<R>() ? x : -x;
  }
}

// A row whose biases are all finfo.min has lse = maximum + log2(sum) near -2e38, where the second term is lost. If the
// panel has such a row, both terms of all its rows are formed again, into minus_lse and minus_log; else false.
// raw_scores(tile, P) forms the raw scores of a tile, of which `factor` makes base-2 scores.
template <class R, class RawScores>
bool split_huge_lse(const HeadContext& c, int64_t q0, int nq, double factor, R* minus_lse, R* minus_log, R* P,
                    ScoreScratch<R>& scratch, RawScores raw_scores) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  if (!any_huge<R>(minus_lse, nq)) return false;
  SoftmaxState<R> state[W];
  for (int q = 0; q < W; q++) state[q] = {-infinity<R>(), R(0)};
  bool capped = c.p->softcap > 0;
  R multiplier = capped ? R(1) : R(factor);
  for (int64_t k0 = 0; k0 < c.s.keys; k0 += kKeyTile) {
    int nk = int(c.s.keys - k0 < kKeyTile ? c.s.keys - k0 : kKeyTile), vectors = (nq + N - 1) / N;
    ScoreTile<R> tile;
    if (!prepare_tile<R>(c, q0, nq, k0, nk, scratch, tile)) continue;
    raw_scores(tile, P);
    if (capped) apply_softcap<R>(*c.p, factor, P, nk, vectors, nullptr);
    for (int k = 0; k < nk; k++)
      for (int j = 0; j < vectors; j++) {
        Vec<R> x = tile.modify(rounded<R>(load(P + k * W + N * j) * multiplier), k, j);
        for (int i = 0; i < N && N * j + i < nq; i++) {
          SoftmaxState<R>& s = state[N * j + i];
          if (x[i] > s.maximum) {
            s.sum = s.sum * exp2_real(s.maximum - x[i]) + R(1);
            s.maximum = x[i];
          } else if (x[i] != -infinity<R>()) {
            s.sum += exp2_real(x[i] - s.maximum);
          }
        }
      }
  }
  for (int q = 0; q < nq; q++) {
    bool seen = state[q].sum != R(0);
    minus_lse[q] = seen ? -state[q].maximum : -infinity<R>();
    minus_log[q] = seen ? -log2_real(state[q].sum) : R(0);
    if (c.p->sink && seen) {  // the sink's part of the denominator
      R sink = static_cast<const R*>(c.p->sink)[c.h] * R(kLog2e);
      minus_log[q] = -log2_real(state[q].sum + exp2_real(sink - state[q].maximum));
    }
  }
  for (int q = nq; q < W; q++) minus_log[q] = R(0);
  return true;
}

// P[key][query] = exp(score - lse) of one tile, before dropout, from its raw scores in P; exactly 0 where masked. With
// a soft cap, `slope` receives the derivative of the cap. minus_log: null, or what split_huge_lse found.
template <class R>
__attribute__((noinline)) void finish_probabilities(const HeadContext& c, const ScoreTile<R>& tile, double factor,
                                                    const R* minus_lse, const R* minus_log, R* P, R* slope) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  const R* table = exp2_table<R>();
  bool capped = c.p->softcap > 0;
  if (capped) apply_softcap<R>(*c.p, factor, P, tile.nk, vectors, slope);
  R multiplier = capped ? R(1) : R(factor);
  for (int j = 0; j < vectors; j++) {
    int first, last;
    keys_of_vector<R>(c, tile, j, first, last);
    Vec<R> shift = load(minus_lse + N * j);
    for (int k = first; k < last; k++) {
      Vec<R> x = load(P + k * W + N * j) * multiplier;
      if (minus_log) {  // rounded as in split_huge_lse
        x = tile.modify(rounded<R>(x), k, j) + shift + load(minus_log + N * j);
      } else {
        x = tile.modify(x + shift, k, j);
      }
      store(P + k * W + N * j, exp2v<R>(x, table));
    }
    clear_other_keys<R>(tile, j, first, last, P);
  }
}

template <class R>
void multiply_tile(const ScoreTile<R>& tile, R* x, const R* factor) {
  for_live_vectors(tile, [&](int i) ATTNFAST_LAMBDA { store(x + i, load(x + i) * load(factor + i)); });
}

// rows[query][kKeyTile] = tile[key][query]
template <class R>
void tile_to_rows(const R* tile, int nq, int nk, R* packed, R* rows) {
  constexpr int W = kPanel<R>;
  for (int k = 0; k < nk; k += W) {
    pack_transposed<R>({tile + k * W, W}, nk - k < W ? nk - k : W, nq, packed, R(1));
    for (int q = 0; q < nq; q++)
      for (int i = 0; i < W && k + i < kKeyTile; i += kLanes<R>)
        store(rows + q * kKeyTile + k + i, load(packed + q * W + i));
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
