// Backward of the additive core. P and dS = P (dP - delta) of a tile are those of every core; with h = 2 / (1 + A B) -
// 1, which is -tanh,
//   dQ[q] = w sum_k dS (1 - h^2),  dK[k] likewise over q,  dw = -sum dS h,  d score_bias = sum of dQ,
// so the gradient pass needs no weight and no transcendental: dimensions in lanes, four queries to a division. Where
// tanh is +-1, dS - (dS h) h is exactly 0.
//
// A task takes the heads of one key head, all their queries and a range of keys, visits each tile once and forms every
// gradient there. How many ranges there are depends on shapes alone; where there are several, the partial dQ, and for
// every task the partial dw and d score_bias, are added in order at the end.
// The gradient of a bias is added to by these tasks if no other task adds to the same elements; else by a pass of its
// own whose tasks own disjoint parts.
#include "additive_attention.h"
#include "additive_gradient.h"
#include "additive_tile.h"
#include "backward_tile.h"
#include "gemm_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kMinTasks = 16;  // the keys of a head are split until there are this many tasks,
constexpr int kMaxSplits = 8;  // but not further than this: each part holds a dQ
constexpr int kMinSplitTiles = 2;

template <class R>
struct Backward : GradientParts<R> {
  int64_t blocks, tiles, panels;
  bool scores;        // a gradient of query, key, weight or score_bias is wanted
  R* partial_center;  // [splits][rows], for the gradient of the prior's centre; null: not wanted
  int bias;           // bias pass: which one
};

// One panel of queries and what a tile of its gradient needs.
template <class R>
struct GradPanel {
  int64_t q0;
  int nq;
  AdditiveRows<R> queries;
  Rows<R> grad_out;
  R *grad_out_copy, *packed_grad, *minus_lse, *minus_log, *minus_delta;
  R* dims;     // sum over keys of dS (1 - h^2), [D / N][panel + 1][N]
  bool split;  // minus_log counts

  static int64_t floats(const Backward<R>& f) {
    int64_t W = kPanel<R>;
    return AdditiveRows<R>::floats(W, f.depth_pad) + 2 * W * f.value_pad + 3 * W + (W + 1) * f.depth_pad;
  }
  void place(const Backward<R>& f, R* base) {
    int64_t W = kPanel<R>;
    queries.place(base, W, f.depth_pad);
    grad_out_copy = base + AdditiveRows<R>::floats(W, f.depth_pad);
    packed_grad = grad_out_copy + W * f.value_pad;
    minus_lse = packed_grad + W * f.value_pad;
    minus_log = minus_lse + W;
    minus_delta = minus_log + W;
    dims = minus_delta + W;
  }
};

template <class R>
struct BackwardScratch {
  R *panels, *keys, *weights, *values, *P, *S, *keep, *slope, *extra, *clean, *rows, *row, *grad_weight, *score;
  static int64_t size(const Backward<R>& f, int panels) {
    int64_t W = kPanel<R>, T = kKeyTile, larger = T > W ? T : W;
    return panels * GradPanel<R>::floats(f) + AdditiveRows<R>::floats(T, f.depth_pad) +
           AdditiveWeights<R>::floats(f.depth_pad) + T * f.value_pad + 5 * T * W + larger * f.value_pad + W * T +
           3 * f.depth_pad + ScoreScratch<R>::size();
  }
  BackwardScratch(const Backward<R>& f, int count, R* base) {
    int64_t W = kPanel<R>, T = kKeyTile, larger = T > W ? T : W;
    panels = base;
    keys = panels + count * GradPanel<R>::floats(f);
    weights = keys + AdditiveRows<R>::floats(T, f.depth_pad);
    values = weights + AdditiveWeights<R>::floats(f.depth_pad);
    P = values + T * f.value_pad;
    S = P + T * W;
    keep = S + T * W;
    slope = keep + T * W;
    extra = slope + T * W;
    clean = extra + T * W;
    rows = clean + larger * f.value_pad;
    row = rows + W * T;
    grad_weight = row + f.depth_pad;  // dw, then d score_bias
    score = grad_weight + 2 * f.depth_pad;
  }
};

