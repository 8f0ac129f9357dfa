// Backward of the dot core. With P = exp(s - lse), dP = dO V^T (dropped out as P was), delta = rowsum(dO * O) + shift:
//   dS = P * (dP - delta),  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K,  d bias = dS summed over broadcast axes.
//
// The keys of a sequence form a few parts, their number given by the shape alone, and dQ is the sum of what each part
// gives, in order. So three schedules give bitwise equal results; all add the same tile products in the same order:
//   a task per key head: five products a tile;
//   a task per key head and part, for few heads: also five, with dQ of each part in memory until they are added up;
//   two passes, when even parts are fewer than threads: a task per key range for dK and dV, one per query block for dQ;
//   seven products.
// Up to 64 keys are one tile, which holds whole rows: P and delta = rowsum(P * dP) then need nothing from the forward.
// The gradient of a bias is added to by whatever forms dS, if no other task adds to the same elements; else (a bias
// that heads or samples share, a soft cap between it and dS) by a pass of its own whose tasks own disjoint parts.
// Either way the elements are summed in one fixed order, without atomics.
#include "backward_schedule.h"
#include "backward_tile.h"
#include "dot_attention.h"
#include "dot_tile.h"
#include "parallel.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

static_assert(kWholeRowKeys == kKeyTile);
constexpr int kTilesPerTask = 4;  // key tiles of one dK, dV task of the two-pass schedule

template <class R>
struct Backward {
  const DotAttentionParams* p;
  int64_t depth_pad, value_pad;
  int64_t blocks, tiles, tile_groups;  // upper bounds over the batch
  int64_t panels;
  int64_t parts, part_tiles, rows_total;
  bool keys, queries;    // which gradients are wanted
  R* part_query;         // [parts][rows_total][depth_pad], in the schedule by parts
  R* part_center;        // [parts][rows_total], in every schedule; null: not wanted
  const int64_t* order;  // [batch], the sequences with most work first; null: as they come
  int bias;              // bias pass: which one
};

// With pairs of bfloat16, keys and values have the copy of a tile in their first half; keys, interleaved, in the
// second.
template <class R>
struct BackwardScratch {
  R *queries, *grad_out, *packed, *packed_grad, *minus_lse, *minus_log, *minus_delta, *grad_query, *part_query;
  R *keys, *values, *P, *S, *keep, *slope, *extra, *clean, *rows, *score;
  BFloat16 *rounded_P, *rounded_S;  // [key][panel]
  uint32_t *pairs_S, *key_pairs;    // [key / 2][panel], [key / 2][depth_pad]
  static int64_t size(const Backward<R>& f, int panels) {
    int64_t W = kPanel<R>, T = kKeyTile, both = f.depth_pad + f.value_pad, larger = T > W ? T : W;
    return panels * W * (2 * both + 3 + 2 * f.depth_pad) + T * both + 5 * T * W + larger * both + W * T +
           3 * T * W / 2 + ScoreScratch<R>::size();
  }
  BackwardScratch(const Backward<R>& f, int panels, R* base) {
    int64_t W = kPanel<R>, T = kKeyTile, both = f.depth_pad + f.value_pad, larger = T > W ? T : W;
    queries = base;
    grad_out = queries + panels * W * f.depth_pad;
    packed = grad_out + panels * W * f.value_pad;
    packed_grad = packed + panels * W * f.depth_pad;
    grad_query = packed_grad + panels * W * f.value_pad;
    part_query = grad_query + panels * W * f.depth_pad;
    minus_lse = part_query + panels * W * f.depth_pad;
    minus_log = minus_lse + panels * W;
    minus_delta = minus_log + panels * W;
    keys = minus_delta + panels * W;
    values = keys + T * f.depth_pad;
    P = values + T * f.value_pad;
    S = P + T * W;
    keep = S + T * W;
    slope = keep + T * W;
    extra = slope + T * W;
    clean = extra + T * W;
    rows = clean + larger * both;
    score = rows + W * T;
    pairs_S = reinterpret_cast<uint32_t*>(score + ScoreScratch<R>::size());
    rounded_P = reinterpret_cast<BFloat16*>(pairs_S + T / 2 * W);
    rounded_S = rounded_P + T * W;
    key_pairs = reinterpret_cast<uint32_t*>(keys) + T / 2 * f.depth_pad;
  }
};

