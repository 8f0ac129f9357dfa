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
#include "dot_attention.h"
#include "dot_tile.h"
#include "parallel.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

static_assert(kWholeRowKeys == kKeyTile);
constexpr int kTilesPerTask = 4;  // key tiles of one dK, dV task of the two-pass schedule
constexpr int kMaxParts = 8;
constexpr int kMinTilesPerPart = 2;
constexpr int64_t kPartBytes = int64_t{32} << 20;  // what dQ of all parts may take together, roughly

template <class R>
struct Backward {
  const DotAttentionParams* p;
  int64_t depth_pad, value_pad;
  int64_t blocks, tiles, tile_groups;  // upper bounds over the batch
  int64_t panels;
  int64_t parts, part_tiles, rows_total;
  bool keys, queries;    // which gradients are wanted
  R* part_query;         // [parts][rows_total][depth_pad], in the schedule by parts
  const int64_t* order;  // [batch], the sequences with most work first; null: as they come
  int bias;              // bias pass: which one
};

template <class R>
struct BackwardScratch {
  R *queries, *grad_out, *packed, *packed_grad, *minus_lse, *minus_log, *minus_delta, *grad_query, *part_query;
  R *keys, *values, *P, *S, *keep, *slope, *extra, *clean, *rows, *score;
  static int64_t size(const Backward<R>& f, int panels) {
    int64_t W = kPanel<R>, T = kKeyTile, both = f.depth_pad + f.value_pad, larger = T > W ? T : W;
    return panels * W * (2 * both + 3 + 2 * f.depth_pad) + T * both + 5 * T * W + larger * both + W * T +
           ScoreScratch<R>::size();
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
  }
};

// One query panel of the backward pass.
template <class R>
struct GradPanel {
  QueryPanel<R> query;
  const R* packed_grad;  // dO^T [D_v][panel]
  const R* minus_delta;  // [panel]
  Rows<R> queries, grad_out;
};

template <class R>
GradPanel<R> load_panel(const Backward<R>& f, const HeadContext& c, int64_t q0, int nq, const BackwardScratch<R>& s,
                        int slot) {
  constexpr int W = kPanel<R>;
  const DotAttentionParams& p = *f.p;
  R* packed = s.packed + slot * W * f.depth_pad;
  R* packed_grad = s.packed_grad + slot * W * f.value_pad;
  R* minus_lse = s.minus_lse + slot * W;
  R* minus_log = s.minus_log + slot * W;
  R* minus_delta = s.minus_delta + slot * W;
  GradPanel<R> panel;
  panel.queries =
      get_rows<R>(p.query, c.query_offset(p.query, q0), nq, p.head_size, true, s.queries + slot * W * f.depth_pad);
  panel.grad_out = get_rows<R>(p.grad_out, c.query_offset(p.grad_out, q0), nq, p.value_size, true,
                               s.grad_out + slot * W * f.value_pad);
  pack_transposed<R>(panel.queries, nq, p.head_size, packed, R(score_scale(p.scale).query));
  pack_transposed<R>(panel.grad_out, nq, p.value_size, packed_grad, R(1));
  panel.query = {q0, nq, packed, minus_lse, nullptr};
  panel.packed_grad = packed_grad;
  panel.minus_delta = minus_delta;
  if (!p.lse) return panel;
  load_panel_lse<R>(c, q0, nq, minus_lse);
  ScoreScratch<R> score_scratch(s.score);
  bool split = split_huge_lse<R>(c, q0, nq, packed, minus_lse, minus_log, s.keys, s.P, score_scratch);
  const R* delta = static_cast<const R*>(p.delta) + c.row(q0);
  for (int q = 0; q < W; q++) minus_delta[q] = q < nq ? -delta[q] : R(0);
  if (split) panel.query.minus_log = minus_log;
  return panel;
}