template <class R>
void load_panel(const Backward<R>& f, const HeadContext& c, int64_t q0, int nq, const AdditiveWeights<R>& weights,
                AdditiveRows<R>& keys, const BackwardScratch<R>& s, GradPanel<R>& panel) {
  constexpr int W = kPanel<R>;
  const AdditiveAttentionParams& p = *f.p;
  panel.q0 = q0;
  panel.nq = nq;
  load_additive_rows<R>(p.query, c.query_offset(p.query, q0), nq, p.head_size,
                        weights.has_bias ? weights.bias : nullptr, panel.queries);
  panel.grad_out = get_rows<R>(p.grad_out, c.query_offset(p.grad_out, q0), nq, p.value_size, true, panel.grad_out_copy);
  pack_transposed<R>(panel.grad_out, nq, p.value_size, panel.packed_grad, R(1), panel_stride<R>(nq));
  load_panel_lse<R>(c, q0, nq, panel.minus_lse);
  ScoreScratch<R> score_scratch(s.score);
  panel.split = split_huge_lse<R>(
      c, q0, nq, kLog2e, panel.minus_lse, panel.minus_log, s.P, score_scratch, [&](const ScoreTile<R>& tile, R* P) {
        load_additive_rows<R>(p.key, c.key_offset(p.key, tile.k0), tile.nk, p.head_size, nullptr, keys);
        additive_scores<R>(weights, panel.queries, keys, f.depth_pad, tile, 0, true, P);
      });
  const R* delta = static_cast<const R*>(p.delta) + c.row(q0);
  for (int q = 0; q < W; q++) panel.minus_delta[q] = q < nq ? -delta[q] : R(0);
}

// S[key][query] = value . dO for a few queries: dimensions in lanes. Both are padded with zeros to whole vectors.
template <class R>
__attribute__((noinline)) void dots_by_dimension(Rows<R> values, Rows<R> grad_out, int64_t value_pad,
                                                 const ScoreTile<R>& tile, R* S) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  for (int k = 0; k < tile.nk; k++) {
    store(S + k * W, Vec<R>{});
    for (int q = 0; q < tile.nq; q++) {
      const R *a = values.data + k * values.stride, *b = grad_out.data + q * grad_out.stride;
      Vec<R> even{}, odd{};
      int64_t d = 0;
      for (; d + 2 * N <= value_pad; d += 2 * N) {
        even += load(a + d) * load(b + d);
        odd += load(a + d + N) * load(b + d + N);
      }
      if (d < value_pad) even += load(a + d) * load(b + d);
      S[k * W + q] = sum_lanes<R>(even + odd);
    }
  }
}

// Fills S with dS and P with the applied probabilities of one tile. through_cap: dS with respect to the score before
// the soft cap, else after it (for a bias, which is added there). Lanes past the last query hold 0.
template <class R>
__attribute__((noinline)) void gradient_tile(const Backward<R>& f, const HeadContext& c, const ScoreTile<R>& tile,
                                             const AdditiveWeights<R>& weights, AdditiveRows<R>& keys, Rows<R> values,
                                             GradPanel<R>& panel, bool through_cap, R* center,
                                             const BackwardScratch<R>& s) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const AdditiveAttentionParams& p = *f.p;
  constexpr int kFill = N > kQueryBlock ? N : kQueryBlock;
  int vectors = (tile.nq + N - 1) / N, filled = (tile.nq + kFill - 1) / kFill * kFill;
  R *P = s.P, *S = s.S;
  additive_scores<R>(weights, panel.queries, keys, f.depth_pad, tile, tile.skip, true, P);
  finish_probabilities<R>(c, tile, kLog2e, panel.minus_lse, panel.split ? panel.minus_log : nullptr, P, s.slope);
  if (dims_in_lanes<R>(tile.nq))
    dots_by_dimension<R>(values, panel.grad_out, f.value_pad, tile, S);
  else
    raw_scores<R>(values, p.value_size, panel.packed_grad, S, tile.nk, vectors, tile.bands_or_null());
  finish_score_gradient<R>(c, tile, panel.minus_delta, through_cap ? s.slope : nullptr, s.rows, s.extra, s.keep, P, S,
                           center);
  for (int k = 0; k < tile.nk; k++)
    for (int q = tile.nq; q < filled; q++) S[k * W + q] = R(0);
}