// One query panel of the backward pass.
template <class R, class T>
struct GradPanel {
  QueryPanel<R, T> query;
  const Packed<T>* packed_grad;      // dO^T, like query.packed
  const R* minus_delta;              // [panel]
  Rows<R> queries, grad_out;         // T = R
  PairRows query_pairs, grad_pairs;  // T = BFloat16, if dK and dV are wanted
};

template <class R, class T>
GradPanel<R, T> load_panel(const Backward<R>& f, const HeadContext& c, int64_t q0, int nq, const BackwardScratch<R>& s,
                           int slot, bool keys) {
  constexpr int W = kPanel<R>;
  const DotAttentionParams& p = *f.p;
  auto* packed = reinterpret_cast<Packed<T>*>(s.packed + slot * W * f.depth_pad);
  auto* packed_grad = reinterpret_cast<Packed<T>*>(s.packed_grad + slot * W * f.value_pad);
  R* queries = s.queries + slot * W * f.depth_pad;
  R* grad_out = s.grad_out + slot * W * f.value_pad;
  R* minus_lse = s.minus_lse + slot * W;
  R* minus_log = s.minus_log + slot * W;
  R* minus_delta = s.minus_delta + slot * W;
  int64_t query_offset = c.query_offset(p.query, q0), grad_offset = c.query_offset(p.grad_out, q0);
  GradPanel<R, T> panel{};
  panel.queries =
      pack_panel<T, R>(p.query, query_offset, nq, p.head_size, packed, R(score_scale(p.scale).query), queries);
  panel.grad_out = pack_panel<T, R>(p.grad_out, grad_offset, nq, p.value_size, packed_grad, R(1), grad_out);
  if constexpr (!std::is_same_v<R, T>) {
    if (keys) {  // over the rows that packing left behind
      panel.query_pairs = interleave_rows(p.query, query_offset, nq, p.head_size, reinterpret_cast<uint32_t*>(queries));
      panel.grad_pairs =
          interleave_rows(p.grad_out, grad_offset, nq, p.value_size, reinterpret_cast<uint32_t*>(grad_out));
    }
  }
  panel.query = {q0, nq, packed, minus_lse, nullptr};
  panel.packed_grad = packed_grad;
  panel.minus_delta = minus_delta;
  if (!p.lse) return panel;
  load_panel_lse<R>(c, q0, nq, minus_lse);
  ScoreScratch<R> score_scratch(s.score);
  bool split = split_huge_lse<R, T>(c, q0, nq, packed, minus_lse, minus_log, s.keys, s.P, score_scratch);
  const R* delta = static_cast<const R*>(p.delta) + c.row(q0);
  for (int q = 0; q < W; q++) minus_delta[q] = q < nq ? -delta[q] : R(0);
  if (split) panel.query.minus_log = minus_log;
  return panel;
}