// extra[key][query] = gradient that arrives directly at the weights.
template <class R>
void weight_gradient_tile(const HeadContext& c, const ScoreTile<R>& tile, R* rows, R* extra) {
  constexpr int W = kPanel<R>;
  const DotAttentionParams& p = *c.p;
  if (p.weights_mode != WeightsMode::kRowMax) {
    load_tile_transposed<R>(p.grad_weights, c, tile, rows, extra);
    return;
  }
  for (int i = 0; i < tile.nk * W; i += kLanes<R>) store(extra + i, Vec<R>{});
  for (int q = 0; q < tile.nq; q++) {
    int64_t k = p.weights_index[c.row(tile.q0 + q)] - c.s.key_begin - tile.k0;
    if (k < 0 || k >= tile.nk) continue;
    load_rows<R>(p.grad_weights, offset4(p.grad_weights, c.s.tensor_batch, c.h, c.s.query_begin + tile.q0 + q, 0), 1, 1,
                 rows, kKeyTile);
    extra[k * W + q] = rows[0];
  }
}

// Fills S with dS and P with the applied probabilities of one tile. through_cap: dS with respect to the
// score before the soft cap (for queries and keys), else after it (for a bias, which is added there).
template <class R>
__attribute__((noinline)) void gradient_tile(const HeadContext& c, const ScoreTile<R>& tile, Rows<R> keys,
                                             Rows<R> values, const GradPanel<R>& panel, bool through_cap,
                                             const BackwardScratch<R>& s) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const DotAttentionParams& p = *c.p;
  int vectors = (tile.nq + N - 1) / N;
  R *P = s.P, *S = s.S;
  if (!p.lse) {
    softmax_tile<R>(c, tile, keys, panel.query, P);
    raw_scores<R>(values, p.value_size, panel.packed_grad, S, tile.nk, vectors, tile.bands_or_null());
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
  probability_tile<R>(c, tile, keys, panel.query, P, s.slope);
  bool direct = p.dropout_p > 0 || p.grad_weights.data || p.softcap > 0;
  bool masked = tile.masked;
  if (!direct) {
    score_product<R>(values, p.value_size, panel.packed_grad, panel.minus_delta, S, tile.nk, vectors,
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
  raw_scores<R>(values, p.value_size, panel.packed_grad, S, tile.nk, vectors, tile.bands_or_null());
  if (p.grad_weights.data) weight_gradient_tile<R>(c, tile, s.rows, s.extra);
  if (p.dropout_p > 0) dropout_tile<R>(c, tile, s.keep);
  for (int k = 0; k < tile.nk; k++)
    for (int j = 0; j < vectors; j++) {
      int64_t i = k * W + N * j;
      Vec<R> x = load(S + i), w = load(P + i);
      if (p.grad_weights.data) x += load(s.extra + i);
      if (p.dropout_p > 0) x *= load(s.keep + i);
      Vec<R> y = w * (x + load(panel.minus_delta + N * j));
      if (p.softcap > 0 && through_cap) y *= load(s.slope + i);
      store(S + i, w == R(0) ? Vec<R>{} : y);
      if (p.dropout_p > 0) store(P + i, w * load(s.keep + i));
    }
}

// ---------------------------------------------------------------- gradient of a bias
template <class R>
void add_row(const R* src, int count, R* dst, int64_t stride) {
  constexpr int N = kLanes<R>;
  int k = 0;
  if (stride == 1)
    for (; k + N <= count; k += N) store(dst + k, load(dst + k) + load(src + k));
  for (; k < count; k++) dst[k * stride] += src[k];
}

// Adds a tile of dS into the gradient, summing over broadcast axes inside the tile first.
template <class R>
__attribute__((noinline)) void add_bias_gradient(const HeadContext& c, const Tensor4& grad, const ScoreTile<R>& tile,
                                                 const BackwardScratch<R>& s) {
  constexpr int W = kPanel<R>, N = kLanes<R>;
  R* base = static_cast<R*>(grad.data) +
            offset4(grad, c.s.tensor_batch, c.h, c.s.query_begin + tile.q0, c.s.key_begin + tile.k0);
  int64_t q_stride = grad.stride[2], k_stride = grad.stride[3];
  if (q_stride != 0 && k_stride != 0) {
    for (int k = 0; k < tile.nk; k += W) {
      int count = tile.nk - k < W ? tile.nk - k : W;
      pack_transposed<R>({s.S + k * W, W}, count, tile.nq, s.extra, R(1));
      for (int q = 0; q < tile.nq; q++)
        add_row<R>(s.extra + q * W, count, base + q * q_stride + k * k_stride, k_stride);
    }
  } else if (q_stride == 0) {
    R total = 0;
    for (int k = 0; k < tile.nk; k++) {
      const R* row = s.S + k * W;
      Vec<R> lanes{};
      int q = 0;
      for (; q + N <= tile.nq; q += N) lanes += load(row + q);
      R sum = sum_lanes<R>(lanes);
      for (; q < tile.nq; q++) sum += row[q];
      if (k_stride != 0) base[k * k_stride] += sum;
      total += sum;
    }
    if (k_stride == 0) base[0] += total;
  } else {
    for (int q = 0; q < tile.nq; q += N) {
      Vec<R> sum{};
      for (int k = 0; k < tile.nk; k++) sum += load(s.S + k * W + q);
      for (int i = 0; i < N && q + i < tile.nq; i++) base[(q + i) * q_stride] += sum[i];
    }
  }
}

// Which tasks are the only ones to touch the elements of a bias gradient that their tiles of dS add to.
struct BiasOwner {
  bool by_queries, by_keys;  // tasks of one head and a block of queries; tasks of one head and a range of keys
  bool by_both;              // tasks of one head, a range of keys and a block of queries
};
BiasOwner bias_owner(const DotAttentionParams& p, int i) {
  const Tensor4& grad = p.grad_bias[i];
  bool own_head = (grad.stride[0] != 0 || p.batch == 1 || p.cu_seqlens_q) && (grad.stride[1] != 0 || p.heads == 1);
  if (!grad.data || !own_head || p.softcap > 0) return {false, false, false};
  bool rows = grad.stride[2] != 0, columns = grad.stride[3] != 0;
  return {rows, !rows && columns, columns};
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
  int64_t offset = c.query_offset(t, q0), size = f.p->head_size;
  if (sum) {
    store_rows<R>(t, offset, rows, size, sum, f.depth_pad, R(f.p->scale));
  } else {
    for (int64_t i = 0; i < rows; i++) store_zero_row<R>(t, offset + i * t.stride[2], size);
  }
}

// Keys [begin, end) that some row of a block sees, begin on a tile.
struct KeyRange {
  int64_t begin, end;
};
static KeyRange visible_keys(const HeadContext& c, int64_t q0, int64_t rows) {
  return {first_key(c.band, q0) / kKeyTile * kKeyTile, end_key(c.band, q0 + rows - 1)};
}

// Gradients of one key head (or one query head) over blocks [block0, block1) of queries and tiles [tile0, tile1) of
// keys, which are whole parts if QUERIES. KEYS: form dK and dV of these tiles; QUERIES: form dQ of these blocks, or
// with `part` not negative only what that part, being these tiles, gives to it.
template <class R, bool KEYS, bool QUERIES>
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
        GradPanel<R> panels[kPanelsPerBlock];
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
          Rows<R> keys{}, values{};
          bool loaded = false;
          for (int i = 0; i * W < valid; i++) {
            int nq = int(valid - i * W < W ? valid - i * W : W);
            ScoreTile<R> tile;
            if (!prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile)) continue;
            if (!loaded_panels) {
              bool overwritten = false;  // splitting lse uses the tile's scratch
              for (int j = 0; j * W < valid; j++) {
                panels[j] = load_panel<R>(f, c, q0 + j * W, int(valid - j * W < W ? valid - j * W : W), s, j);
                overwritten |= panels[j].query.minus_log != nullptr;
              }
              loaded_panels = true;
              if (overwritten) prepare_tile<R>(c, q0 + i * W, nq, k0, nk, score_scratch, tile);
            }
            if (!loaded) {
              keys = get_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, QUERIES, s.keys);
              values = get_rows<R>(p.value, c.key_offset(p.value, k0), nk, p.value_size, false, s.values);
              loaded = true;
            }
            const GradPanel<R>& panel = panels[i];
            gradient_tile<R>(c, tile, keys, values, panel, true, s);
            for (int n = 0; n < 2; n++)
              if (add_bias[n]) add_bias_gradient<R>(c, p.grad_bias[n], tile, s);
            if (KEYS) {
              int64_t k = k0 - keys0;
              accumulate_by_key<R>(tile, s.P, panel.grad_out, p.value_size, grad_value + k * f.value_pad, f.value_pad,
                                   s.clean);
              accumulate_by_key<R>(tile, s.S, panel.queries, p.head_size, grad_key + k * f.depth_pad, f.depth_pad,
                                   s.clean);
            }
            if (QUERIES)
              accumulate_by_query<R>(c, tile, s.S, keys, p.head_size, s.part_query + i * W * f.depth_pad, f.depth_pad,
                                     false, s.clean);
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
template <class R>
void head_task(const Backward<R>& f, int64_t task) {
  int64_t b = sequence_at(f, task / f.p->kv_heads), kv = task % f.p->kv_heads, group = f.p->heads / f.p->kv_heads;
  gradient_range<R, true, true>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, 0, f.tiles);
}
template <class R>
void part_task(const Backward<R>& f, int64_t task) {
  // The first part of a causal sequence is seen by all queries: parts in order are the longest first.
  int64_t part = task / f.p->kv_heads % f.parts, b = sequence_at(f, task / f.p->kv_heads / f.parts);
  int64_t kv = task % f.p->kv_heads, group = f.p->heads / f.p->kv_heads, tile = part * f.part_tiles;
  gradient_range<R, true, true>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, tile, tile + f.part_tiles, part);
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
template <class R>
void key_task(const Backward<R>& f, int64_t task) {
  int64_t tiles = task % f.tile_groups * kTilesPerTask, head = task / f.tile_groups;
  int64_t b = head / f.p->kv_heads, kv = head % f.p->kv_heads, group = f.p->heads / f.p->kv_heads;
  gradient_range<R, true, false>(f, b, kv * group, (kv + 1) * group, 0, f.blocks, tiles, tiles + kTilesPerTask);
}
template <class R>
void query_task(const Backward<R>& f, int64_t task) {
  int64_t block = f.blocks - 1 - task % f.blocks, head = task / f.blocks;
  int64_t b = head / f.p->heads, h = head % f.p->heads;
  gradient_range<R, false, true>(f, b, h, h + 1, block, block + 1, 0, f.tiles);
}