// ---------------------------------------------------------------- the gradient pass
// One vector of dimensions, Q queries, keys [k0, k1): adds dS (1 - h^2) to dK[key] and dQ[query]; the sum of dS h
// returned.
template <Tier TIER, int Q, class R>
ATTNFAST_INLINE Vec<R> score_gradient(const R* queries, const R* keys, const R* S, int k0, int k1, R* grad_key,
                                      R* grad_query) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  Vec<R> a[Q], gq[Q], gw[Q] = {};
  ATTNFAST_UNROLL for (int i = 0; i < Q; i++) {
    a[i] = load(queries + i * N);
    gq[i] = load(grad_query + i * N);
  }
  if constexpr (!uses_exponentials(TIER)) {
    for (int k = k0; k < k1; k++) {
      Vec<R> b = load(keys + k * N), gk = load(grad_key + k * N);
      ATTNFAST_UNROLL for (int i = 0; i < Q; i++) {
        R ds = S[k * W + i];
        if (ds == R(0)) continue;  // a masked key or query may be NaN
        Vec<R> h, x = a[i] + b;
        if constexpr (TIER == Tier::kNear)
          h = -tanh_near_zero(x);
        else
          h = -tanhv(x);
        Vec<R> t = h * ds, g = ds - t * h;
        gk += g;
        gq[i] += g;
        gw[i] += t;
      }
      store(grad_key + k * N, gk);
    }
  } else {
    for (int k = k0; k < k1; k++) {
      Vec<R> b = load(keys + k * N), gk = load(grad_key + k * N), x[Q], h[Q];
      ATTNFAST_UNROLL for (int i = 0; i < Q; i++) {
        x[i] = a[i] * b + R(1);
        if constexpr (TIER == Tier::kClamped) x[i] = smaller(x[i], splat(kLargestX));
      }
      if constexpr (Q == 4) {
        Vec<R> p = x[0] * x[1], q = x[2] * x[3], r = R(2) / (p * q), u = r * q, v = r * p;
        h[0] = u * x[1] - R(1);
        h[1] = u * x[0] - R(1);
        h[2] = v * x[3] - R(1);
        h[3] = v * x[2] - R(1);
      } else {
        ATTNFAST_UNROLL for (int i = 0; i < Q; i++) h[i] = R(2) / x[i] - R(1);
      }
      ATTNFAST_UNROLL for (int i = 0; i < Q; i++) {
        R ds = S[k * W + i];
        Vec<R> t = h[i] * ds, g = ds - t * h[i];
        gk += g;
        gq[i] += g;
        gw[i] += t;
      }
      store(grad_key + k * N, gk);
    }
  }
  ATTNFAST_UNROLL for (int i = 0; i < Q; i++) store(grad_query + i * N, gq[i]);
  if constexpr (Q == 4)
    return (gw[0] + gw[1]) + (gw[2] + gw[3]);
  else
    return gw[0];
}

// A tile: adds to dK [D / N][kKeySlots][N], dQ [D / N][panel + 1][N] and dw [D].
template <Tier TIER, class R>
__attribute__((noinline)) void score_gradients(const HeadContext& c, const ScoreTile<R>& tile,
                                               const GradPanel<R>& panel, const AdditiveRows<R>& keys,
                                               int64_t depth_pad, const R* S, R* grad_key, R* grad_weight) {
  constexpr int N = kLanes<R>;
  for (int64_t d = 0; d < depth_pad; d += N) {
    const R *a = panel.queries.dims + d * panel.queries.slots, *b = keys.dims + d * kKeySlots + tile.skip * N;
    R *gq = panel.dims + d * panel.queries.slots, *gk = grad_key + d * kKeySlots + tile.skip * N;
    Vec<R> gw{};
    for (int q = 0; q < tile.nq; q += kQueryBlock) {
      int last = q + kQueryBlock < tile.nq ? q + kQueryBlock - 1 : tile.nq - 1;
      int64_t k0 = 0, k1 = tile.nk;
      seen_keys<R>(c, tile, q, last - q + 1, k0, k1);
      if (k0 >= k1) continue;
      if (last == q)
        gw += score_gradient<TIER, 1, R>(a + q * N, b, S + q, int(k0), int(k1), gk, gq + q * N);
      else
        gw += score_gradient<TIER, kQueryBlock, R>(a + q * N, b, S + q, int(k0), int(k1), gk, gq + q * N);
    }
    store(grad_weight + d, load(grad_weight + d) + gw);
  }
}

