// What the passes after the forward share: a loaded query panel, and the probabilities of a tile recomputed from lse.
#pragma once

#include "score_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// softcap * tanh(s / softcap) in base 2. `slope`, if given, receives the derivative 1 - tanh^2.
template <class R>
void apply_softcap(R* scores, int nk, int vectors, double softcap, R* slope) {
  R cap = R(softcap * kLog2e), inverse = R(1) / cap;
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
  const R* packed;     // Q^T [D][panel], times scale * log2(e)
  const R* minus_lse;  // [panel]; -inf where the row sees nothing
};

template <class R>
void load_panel_lse(const HeadContext& c, int64_t q0, int nq, R* minus_lse) {
  const R* lse = static_cast<const R*>(c.p->lse) + c.row(q0);
  for (int q = 0; q < kPanel<R>; q++) {
    R x = q < nq ? lse[q] : R(0);
    minus_lse[q] = x == -infinity<R>() ? x : -x;
  }
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
    apply_softcap<R>(P, tile.nk, vectors, c.p->softcap, slope);
    for (int k = 0; k < tile.nk; k++)
      for (int j = 0; j < vectors; j++) {
        Vec<R> x = load(P + k * W + N * j) + load(panel.minus_lse + N * j);
        store(P + k * W + N * j, exp2v<R>(tile.modify(x, k, j), table));
      }
    return;
  }
  bool plain = !tile.add && !tile.limited;
  // lse is subtracted at the end, not put into the accumulators first: it is larger than most scores, and every one of
  // the D additions would be rounded at its size.
  score_product<R>(keys, c.p->head_size, panel.packed, nullptr, P, tile.nk, vectors, tile.bands_or_null(), R(0),
                   [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                     constexpr int M = decltype(m)::value;
                     Vec<R> shift = load(panel.minus_lse + N * j);
                     ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] += shift;
                     if (!plain) {
                       ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = tile.modify(x[i], r + i, j);
                     }
                     ATTNFAST_UNROLL for (int i = 0; i < M; i++) store(P + (r + i) * W + N * j, exp2v<R>(x[i], table));
                   });
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
