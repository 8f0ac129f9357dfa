// Attention weights on request, as a second pass over the scores with the finished lse: the full matrix, or only its
// column sums (coverage losses) or row maxima, which never hold more than a tile.
#pragma once

#include "softmax_rows.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kTilesPerTask = 4;  // key tiles of one column-sum task

// Source: what forms the probabilities of a core. Source(p, base) with base holding Source::size(p) Rs;
// load_panel(c, q0, nq, scratch) begins a panel; probabilities(c, tile, P) fills P of one of its tiles.
template <class Source>
struct WeightsPass {
  const typename Source::Params* p;
  int64_t panels, tile_groups;
};

template <class R>
struct WeightsScratch {
  R *P, *keep, *out, *transposed, *maximum, *sums, *score, *source;
  int64_t* index;
  static int64_t size(int64_t source_size) {
    int64_t W = kPanel<R>, T = kKeyTile;
    return W + 3 * T * W + W * T + T * kTilesPerTask + ScoreScratch<R>::size() +
           W * int64_t(sizeof(int64_t) / sizeof(R)) + source_size;
  }
  explicit WeightsScratch(R* base) {
    int64_t W = kPanel<R>, T = kKeyTile;
    index = reinterpret_cast<int64_t*>(base);
    maximum = base + W * int64_t(sizeof(int64_t) / sizeof(R));
    P = maximum + W;
    keep = P + T * W;
    transposed = keep + T * W;
    out = transposed + T * W;
    sums = out + W * T;
    score = sums + T * kTilesPerTask;
    source = score + ScoreScratch<R>::size();
  }
};

// Calls use(tile) with the applied weights of every visible tile of a panel in [k_begin, k_end) in scratch.P.
template <class Source, class R, class Use>
void for_weight_tiles(const HeadContext& c, const WeightsScratch<R>& s, int64_t q0, int nq, int64_t k_begin,
                      int64_t k_end, Use use) {
  const auto& p = static_cast<const typename Source::Params&>(*c.p);
  auto [begin, end] = seen_by_rows(c, q0, nq);
  begin = begin / kKeyTile * kKeyTile > k_begin ? begin / kKeyTile * kKeyTile : k_begin;
  end = end < k_end ? end : k_end;
  if (begin >= end) return;
  ScoreScratch<R> score_scratch(s.score);
  Source source(p, s.source);
  source.load_panel(c, q0, nq, score_scratch);
  for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
    int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
    ScoreTile<R> tile;
    if (!prepare_tile<R>(c, q0, nq, k0, nk, score_scratch, tile)) continue;
    source.probabilities(c, tile, s.P);
    if (has_factor(p)) {
      factor_tile<R>(c, tile, s.keep);
      multiply_tile<R>(tile, s.P, s.keep);
    }
    use(tile);
  }
}

// Token offset of a weights row or column inside the tensor.
template <class R>
int64_t weights_offset(const HeadContext& c, int64_t q, int64_t k) {
  return offset4(c.p->weights, c.s.tensor_batch, c.h, c.s.query_begin + q, c.s.key_begin + k);
}

template <class Source>
void full_task(const WeightsPass<Source>& f, int64_t task) {
  using R = typename Source::Real;
  constexpr int W = kPanel<R>;
  const auto& p = *f.p;
  int64_t head = task / f.panels, q0 = task % f.panels * W;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  int64_t rows = c.s.query_rows - q0 < W ? c.s.query_rows - q0 : W;
  if (rows <= 0) return;
  for (int64_t q = 0; q < rows; q++)  // packed input: zero outside the sequence's own keys too
    store_zero_row<R>(p.weights, offset4(p.weights, c.s.tensor_batch, c.h, c.s.query_begin + q0 + q, 0), p.key_tokens);
  int64_t valid = c.s.queries - q0 < rows ? c.s.queries - q0 : rows;
  if (valid <= 0) return;
  WeightsScratch<R> s(static_cast<R*>(scratch(0, WeightsScratch<R>::size(Source::size(p)) * sizeof(R))));
  for_weight_tiles<Source>(c, s, q0, int(valid), 0, c.s.keys, [&](const ScoreTile<R>& tile) {
    tile_to_rows<R>(s.P, tile.nq, tile.nk, s.transposed, s.out);
    for (int q = 0; q < tile.nq; q++)
      store_row<R>(p.weights, weights_offset<R>(c, q0 + q, tile.k0), tile.nk, s.out + q * kKeyTile, R(1));
  });
}