template <class R>
void add_score_gradients(const Backward<R>& f, const HeadContext& c, const ScoreTile<R>& tile,
                         const AdditiveWeights<R>& weights, const AdditiveRows<R>& keys, const GradPanel<R>& panel,
                         const BackwardScratch<R>& s, R* grad_key) {
  Tier tier = additive_tier<R>(weights, panel.queries, keys);
  if constexpr (std::is_same_v<R, float>) {
    if (tier == Tier::kNear)
      return score_gradients<Tier::kNear, R>(c, tile, panel, keys, f.depth_pad, s.S, grad_key, s.grad_weight);
    if (tier == Tier::kFast)
      return score_gradients<Tier::kFast, R>(c, tile, panel, keys, f.depth_pad, s.S, grad_key, s.grad_weight);
    if (tier == Tier::kClamped)
      return score_gradients<Tier::kClamped, R>(c, tile, panel, keys, f.depth_pad, s.S, grad_key, s.grad_weight);
  }
  score_gradients<Tier::kDirect, R>(c, tile, panel, keys, f.depth_pad, s.S, grad_key, s.grad_weight);
}

// w sum of dS (1 - h^2), from a layout with dimensions in lanes.
template <class R>
ATTNFAST_INLINE Vec<R> finished_gradient(const AdditiveWeights<R>& w, const R* dims, int64_t stride, int64_t d) {
  return load(w.weight + d) * load(dims + d * stride);
}

// Whether the task that forms dS is the only one to touch the elements of bias gradient i.
template <class R>
bool owns_bias(const Backward<R>& f, int i) {
  const AdditiveAttentionParams& p = *f.p;
  BiasOwner owner = bias_owner(p, i);
  return owner.by_keys || (owner.by_queries && (f.splits == 1 || p.grad_bias[i].stride[3] != 0));
}