// Fills S with dS and P with the applied probabilities of one tile. through_cap: dS with respect to the
// score before the soft cap (for queries and keys), else after it (for a bias, which is added there).
template <class R, class T>
__attribute__((noinline)) void gradient_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<T> keys,
                                             Rows<T> values, const GradPanel<R, T>& panel, bool through_cap, R* center,
                                             const BackwardScratch<R>& s) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  int vectors = (tile.nq + N - 1) / N;
  R *P = s.P, *S = s.S;
  if (!p.lse) {
    softmax_tile<R, T>(c, tile, keys, panel.query, P);
    raw_scores<R, T>(values, steps_of<T>(p.value_size), panel.packed_grad, S, tile.nk, vectors, tile.bands_or_null());
    for (int j = 0; j < vectors; j++) {
      Vec<R> delta{};
      for (int k = 0; k < tile.nk; k++) {
        Vec<R> w = load(P + k * W + N * j), y = w * load(S + k * W + N * j);
        delta += w == R(0) ? Vec<R>{} : y;
      }
      for (int k = 0; k < tile.nk; k++) {
        Vec<R> w = load(P + k * W + N * j), y = w * (load(S + k * W + N * j) - delta);
        store(S + k * W + N * j, w == R(0) ? Vec<R>{} : y);
      }
    }
    return;
  }
  probability_tile<R, T>(c, tile, keys, panel.query, P, s.slope);
  bool direct = has_factor(p) || p.grad_weights.data || p.softcap > 0;
  bool masked = tile.masked();
  if (!direct) {
    score_product<R, T>(values, steps_of<T>(p.value_size), panel.packed_grad, panel.minus_delta, S, tile.nk, vectors,
                        tile.bands_or_null(), R(0), [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                          constexpr int M = decltype(m)::value;
                          ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
                            Vec<R> w = load(P + (r + i) * W + N * j), y = w * x[i];
                            // Selected, not multiplied: x may be NaN where the weight is zero by a mask.
                            if (masked) y = w == R(0) ? Vec<R>{} : y;
                            store(S + (r + i) * W + N * j, y);
                          }
                        });
    return;
  }
  raw_scores<R, T>(values, steps_of<T>(p.value_size), panel.packed_grad, S, tile.nk, vectors, tile.bands_or_null());
  finish_score_gradient<R>(c, tile, panel.minus_delta, through_cap ? s.slope : nullptr, s.rows, s.extra, s.keep, P, S,
                           center);
}

// What one tile, whose P and dS are in scratch, gives to dV and dK (KEYS) and to dQ (QUERIES).
template <class R, class T, bool KEYS, bool QUERIES>
void add_products(const Backward<R>& f, const HeadContext& c, const ScoreTile<R>& tile, Rows<R> keys,
                  const PairRows& key_pairs, const GradPanel<R, T>& panel, const BackwardScratch<R>& s, R* grad_key,
                  R* grad_value, R* grad_query) {
  const DotAttentionParams& p = *f.p;
  if constexpr (std::is_same_v<R, T>) {
    if (KEYS) {
      accumulate_by_key<R>(tile, s.P, panel.grad_out, p.value_size, grad_value, f.value_pad, s.clean);
      accumulate_by_key<R>(tile, s.S, panel.queries, p.head_size, grad_key, f.depth_pad, s.clean);
    }
    if (QUERIES) accumulate_by_query<R>(c, tile, s.S, keys, p.head_size, grad_query, f.depth_pad, false, s.clean);
  } else {
    round_tile<R>(tile, s.S, KEYS ? s.rounded_S : nullptr, QUERIES ? s.pairs_S : nullptr);
    if (KEYS) {
      round_tile<R>(tile, s.P, s.rounded_P, nullptr);
      accumulate_pairs_by_key<R>(tile, s.rounded_P, panel.grad_pairs, p.value_size, grad_value, f.value_pad, s.clean);
      accumulate_pairs_by_key<R>(tile, s.rounded_S, panel.query_pairs, p.head_size, grad_key, f.depth_pad, s.clean);
    }
    if (QUERIES)
      accumulate_pairs_by_query<R>(c, tile, s.pairs_S, key_pairs, p.head_size, grad_query, f.depth_pad, false, s.clean);
  }
}

// total[rows] = part, or total + part
template <class R>
void add_part(R* total, const R* part, int64_t count, bool first) {
  for (int64_t i = 0; i < count; i += kLanes<R>)
    store(total + i, first ? load(part + i) : load(total + i) + load(part + i));
}

template <class R>
void store_grad_query(const Backward<R>& f, const HeadContext& c, int64_t q0, int64_t rows, const R* sum) {
  const Tensor4& t = f.p->grad_query;
  if (!t.data) return;
  int64_t offset = c.query_offset(t, q0), size = f.p->head_size;
  if (sum) {
    store_rows<R>(t, offset, rows, size, sum, f.depth_pad, R(f.p->scale));
  } else {
    for (int64_t i = 0; i < rows; i++) store_zero_row<R>(t, offset + i * t.stride[2], size);
  }
}