// delta[row] = rowsum(dO * O) + shift for a few rows.
constexpr int64_t kDeltaRows = 64;
template <class R>
void delta_task(const Backward<R>& f, int64_t task) {
  const DotAttentionParams& p = *f.p;
  int64_t pieces = (p.query_tokens + kDeltaRows - 1) / kDeltaRows, head = task / pieces;
  int64_t b = head / p.heads, h = head % p.heads, q0 = task % pieces * kDeltaRows;
  R* grad = static_cast<R*>(scratch(0, size_t(2 * f.value_pad) * sizeof(R)));
  R* out = grad + f.value_pad;
  for (int64_t q = q0; q < q0 + kDeltaRows && q < p.query_tokens; q++) {
    load_rows<R>(p.grad_out, offset4(p.grad_out, b, h, q, 0), 1, p.value_size, grad, f.value_pad);
    load_rows<R>(p.out, offset4(p.out, b, h, q, 0), 1, p.value_size, out, f.value_pad);
    Vec<R> sum{};
    for (int64_t d = 0; d < f.value_pad; d += kLanes<R>) sum += load(grad + d) * load(out + d);
    R x = sum_lanes<R>(sum);
    if (x != x) {  // a masked row has output 0; a NaN gradient that arrives there must not come back
      bool zero = true;
      for (int64_t d = 0; d < p.value_size; d++) zero &= out[d] == R(0);
      if (zero) x = R(0);
    }
    int64_t row = (b * p.heads + h) * p.query_tokens + q;
    static_cast<R*>(p.delta)[row] = x + (p.delta_shift ? static_cast<const R*>(p.delta_shift)[row] : R(0));
  }
}