template <class R>
void gradient_task(const Backward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>, N = kLanes<R>;
  constexpr int64_t kBlock = kPanelsPerBlock * W;
  const AdditiveAttentionParams& p = *f.p;
  int64_t split = task % f.splits, head = task / f.splits, b = head / p.kv_heads, kv = head % p.kv_heads;
  int64_t group = p.heads / p.kv_heads;
  HeadContext first = head_context(p, b, kv * group);
  const Sequence& seq = first.s;
  int64_t key_rows = p.cu_seqlens_q ? seq.keys : p.key_tokens, share = (f.tiles + f.splits - 1) / f.splits * kKeyTile;
  int64_t keys0 = split * share < key_rows ? split * share : key_rows;
  int64_t keys1 = keys0 + share < key_rows ? keys0 + share : key_rows, count = keys1 - keys0;
  int64_t tile_floats = kKeySlots * f.depth_pad, key_floats = (count + kKeyTile - 1) / kKeyTile * tile_floats;

  int panel_count = f.panels < kPanelsPerBlock ? int(f.panels) : kPanelsPerBlock;
  using Scratch = BackwardScratch<R>;
  Scratch s(f, panel_count, static_cast<R*>(scratch(0, Scratch::size(f, panel_count) * sizeof(R))));
  // dV, and dK of one head as score_gradients leaves it; then, of a group of heads, the finished dK
  size_t size = size_t(key_floats + count * f.value_pad);
  size_t grouped = group > 1 ? size_t(count * f.depth_pad) : 0;
  R* key_dims = static_cast<R*>(scratch(2, (size + grouped) * sizeof(R)));
  R *grad_value = key_dims + key_floats, *grad_key = grad_value + count * f.value_pad;
  for (size_t i = 0; i < size; i++) key_dims[i] = R(0);

  AdditiveWeights<R> weights;
  AdditiveRows<R> keys;
  GradPanel<R> panels[kPanelsPerBlock];
  weights.place(s.weights, f.depth_pad);
  keys.place(s.keys, kKeyTile, f.depth_pad);
  for (int i = 0; i < panel_count; i++) panels[i].place(f, s.panels + i * GradPanel<R>::floats(f));
  bool add_bias[2];
  for (int i = 0; i < 2; i++) add_bias[i] = owns_bias(f, i);
  ScoreScratch<R> score_scratch(s.score);
  for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
    HeadContext c = head_context(p, b, h);
    load_additive_weights<R>(p, h, weights);
    for (int64_t i = 0; i < 2 * f.depth_pad; i++) s.grad_weight[i] = R(0);
    if (h > kv * group)
      for (int64_t i = 0; i < key_floats; i++) key_dims[i] = R(0);
    for (int64_t block = 0; block < f.blocks; block++) {
      int64_t q0 = block * kBlock;
      int64_t rows = seq.query_rows - q0 < kBlock ? seq.query_rows - q0 : kBlock;
      if (rows <= 0) break;
      int64_t valid = seq.queries - q0 < rows ? seq.queries - q0 : rows;
      auto [begin, end] = valid > 0 ? visible_keys(c, q0, valid) : KeyRange{0, 0};
      begin = begin < keys0 ? keys0 : begin;
      end = end > keys1 ? keys1 : end;
      if (begin >= end) {  // these keys give the block nothing, and merge_query_task does not ask them
        for (int64_t q = 0; f.splits == 1 && p.grad_query.data && q < rows; q++)
          store_zero_row<R>(p.grad_query, c.query_offset(p.grad_query, q0 + q), p.head_size);
        continue;
      }
      for (int i = 0; f.scores && i * W < rows; i++) {
        int64_t used = (rows - i * W < W ? rows - i * W : W) + kQueryBlock - 1;
        used = used < W ? used * N : W * N;
        for (int64_t d = 0; d < f.depth_pad; d += N)
          for (int64_t x = 0; x < used; x += N) store(panels[i].dims + d * (W + 1) + x, Vec<R>{});
      }
      bool loaded_panels = false;
      for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
        int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
        Rows<R> values{};
        bool loaded = false;
        for (int i = 0; i * W < valid; i++) {
          int nq = int(valid - i * W < W ? valid - i * W : W);
          ScoreTile<R> tile;
          if (!prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile)) continue;
          if (!loaded_panels) {
            bool overwritten = false;  // splitting lse uses the tile's scratch
            for (int j = 0; j * W < valid; j++) {
              load_panel<R>(f, c, q0 + j * W, int(valid - j * W < W ? valid - j * W : W), weights, keys, s, panels[j]);
              overwritten |= panels[j].split;
            }
            loaded_panels = true;
            if (overwritten) prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile);
          }
          if (!loaded) {
            load_additive_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, nullptr, keys);
            values = get_rows<R>(p.value, c.key_offset(p.value, k0), nk, p.value_size, true, s.values);
            loaded = true;
          }
          R* center = f.partial_center ? f.partial_center + split * f.rows_total + c.row(q0 + i * W) : nullptr;
          gradient_tile<R>(f, c, tile, weights, keys, values.from(tile.skip), panels[i], true, center, s);
          for (int n = 0; n < 2; n++)
            if (add_bias[n]) add_bias_gradient<R>(c, p.grad_bias[n], tile, s.S, s.extra);
          int64_t k = k0 - keys0;
          if (p.grad_value.data)
            accumulate_by_key<R>(tile, s.P, panels[i].grad_out, p.value_size,
                                 grad_value + (k + tile.skip) * f.value_pad, f.value_pad, s.clean);
          if (f.scores)
            add_score_gradients<R>(f, c, tile, weights, keys, panels[i], s, key_dims + k / kKeyTile * tile_floats);
        }
      }
      if (!f.scores) continue;
      R* bias_sum = s.grad_weight + f.depth_pad;
      for (int64_t q = 0; q < rows; q++) {
        const GradPanel<R>& panel = panels[q / W];
        R* row = f.splits > 1 ? f.query_part(split, c.row(q0 + q)) : s.row;
        for (int64_t d = 0; d < f.depth_pad; d += N) {
          Vec<R> x = finished_gradient<R>(weights, panel.dims + q % W * N, W + 1, d);
          if (q >= valid) x = Vec<R>{};
          store(row + d, x);
          store(bias_sum + d, load(bias_sum + d) + x);
        }
        if (f.splits == 1 && p.grad_query.data)
          store_row<R>(p.grad_query, c.query_offset(p.grad_query, q0 + q), p.head_size, row, R(1));
      }
    }
    if (!f.scores) continue;
    if (p.grad_key.data) {
      for (int64_t k = 0; k < count; k++) {
        const R* dims = key_dims + k / kKeyTile * tile_floats + k % kKeyTile * N;
        R* row = group > 1 ? grad_key + k * f.depth_pad : s.row;
        for (int64_t d = 0; d < f.depth_pad; d += N) {
          Vec<R> x = finished_gradient<R>(weights, dims, kKeySlots, d);
          store(row + d, h > kv * group ? load(row + d) + x : x);
        }
        if (h == (kv + 1) * group - 1)
          store_row<R>(p.grad_key, first.key_offset(p.grad_key, keys0 + k), p.head_size, row, R(1));
      }
    }
    R* part = f.weight_part(b, h, split);
    for (int64_t i = 0; i < 2 * f.depth_pad; i++) part[i] = s.grad_weight[i];
  }
  if (p.grad_value.data)
    store_rows<R>(p.grad_value, first.key_offset(p.grad_value, keys0), count, p.value_size, grad_value, f.value_pad,
                  R(1));
}