// Gradients of one key head (or one query head) over blocks [block0, block1) of queries and tiles [tile0, tile1) of
// keys, which are whole parts if QUERIES. KEYS: form dK and dV of these tiles; QUERIES: form dQ of these blocks, or
// with `part` not negative only what that part, being these tiles, gives to it.
template <class R, class T, bool KEYS, bool QUERIES>
void gradient_range(const Backward<R>& f, int64_t b, int64_t h0, int64_t h1, int64_t block0, int64_t block1,
                    int64_t tile0, int64_t tile1, int64_t part = -1) {
  constexpr int W = kPanel<R>;
  constexpr int64_t kBlock = kPanelsPerBlock * W;
  const DotAttentionParams& p = *f.p;
  HeadContext first = head_context(p, b, h0);
  const Sequence& seq = first.s;
  int64_t key_rows = p.cu_seqlens_q ? seq.keys : p.key_tokens;
  int64_t keys0 = tile0 * kKeyTile, keys1 = tile1 * kKeyTile < key_rows ? tile1 * kKeyTile : key_rows;
  int64_t count = keys1 > keys0 ? keys1 - keys0 : 0;
  if (KEYS && !QUERIES && count == 0) return;

  using Scratch = BackwardScratch<R>;
  Scratch s(f, kPanelsPerBlock, static_cast<R*>(scratch(0, Scratch::size(f, kPanelsPerBlock) * sizeof(R))));
  R *grad_key = nullptr, *grad_value = nullptr;
  if (KEYS) {
    size_t size = size_t(count * (f.depth_pad + f.value_pad));
    grad_key = static_cast<R*>(scratch(1, size * sizeof(R)));
    grad_value = grad_key + count * f.depth_pad;
    for (size_t i = 0; i < size; i++) grad_key[i] = R(0);
  }
  bool add_bias[2];
  for (int i = 0; i < 2; i++) {
    BiasOwner owner = bias_owner(p, i);
    add_bias[i] = part >= 0 ? owner.by_both : (QUERIES && owner.by_queries) || (KEYS && owner.by_keys);
  }
  ScoreScratch<R> score_scratch(s.score);
  for (int64_t h = h0; h < h1; h++) {
    HeadContext c = head_context(p, b, h);
    for (int64_t block = block0; block < block1; block++) {
      int64_t q0 = block * kBlock;
      int64_t rows = seq.query_rows - q0 < kBlock ? seq.query_rows - q0 : kBlock;
      if (rows <= 0) break;
      int64_t valid = seq.queries - q0 < rows ? seq.queries - q0 : rows;
      bool started = false;  // grad_query holds a sum
      if (valid > 0) {
        GradPanel<R, T> panels[kPanelsPerBlock];
        bool loaded_panels = false;
        auto [begin, end] = visible_keys(c, q0, valid);
        if (begin < keys0) begin = keys0;
        if (end > keys1) end = keys1;
        int64_t part_end = 0;
        for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
          int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
          if (QUERIES && k0 >= part_end) {
            if (part_end > 0) {
              add_part<R>(s.grad_query, s.part_query, rows * f.depth_pad, !started);
              started = true;
            }
            for (int64_t i = 0; i < rows * f.depth_pad; i++) s.part_query[i] = R(0);
            part_end = (k0 / kKeyTile / f.part_tiles + 1) * f.part_tiles * kKeyTile;
          }
          Rows<T> keys{}, values{};
          Rows<R> plain_keys{};
          PairRows key_pairs{};
          bool loaded = false;
          for (int i = 0; i * W < valid; i++) {
            int nq = int(valid - i * W < W ? valid - i * W : W);
            ScoreTile<R> tile;
            if (!prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile)) continue;
            if (!loaded_panels) {
              bool overwritten = false;  // splitting lse uses the tile's scratch
              for (int j = 0; j * W < valid; j++) {
                panels[j] = load_panel<R, T>(f, c, q0 + j * W, int(valid - j * W < W ? valid - j * W : W), s, j, KEYS);
                overwritten |= panels[j].query.minus_log != nullptr;
              }
              loaded_panels = true;
              if (overwritten) prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile);
            }
            if (!loaded) {
              if constexpr (std::is_same_v<R, T>) {
                keys = plain_keys = get_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, QUERIES, s.keys);
              } else {
                keys = operand_rows<T>(p.key, c.key_offset(p.key, k0), nk, p.head_size, s.keys);
                if (QUERIES) key_pairs = interleave_rows(p.key, c.key_offset(p.key, k0), nk, p.head_size, s.key_pairs);
              }
              values = operand_rows<T>(p.value, c.key_offset(p.value, k0), nk, p.value_size, s.values);
              loaded = true;
            }
            const GradPanel<R, T>& panel = panels[i];
            R* center = nullptr;
            if (QUERIES && f.part_center)
              center = f.part_center + k0 / kKeyTile / f.part_tiles * f.rows_total + c.row(q0 + i * W);
            gradient_tile<R, T>(c, tile, keys.from(tile.skip), values.from(tile.skip), panel, true, center, s);
            for (int n = 0; n < 2; n++)
              if (add_bias[n]) add_bias_gradient<R>(c, p.grad_bias[n], tile, s.S, s.extra);
            int64_t k = tile.k0 - keys0;
            add_products<R, T, KEYS, QUERIES>(f, c, tile, plain_keys.from(tile.skip), key_pairs.from(tile.skip), panel,
                                              s, KEYS ? grad_key + k * f.depth_pad : nullptr,
                                              KEYS ? grad_value + k * f.value_pad : nullptr,
                                              s.part_query + i * W * f.depth_pad);
          }
        }
        if (QUERIES && part_end > 0) {
          R* total = part < 0 ? s.grad_query : f.part_query + (part * f.rows_total + c.row(q0)) * f.depth_pad;
          add_part<R>(total, s.part_query, rows * f.depth_pad, !started);
          started = true;
        }
      }
      if (QUERIES && part < 0) store_grad_query<R>(f, c, q0, rows, started ? s.grad_query : nullptr);
    }
  }
  if (KEYS) {
    if (p.grad_key.data)
      store_rows<R>(p.grad_key, first.key_offset(p.grad_key, keys0), count, p.head_size, grad_key, f.depth_pad,
                    R(p.scale));
    if (p.grad_value.data)
      store_rows<R>(p.grad_value, first.key_offset(p.grad_value, keys0), count, p.value_size, grad_value, f.value_pad,
                    R(1));
  }
}