// d sink[h] = -sum over rows of exp(sink - lse) * delta
template <class R>
void sink_task(const Backward<R>& f, int64_t h) {
  const DotAttentionParams& p = *f.p;
  int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  R sink = static_cast<const R*>(p.sink)[h] * R(kLog2e);
  double sum = 0;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t q = 0; q < p.query_tokens; q++) {
      int64_t row = (b * p.heads + h) * p.query_tokens + q;
      R lse = static_cast<const R*>(p.lse)[row];
      if (lse == -infinity<R>()) continue;
      sum -= double(exp2_real(sink - lse)) * double(static_cast<const R*>(p.delta)[row]);
    }
  static_cast<R*>(p.grad_sink)[h] = R(sum);
}

// ---------------------------------------------------------------- the bias pass
// What a task of the bias pass owns: a slice [b][h] of the gradient and, of that, a panel of rows or a tile of columns.
struct BiasOwnership {
  int64_t batches, heads, units;
  bool by_row, by_column;
};
template <class R>
BiasOwnership bias_ownership(const Backward<R>& f) {
  const DotAttentionParams& p = *f.p;
  const int64_t* stride = p.grad_bias[f.bias].stride;
  BiasOwnership o;
  o.batches = stride[0] != 0 && !p.cu_seqlens_q ? p.batch : 1;  // packed sequences share one slice
  o.heads = stride[1] != 0 ? p.heads : 1;
  o.by_row = stride[2] != 0;
  o.by_column = !o.by_row && stride[3] != 0;
  o.units = o.by_row ? f.panels : o.by_column ? f.tiles : 1;
  return o;
}

