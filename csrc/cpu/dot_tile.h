// What the passes after the forward share: a loaded query panel, and the probabilities of a tile recomputed from lse.
#pragma once

#include "score_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// softcap * tanh(s / softcap) in base 2, from raw products. `slope`, if given, receives the derivative 1 - tanh^2.
template <class R>
void apply_softcap(const DotAttentionParams& p, R* scores, int nk, int vectors, R* slope) {
  R cap = R(p.softcap * kLog2e), inverse = R(score_scale(p.scale).score / (p.softcap * kLog2e));
  for (int k = 0; k < nk; k++)
    for (int j = 0; j < vectors; j++) {
      int64_t i = k * kPanel<R> + j * kLanes<R>;
      Vec<R> t = tanhv(load(scores + i) * inverse);
      store(scores + i, t * cap);
      if (slope) store(slope + i, R(1) - t * t);
    }
}

// One panel of queries, packed for the score products.
template <class R>
struct QueryPanel {
  int64_t q0;
  int nq;
  const R* packed;     // Q^T [D][panel], times ScoreScale::query
  const R* minus_lse;  // [panel]; -inf where the row sees nothing
  const R* minus_log;  // null, or what is to be added to minus_lse (see split_huge_lse)
};

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
template <class R>
bool split_huge_lse(const HeadContext& c, int64_t q0, int nq, const R* packed, R* minus_lse, R* minus_log, R* keys_copy,
                    R* P, ScoreScratch<R>& scratch) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  bool huge = false;
  for (int q = 0; q < nq; q++) {
    R size = minus_lse[q] < R(0) ? -minus_lse[q] : minus_lse[q];
    huge |= size > R(0x1p20) && size != infinity<R>();
  }
  if (!huge) return false;
  SoftmaxState<R> state[W];
  for (int q = 0; q < W; q++) state[q] = {-infinity<R>(), R(0)};
  bool capped = c.p->softcap > 0;
  R factor = capped ? R(1) : R(score_scale(c.p->scale).score);
  for (int64_t k0 = 0; k0 < c.s.keys; k0 += kKeyTile) {
    int nk = int(c.s.keys - k0 < kKeyTile ? c.s.keys - k0 : kKeyTile), vectors = (nq + N - 1) / N;
    ScoreTile<R> tile;
    if (!prepare_tile<R>(c, q0, nq, k0, nk, scratch, tile)) continue;
    Rows<R> keys = get_rows<R>(c.p->key, c.key_offset(c.p->key, k0), nk, c.p->head_size, false, keys_copy);
    raw_scores<R>(keys, c.p->head_size, packed, P, nk, vectors, tile.bands_or_null());
    if (capped) apply_softcap<R>(*c.p, P, nk, vectors, nullptr);
    for (int k = 0; k < nk; k++)
      for (int j = 0; j < vectors; j++) {
        Vec<R> x = tile.modify(load(P + k * W + N * j) * factor, k, j);
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

// P[key][query] = exp(score - lse) of one tile, before dropout; exactly 0 where masked.
// With a soft cap, `slope` receives the derivative of the cap.
template <class R>
__attribute__((noinline)) void probability_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<R> keys,
                                                const QueryPanel<R>& panel, R* P, R* slope) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  const R* table = exp2_table<R>();
  if (c.p->softcap > 0) {
    raw_scores<R>(keys, c.p->head_size, panel.packed, P, tile.nk, vectors, tile.bands_or_null());
    apply_softcap<R>(*c.p, P, tile.nk, vectors, slope);
    for (int k = 0; k < tile.nk; k++)
      for (int j = 0; j < vectors; j++) {
        Vec<R> x = load(P + k * W + N * j) + load(panel.minus_lse + N * j);
        x = tile.modify(x, k, j);
        if (panel.minus_log) x += load(panel.minus_log + N * j);
        store(P + k * W + N * j, exp2v<R>(x, table));
      }
    return;
  }
  bool plain = tile.plain();
  R factor = R(score_scale(c.p->scale).score);
  // lse is subtracted at the end, not put into the accumulators first: it is larger than most scores, and every one of
  // the D additions would be rounded at its size.
  score_product<R>(keys, c.p->head_size, panel.packed, nullptr, P, tile.nk, vectors, tile.bands_or_null(), R(0),
                   [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                     constexpr int M = decltype(m)::value;
                     Vec<R> shift = load(panel.minus_lse + N * j);
                     ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = x[i] * factor + shift;
                     if (!plain) {
                       ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = tile.modify(x[i], r + i, j);
                     }
                     if (__builtin_expect(panel.minus_log != nullptr, 0)) {
                       ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] += load(panel.minus_log + N * j);
                     }
                     ATTNFAST_UNROLL for (int i = 0; i < M; i++) store(P + (r + i) * W + N * j, exp2v<R>(x[i], table));
                   });
}

// P[key][query] = softmax over the keys of a tile that holds all keys: what probability_tile gives with the lse of the
// forward, without needing it.
template <class R>
__attribute__((noinline)) void softmax_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<R> keys,
                                            const QueryPanel<R>& panel, R* P) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  R factor = R(score_scale(c.p->scale).score);
  bool plain = tile.plain();
  raw_scores<R>(keys, c.p->head_size, panel.packed, P, tile.nk, vectors, tile.bands_or_null());
  for (int j = 0; j < vectors; j++) {
    Vec<R> maximum = splat(-infinity<R>()), sum{};
    for (int k = 0; k < tile.nk; k++) {
      Vec<R> x = load(P + k * W + N * j) * factor;
      if (!plain) x = tile.modify(x, k, j);
      maximum = x > maximum ? x : maximum;
    }
    Vec<R> base = maximum == -infinity<R>() ? Vec<R>{} : maximum;
    for (int k = 0; k < tile.nk; k++) {
      Vec<R> x = load(P + k * W + N * j) * factor - base;
      Vec<R> e = exp2v<R>(plain ? x : tile.modify(x, k, j));
      sum += e;
      store(P + k * W + N * j, e);
    }
    Vec<R> inverse = sum == R(0) ? Vec<R>{} : R(1) / sum;
    for (int k = 0; k < tile.nk; k++) store(P + k * W + N * j, load(P + k * W + N * j) * inverse);
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