template <class R>
int64_t sequence_at(const Backward<R>& f, int64_t i) {
  return f.order ? f.order[i] : i;
}
template <class R, class T>
void head_task(const Backward<R>& f, int64_t task) {
  int64_t b = sequence_at(f, task / f.p->kv_heads), kv = task % f.p->kv_heads, group = f.p->heads / f.p->kv_heads;
  gradient_range<R, T, true, true>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, 0, f.tiles);
}
template <class R, class T>
void part_task(const Backward<R>& f, int64_t task) {
  // The first part of a causal sequence is seen by all queries: parts in order are the longest first.
  int64_t part = task / f.p->kv_heads % f.parts, b = sequence_at(f, task / f.p->kv_heads / f.parts);
  int64_t kv = task % f.p->kv_heads, group = f.p->heads / f.p->kv_heads, tile = part * f.part_tiles;
  gradient_range<R, T, true, true>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, tile, tile + f.part_tiles, part);
}
// Adds up what part_task left for one block of queries.
template <class R>
void part_sum_task(const Backward<R>& f, int64_t task) {
  constexpr int64_t kBlock = kPanelsPerBlock * kPanel<R>;
  HeadContext c = head_context(*f.p, task / f.blocks / f.p->heads, task / f.blocks % f.p->heads);
  int64_t q0 = task % f.blocks * kBlock;
  int64_t rows = c.s.query_rows - q0 < kBlock ? c.s.query_rows - q0 : kBlock;
  if (rows <= 0) return;
  int64_t valid = c.s.queries - q0 < rows ? c.s.queries - q0 : rows, part_keys = f.part_tiles * kKeyTile;
  R* total = static_cast<R*>(scratch(0, size_t(rows * f.depth_pad) * sizeof(R)));
  bool started = false;
  if (valid > 0) {
    KeyRange seen = visible_keys(c, q0, valid);
    for (int64_t part = seen.begin / part_keys; part * part_keys < seen.end; part++) {
      add_part<R>(total, f.part_query + (part * f.rows_total + c.row(q0)) * f.depth_pad, rows * f.depth_pad, !started);
      started = true;
    }
  }
  store_grad_query<R>(f, c, q0, rows, started ? total : nullptr);
}
template <class R, class T>
void key_task(const Backward<R>& f, int64_t task) {
  int64_t tiles = task % f.tile_groups * kTilesPerTask, head = task / f.tile_groups;
  int64_t b = head / f.p->kv_heads, kv = head % f.p->kv_heads, group = f.p->heads / f.p->kv_heads;
  gradient_range<R, T, true, false>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, tiles, tiles + kTilesPerTask);
}
template <class R, class T>
void query_task(const Backward<R>& f, int64_t task) {
  int64_t block = f.blocks - 1 - task % f.blocks, head = task / f.blocks;
  int64_t b = head / f.p->heads, h = head % f.p->heads;
  gradient_range<R, T, false, true>(f, b, h, h + 1, block, block + 1, 0, f.tiles);
}