template <class R>
void bias_task(const Backward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>;
  const DotAttentionParams& p = *f.p;
  const Tensor4& grad = p.grad_bias[f.bias];
  BiasOwnership o = bias_ownership(f);
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
        int64_t begin = first_key(c.band, q0) / kKeyTile * kKeyTile, end = end_key(c.band, q0 + nq - 1);
        if (o.by_column) {
          begin = begin > unit * kKeyTile ? begin : unit * kKeyTile;
          end = end < (unit + 1) * kKeyTile ? end : (unit + 1) * kKeyTile;
        }
        if (begin >= end) continue;
        GradPanel<R> panel = load_panel<R>(f, c, q0, nq, s, 0);
        for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
          int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
          ScoreTile<R> tile;
          if (!prepare_tile<R>(c, q0, nq, k0, nk, score_scratch, tile)) continue;
          Rows<R> keys = get_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, false, s.keys);
          Rows<R> values = get_rows<R>(p.value, c.key_offset(p.value, k0), nk, p.value_size, false, s.values);
          gradient_tile<R>(c, tile, keys, values, panel, false, s);
          add_bias_gradient<R>(c, grad, tile, s);
        }
      }
    }
}

// ---------------------------------------------------------------- schedules
enum class Schedule { kHeads, kParts, kTwoPasses };

// Pairs of a query and a key that one head of a sequence forms, roughly.
double sequence_work(const DotAttentionParams& p, int64_t b) {
  Sequence s = sequence_of(p, b);
  return double(s.queries) * double(s.keys);
}

// The schedule that should end first, by products a tile and by how evenly its tasks can be shared.
Schedule choose_schedule(const DotAttentionParams& p, int64_t threads, int64_t parts) {
  if (threads <= 1) return Schedule::kHeads;
  double total = 0, longest = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    double work = sequence_work(p, b);
    total += work * double(p.kv_heads);
    longest = work > longest ? work : longest;
  }
  int64_t key_heads = p.batch * p.kv_heads;
  double share = total / double(threads);
  // Equal tasks come in rounds; unequal ones, the longest first, end together but for the longest.
  double heads = total >= longest * double(key_heads) ? double((key_heads + threads - 1) / threads) * longest
                 : share > longest                    ? share
                                                      : longest;
  // Half of a task is what threads wait for each other at the end, one time with another. Parts load queries again.
  double part = longest / double(parts), by_parts = share > part ? share + 0.5 * part : part;
  double cost[] = {5.0 * heads, 5.15 * by_parts, 7.0 * share};
  if (cost[0] <= cost[1] && cost[0] <= cost[2]) return Schedule::kHeads;
  return parts > 1 && cost[1] <= cost[2] ? Schedule::kParts : Schedule::kTwoPasses;
}

// order = the sequences by falling work, equal ones as they come (shell sort: no header of the library).
void sort_by_work(const DotAttentionParams& p, int64_t* order, double* work) {
  for (int64_t b = 0; b < p.batch; b++) {
    order[b] = b;
    work[b] = sequence_work(p, b);
  }
  auto before = [&](int64_t x, int64_t y) { return work[x] != work[y] ? work[x] > work[y] : x < y; };
  for (int64_t gap = p.batch / 2; gap > 0; gap /= 2)
    for (int64_t i = gap; i < p.batch; i++) {
      int64_t b = order[i], j = i;
      for (; j >= gap && before(b, order[j - gap]); j -= gap) order[j] = order[j - gap];
      order[j] = b;
    }
}