// ---------------------------------------------------------------- the bias pass
template <class R>
void bias_task(const Backward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>;
  const AdditiveAttentionParams& p = *f.p;
  const Tensor4& grad = p.grad_bias[f.bias];
  BiasOwnership o = bias_ownership(p, f.bias, f.panels, f.tiles);
  int64_t unit = task % o.units, slice = task / o.units, own_b = slice / o.heads, own_h = slice % o.heads;
  BackwardScratch<R> s(f, 1, static_cast<R*>(scratch(0, BackwardScratch<R>::size(f, 1) * sizeof(R))));
  ScoreScratch<R> score_scratch(s.score);
  AdditiveWeights<R> weights;
  AdditiveRows<R> keys;
  GradPanel<R> panel;
  weights.place(s.weights, f.depth_pad);
  keys.place(s.keys, kKeyTile, f.depth_pad);
  panel.place(f, s.panels);
  int64_t b1 = o.batches == 1 ? p.batch : own_b + 1, h1 = o.heads == 1 ? p.heads : own_h + 1;
  for (int64_t b = own_b; b < b1; b++)
    for (int64_t h = own_h; h < h1; h++) {
      HeadContext c = head_context(p, b, h);
      load_additive_weights<R>(p, h, weights);
      int64_t panel0 = o.by_row ? unit : 0, panel1 = o.by_row ? unit + 1 : f.panels;
      for (int64_t i = panel0; i < panel1 && i * W < c.s.queries; i++) {
        int64_t q0 = i * W;
        int nq = int(c.s.queries - q0 < W ? c.s.queries - q0 : W);
        auto [begin, end] = visible_keys(c, q0, nq);
        if (o.by_column) {
          begin = begin > unit * kKeyTile ? begin : unit * kKeyTile;
          end = end < (unit + 1) * kKeyTile ? end : (unit + 1) * kKeyTile;
        }
        if (begin >= end) continue;
        load_panel<R>(f, c, q0, nq, weights, keys, s, panel);
        for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
          int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
          ScoreTile<R> tile;
          if (!prepare_tile<R>(c, q0, nq, k0, nk, score_scratch, tile)) continue;
          load_additive_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, nullptr, keys);
          Rows<R> values = get_rows<R>(p.value, c.key_offset(p.value, tile.k0), tile.nk, p.value_size, true, s.values);
          gradient_tile<R>(f, c, tile, weights, keys, values, panel, false, nullptr, s);
          add_bias_gradient<R>(c, grad, tile, s.S, s.extra);
        }
      }
    }
}

template <class R>
void delta_task(const Backward<R>& f, int64_t task) {
  delta_rows<R>(*f.p, task);
}
// dQ of a block of queries, from the parts whose keys it sees.
template <class R>
void merge_query_task(const Backward<R>& f, int64_t task) {
  constexpr int64_t kBlock = kPanelsPerBlock * kPanel<R>;
  const AdditiveAttentionParams& p = *f.p;
  HeadContext c = head_context(p, task / f.blocks / p.heads, task / f.blocks % p.heads);
  int64_t q0 = task % f.blocks * kBlock, share = (f.tiles + f.splits - 1) / f.splits * kKeyTile;
  int64_t rows = c.s.query_rows - q0 < kBlock ? c.s.query_rows - q0 : kBlock;
  if (rows <= 0) return;
  int64_t valid = c.s.queries - q0 < rows ? c.s.queries - q0 : rows;
  KeyRange seen = valid > 0 ? visible_keys(c, q0, valid) : KeyRange{0, 0};
  int64_t first = seen.begin / share, last = (seen.end + share - 1) / share;
  R* sum = static_cast<R*>(scratch(0, size_t(f.depth_pad) * sizeof(R)));
  for (int64_t q = 0; q < rows; q++) {
    for (int64_t d = 0; d < f.depth_pad; d += kLanes<R>) {
      Vec<R> x{};
      for (int64_t i = first; i < last; i++) x += load(f.query_part(i, c.row(q0 + q)) + d);
      store(sum + d, x);
    }
    store_row<R>(p.grad_query, c.query_offset(p.grad_query, q0 + q), p.head_size, sum, R(1));
  }
}
template <class R>
void sink_task(const Backward<R>& f, int64_t h) {
  sink_gradient<R>(*f.p, h);
}