// ---------------------------------------------------------------- the bias pass
template <class R>
void delta_task(const Backward<R>& f, int64_t task) {
  delta_rows<R>(*f.p, task);
}
template <class R>
void sink_task(const Backward<R>& f, int64_t h) {
  sink_gradient<R>(*f.p, h);
}

template <class R, class T>
void bias_task(const Backward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>;
  const DotAttentionParams& p = *f.p;
  const Tensor4& grad = p.grad_bias[f.bias];
  BiasOwnership o = bias_ownership(p, f.bias, f.panels, f.tiles);
  int64_t unit = task % o.units, slice = task / o.units, own_b = slice / o.heads, own_h = slice % o.heads;
  BackwardScratch<R> s(f, 1, static_cast<R*>(scratch(0, BackwardScratch<R>::size(f, 1) * sizeof(R))));
  ScoreScratch<R> score_scratch(s.score);
  int64_t b1 = o.batches == 1 ? p.batch : own_b + 1, h1 = o.heads == 1 ? p.heads : own_h + 1;
  for (int64_t b = own_b; b < b1; b++)
    for (int64_t h = own_h; h < h1; h++) {
      HeadContext c = head_context(p, b, h);
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
        GradPanel<R, T> panel = load_panel<R, T>(f, c, q0, nq, s, 0, false);
        for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
          int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
          ScoreTile<R> tile;
          if (!prepare_tile<R>(c, q0, nq, k0, nk, score_scratch, tile)) continue;
          Rows<T> keys = operand_rows<T>(p.key, c.key_offset(p.key, tile.k0), tile.nk, p.head_size, s.keys);
          Rows<T> values = operand_rows<T>(p.value, c.key_offset(p.value, tile.k0), tile.nk, p.value_size, s.values);
          gradient_tile<R, T>(c, tile, keys, values, panel, false, nullptr, s);
          add_bias_gradient<R>(c, grad, tile, s.S, s.extra);
        }
      }
    }
}

template <class R, void (*TASK)(const Backward<R>&, int64_t)>
void run(const Backward<R>& f, int64_t tasks, bool serial) {
  parallel_tasks(
      tasks, serial, [](void* x, int64_t task) { TASK(*static_cast<const Backward<R>*>(x), task); },
      const_cast<Backward<R>*>(&f));
}