template <class R, void (*TASK)(const Backward<R>&, int64_t)>
void run(const Backward<R>& f, int64_t tasks, bool serial) {
  parallel_tasks(
      tasks, serial, [](void* x, int64_t task) { TASK(*static_cast<const Backward<R>*>(x), task); },
      const_cast<Backward<R>*>(&f));
}

template <class R>
void backward(const DotAttentionParams& p) {
  constexpr int64_t W = kPanel<R>;
  Backward<R> f{};
  f.p = &p;
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  int64_t longest_q = p.query_tokens, longest_k = p.key_tokens;
  if (p.cu_seqlens_q) {
    longest_q = longest_k = 0;
    for (int64_t b = 0; b < p.batch; b++) {
      Sequence s = sequence_of(p, b);
      longest_q = s.query_rows > longest_q ? s.query_rows : longest_q;
      longest_k = s.keys > longest_k ? s.keys : longest_k;
    }
  }
  f.panels = (longest_q + W - 1) / W;
  f.blocks = (f.panels + kPanelsPerBlock - 1) / kPanelsPerBlock;
  f.tiles = (longest_k + kKeyTile - 1) / kKeyTile;
  f.tile_groups = (f.tiles + kTilesPerTask - 1) / kTilesPerTask;
  f.keys = p.grad_key.data || p.grad_value.data;
  f.queries = p.grad_query.data;
  int64_t heads = p.batch * p.heads, key_heads = p.batch * p.kv_heads;
  bool serial =
      double(heads) * double(longest_q) * double(longest_k) * double(p.head_size + p.value_size + 8) < kSerialWork / 2;

  int64_t pieces = (p.query_tokens + kDeltaRows - 1) / kDeltaRows;
  if (p.lse) run<R, delta_task<R>>(f, (p.cu_seqlens_q ? 1 : p.batch) * p.heads * pieces, serial);
  if (p.grad_sink) run<R, sink_task<R>>(f, p.heads, serial);

  f.rows_total = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.query_tokens;
  int64_t query_bytes = f.rows_total * f.depth_pad * int64_t(sizeof(R));
  f.parts = clamp_index(query_bytes > 0 ? kPartBytes / query_bytes : 1, 1,
                        clamp_index(f.tiles / kMinTilesPerPart, 1, kMaxParts));
  f.part_tiles = f.tiles > 0 ? (f.tiles + f.parts - 1) / f.parts : 1;

  int64_t threads = serial || p.threads < 1 ? 1 : p.threads;
  Schedule schedule = f.keys && f.queries ? choose_schedule(p, threads, f.parts) : Schedule::kTwoPasses;
  bool ragged = p.cu_seqlens_q || p.key_lengths || p.query_lengths;
  if (threads > 1 && ragged && schedule != Schedule::kTwoPasses) {
    int64_t* order = static_cast<int64_t*>(scratch(2, size_t(2 * p.batch) * sizeof(int64_t)));
    sort_by_work(p, order, reinterpret_cast<double*>(order + p.batch));
    f.order = order;
  }
  if (schedule == Schedule::kHeads) {
    run<R, head_task<R>>(f, key_heads, serial);
  } else if (schedule == Schedule::kParts) {
    f.part_query = static_cast<R*>(scratch(3, size_t(f.parts * query_bytes)));
    run<R, part_task<R>>(f, key_heads * f.parts, serial);
    run<R, part_sum_task<R>>(f, heads * f.blocks, serial);
  } else {
    if (f.keys) run<R, key_task<R>>(f, key_heads * f.tile_groups, serial);
    if (f.queries) run<R, query_task<R>>(f, heads * f.blocks, serial);
  }
  for (f.bias = 0; f.bias < 2; f.bias++)
    if (BiasOwner owner = bias_owner(p, f.bias);
        p.grad_bias[f.bias].data &&
        !(schedule == Schedule::kParts ? owner.by_both
                                       : (owner.by_queries && f.queries) || (owner.by_keys && f.keys))) {
      BiasOwnership o = bias_ownership(f);
      run<R, bias_task<R>>(f, o.batches * o.heads * o.units, serial);
    }
}

}  // namespace

void dot_attention_bwd(const DotAttentionParams& p) {
  if (p.query.dtype == DType::kFloat64)
    backward<double>(p);
  else
    backward<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