template <class R, void (*TASK)(const Backward<R>&, int64_t)>
void run(const Backward<R>& f, int64_t tasks, bool serial) {
  parallel_tasks(
      tasks, serial, [](void* x, int64_t task) { TASK(*static_cast<const Backward<R>*>(x), task); },
      const_cast<Backward<R>*>(&f));
}

template <class R>
void backward(const AdditiveAttentionParams& p) {
  constexpr int64_t W = kPanel<R>;
  Backward<R> f{};
  f.p = &p;
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  Longest longest = longest_sequence(p);
  f.panels = (longest.queries + W - 1) / W;
  f.blocks = (f.panels + kPanelsPerBlock - 1) / kPanelsPerBlock;
  f.tiles = (longest.keys + kKeyTile - 1) / kKeyTile;
  f.rows_total = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.query_tokens;
  f.scores = p.grad_query.data || p.grad_key.data || p.grad_weight || p.grad_score_bias;
  int64_t key_heads = p.batch * p.kv_heads;
  f.splits = 1;
  if (key_heads > 0 && key_heads < kMinTasks && f.tiles >= 2 * kMinSplitTiles) {
    int64_t wanted = (kMinTasks + key_heads - 1) / key_heads, possible = f.tiles / kMinSplitTiles;
    wanted = wanted < kMaxSplits ? wanted : kMaxSplits;
    f.splits = wanted < possible ? wanted : possible;
  }
  if (f.scores) place_parts<R>(f);
  if (p.grad_center) {
    f.partial_center = static_cast<R*>(scratch(4, size_t(f.splits * f.rows_total) * sizeof(R)));
    for (int64_t i = 0; i < f.splits * f.rows_total; i++) f.partial_center[i] = R(0);
  }
  bool serial = double(p.batch * p.heads) * double(longest.queries) * double(longest.keys) *
                    double(p.head_size + p.value_size / 4 + 2) <
                kSerialTriples / 2;

  run<R, delta_task<R>>(f, (p.cu_seqlens_q ? 1 : p.batch) * p.heads * delta_pieces(p), serial);
  if (p.grad_sink) run<R, sink_task<R>>(f, p.heads, serial);
  bool bias_here = false;
  for (int i = 0; i < 2; i++) bias_here |= owns_bias(f, i);
  if (f.scores || p.grad_value.data || p.grad_center || bias_here) {
    run<R, gradient_task<R>>(f, key_heads * f.splits, serial);
    if (f.splits > 1 && p.grad_query.data) run<R, merge_query_task<R>>(f, p.batch * p.heads * f.blocks, serial);
  }
  if (p.grad_center) center_gradient<R>(p, f.partial_center, f.splits, f.rows_total);
  if (p.grad_weight) merge_weights<R>(f, 0, p.weight_by_head, R(-1), static_cast<R*>(p.grad_weight));
  if (p.grad_score_bias) merge_weights<R>(f, 1, p.score_bias_by_head, R(1), static_cast<R*>(p.grad_score_bias));
  for (f.bias = 0; f.bias < 2; f.bias++)
    if (p.grad_bias[f.bias].data && !owns_bias(f, f.bias)) {
      BiasOwnership o = bias_ownership(p, f.bias, f.panels, f.tiles);
      run<R, bias_task<R>>(f, o.batches * o.heads * o.units, serial);
    }
}

}  // namespace

void additive_attention_bwd(const AdditiveAttentionParams& p) {
  if (additive_attention_decode_bwd(p)) return;
  if (p.query.dtype == DType::kFloat64)
    backward<double>(p);
  else
    backward<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