template <class R, class T>
void backward(const DotAttentionParams& p) {
  constexpr int64_t W = kPanel<R>;
  Backward<R> f{};
  f.p = &p;
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  Longest longest = longest_sequence(p);
  f.panels = (longest.queries + W - 1) / W;
  f.blocks = (f.panels + kPanelsPerBlock - 1) / kPanelsPerBlock;
  f.tiles = (longest.keys + kKeyTile - 1) / kKeyTile;
  f.tile_groups = (f.tiles + kTilesPerTask - 1) / kTilesPerTask;
  f.keys = p.grad_key.data || p.grad_value.data;
  f.queries = p.grad_query.data || p.grad_center;
  int64_t heads = p.batch * p.heads, key_heads = p.batch * p.kv_heads;
  bool serial =
      double(heads) * double(longest.queries) * double(longest.keys) * double(p.head_size + p.value_size + 8) <
      kSerialWork / 2;

  if (p.lse) run<R, delta_task<R>>(f, (p.cu_seqlens_q ? 1 : p.batch) * p.heads * delta_pieces(p), serial);
  if (p.grad_sink) run<R, sink_task<R>>(f, p.heads, serial);

  f.rows_total = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.query_tokens;
  int64_t query_bytes = f.rows_total * f.depth_pad * int64_t(sizeof(R));
  f.parts = part_count(f.tiles, query_bytes);
  f.part_tiles = f.tiles > 0 ? (f.tiles + f.parts - 1) / f.parts : 1;

  if (p.grad_center) {
    f.part_center = static_cast<R*>(scratch(4, size_t(f.parts * f.rows_total) * sizeof(R)));
    for (int64_t i = 0; i < f.parts * f.rows_total; i++) f.part_center[i] = R(0);
  }

  int64_t threads = serial || p.threads < 1 ? 1 : p.threads;
  Schedule schedule = f.keys && f.queries ? choose_schedule(p, threads, f.parts) : Schedule::kTwoPasses;
  bool ragged = p.cu_seqlens_q || p.key_lengths || p.query_lengths;
  if (threads > 1 && ragged && schedule != Schedule::kTwoPasses) {
    int64_t* order = static_cast<int64_t*>(scratch(2, size_t(2 * p.batch) * sizeof(int64_t)));
    sort_by_work(p, order, reinterpret_cast<double*>(order + p.batch));
    f.order = order;
  }
  if (schedule == Schedule::kHeads) {
    run<R, head_task<R, T>>(f, key_heads, serial);
  } else if (schedule == Schedule::kParts) {
    f.part_query = static_cast<R*>(scratch(3, size_t(f.parts * query_bytes)));
    run<R, part_task<R, T>>(f, key_heads * f.parts, serial);
    run<R, part_sum_task<R>>(f, heads * f.blocks, serial);
  } else {
    if (f.keys) run<R, key_task<R, T>>(f, key_heads * f.tile_groups, serial);
    if (f.queries) run<R, query_task<R, T>>(f, heads * f.blocks, serial);
  }
  if (p.grad_center) center_gradient<R>(p, f.part_center, f.parts, f.rows_total);
  for (f.bias = 0; f.bias < 2; f.bias++)
    if (BiasOwner owner = bias_owner(p, f.bias);
        p.grad_bias[f.bias].data &&
        !(schedule == Schedule::kParts ? owner.by_both
                                       : (owner.by_queries && f.queries) || (owner.by_keys && f.keys))) {
      BiasOwnership o = bias_ownership(p, f.bias, f.panels, f.tiles);
      run<R, bias_task<R, T>>(f, o.batches * o.heads * o.units, serial);
    }
}

}  // namespace

void dot_attention_bwd(const DotAttentionParams& p) {
  visit_operands(p, [&](auto real, auto operand) { backward<decltype(real), decltype(operand)>(p); });
}

}  // namespace attnfast::ATTNFAST_ISA