template <class Source>
void column_sum_task(const WeightsPass<Source>& f, int64_t task) {
  using R = typename Source::Real;
  constexpr int W = kPanel<R>, N = kLanes<R>;
  const auto& p = *f.p;
  int64_t head = task / f.tile_groups, k0 = task % f.tile_groups * kTilesPerTask * kKeyTile;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  int64_t columns = (p.cu_seqlens_q ? c.s.keys : p.key_tokens) - k0;
  if (columns > kTilesPerTask * kKeyTile) columns = kTilesPerTask * kKeyTile;
  if (columns <= 0) return;
  WeightsScratch<R> s(static_cast<R*>(scratch(0, WeightsScratch<R>::size(Source::size(p)) * sizeof(R))));
  for (int64_t k = 0; k < columns; k++) s.sums[k] = R(0);
  int64_t k_end = k0 + columns < c.s.keys ? k0 + columns : c.s.keys;
  for (int64_t q0 = 0; q0 < c.s.queries; q0 += W) {
    int nq = int(c.s.queries - q0 < W ? c.s.queries - q0 : W);
    for_weight_tiles<Source>(c, s, q0, nq, k0, k_end, [&](const ScoreTile<R>& tile) {
      for (int k = 0; k < tile.nk; k++) {
        Vec<R> sum{};
        R tail = 0;
        int q = 0;
        for (; q + N <= tile.nq; q += N) sum += load(s.P + k * W + q);
        for (; q < tile.nq; q++) tail += s.P[k * W + q];
        s.sums[tile.k0 - k0 + k] += sum_lanes<R>(sum) + tail;
      }
    });
  }
  store_row<R>(p.weights, weights_offset<R>(c, 0, k0) - c.s.query_begin * p.weights.stride[2], columns, s.sums, R(1));
}

template <class Source>
void row_max_task(const WeightsPass<Source>& f, int64_t task) {
  using R = typename Source::Real;
  constexpr int W = kPanel<R>;
  const auto& p = *f.p;
  int64_t head = task / f.panels, q0 = task % f.panels * W;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  int64_t rows = c.s.query_rows - q0 < W ? c.s.query_rows - q0 : W;
  if (rows <= 0) return;
  WeightsScratch<R> s(static_cast<R*>(scratch(0, WeightsScratch<R>::size(Source::size(p)) * sizeof(R))));
  for (int q = 0; q < W; q++) {
    s.maximum[q] = R(0);
    s.index[q] = -1;
  }
  int64_t valid = c.s.queries - q0 < rows ? c.s.queries - q0 : rows;
  if (valid > 0)
    for_weight_tiles<Source>(c, s, q0, int(valid), 0, c.s.keys, [&](const ScoreTile<R>& tile) {
      for (int q = 0; q < tile.nq; q++)
        for (int k = 0; k < tile.nk; k++) {
          R x = s.P[k * W + q];
          bool larger = s.index[q] < 0 || x > s.maximum[q] || (x != x && s.maximum[q] == s.maximum[q]);
          if (!larger || !tile.visible(q, k)) continue;
          s.maximum[q] = x;
          s.index[q] = c.s.key_begin + tile.k0 + k;
        }
    });
  for (int64_t q = 0; q < rows; q++) {
    int64_t offset = offset4(p.weights, c.s.tensor_batch, c.h, c.s.query_begin + q0 + q, 0);
    store_row<R>(p.weights, offset, 1, s.maximum + q, R(1));
    p.weights_index[c.row(q0 + q)] = s.index[q];
  }
}

// `cost`: the work of one score, in multiply-adds.
template <class Source>
void weights_pass(const typename Source::Params& p, double cost, double serial_work) {
  using R = typename Source::Real;

  int64_t queries = p.query_tokens, keys = p.key_tokens;  // packed: an upper bound; tasks past the end return at once
  WeightsPass<Source> f{&p, (queries + kPanel<R> - 1) / kPanel<R>,
                        (keys + kTilesPerTask * kKeyTile - 1) / (kTilesPerTask * kKeyTile)};
  int64_t heads = p.batch * p.heads;
  bool serial = double(heads) * double(queries) * double(keys) * cost < serial_work;
  bool columns = p.weights_mode == WeightsMode::kColumnSum;
  void (*task)(void*, int64_t) =
      columns ? [](void* x, int64_t i) { column_sum_task(*static_cast<WeightsPass<Source>*>(x), i); }
      : p.weights_mode == WeightsMode::kFull
          ? [](void* x, int64_t i) { full_task(*static_cast<WeightsPass<Source>*>(x), i); }
          : [](void* x, int64_t i) { row_max_task(*static_cast<WeightsPass<Source>*>(x), i); };
  parallel_tasks(heads * (columns ? f.tile_groups : f.panels), serial, task, &f);
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
