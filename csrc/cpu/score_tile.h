// Everything that changes a score between q.k and the softmax, for one tile of 64 keys by one panel of queries:
// position bands and bounds, boolean masks, biases, ALiBi; what multiplies a finished weight, prior and dropout; and
// the products that must not let a masked NaN through.
#pragma once

#include "../core/masks.h"
#include "../core/online_softmax.h"
#include "../core/random.h"
#include "gemm_tile.h"
#include "mask_bits.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// One (sequence, head) of a call.
struct HeadContext {
  const AttentionParams* p;
  Sequence s;
  Band band;
  RowBounds bounds;
  int64_t h, kv_h;
  // Rows of a panel are the heads that share a key head (T_q = 1, grouped queries), all at position 0.
  int64_t group;  // 1 normally

  int64_t position(int64_t q) const { return group > 1 ? 0 : q; }
  int64_t query_offset(const Tensor4& t, int64_t q) const {
    return offset4(t, s.tensor_batch, h, s.query_begin + q, 0);
  }
  int64_t key_offset(const Tensor4& t, int64_t k) const { return offset4(t, s.tensor_batch, kv_h, s.key_begin + k, 0); }
  int64_t row(int64_t q) const { return row_index(*p, s, h, q); }
  KeyRange keys(int64_t q) const { return row_keys(band, bounds, q, position(q)); }
};
static inline HeadContext head_context(const AttentionParams& p, int64_t b, int64_t h, int64_t group = 1) {
  Sequence s = sequence_of(p, b);
  if (group > 1) {  // p.query_tokens counts the heads of a group; each has one query
    s.queries = p.query_lengths ? p.query_lengths[b] : 1;
    s.offset = p.causal == Causal::kBottomRight ? s.keys - s.queries : 0;
  }
  return {&p, s, band_of(p, s), row_bounds_of(p, s, h), h, group > 1 ? h : h / (p.heads / p.kv_heads), group};
}

// The smallest range that holds all keys which some row of a block sees; begin >= end if there are none.
static inline KeyRange seen_by_rows(const HeadContext& c, int64_t q0, int64_t rows) {
  if (!c.bounds.data) return {first_key(c.band, c.position(q0)), end_key(c.band, c.position(q0 + rows - 1))};
  KeyRange all{c.band.keys, 0};
  for (int64_t q = q0; q < q0 + rows; q++) {
    KeyRange own = c.keys(q);
    all.begin = own.begin < all.begin ? own.begin : all.begin;
    all.end = own.end > all.end ? own.end : all.end;
  }
  return all;
}
// The same, begin on a tile.
static inline KeyRange visible_keys(const HeadContext& c, int64_t q0, int64_t rows) {
  KeyRange seen = seen_by_rows(c, q0, rows);
  return {seen.begin / kKeyTile * kKeyTile, seen.end};
}

template <class R>
struct ScoreTile {
  LaneBands bands;
  bool limited;              // some key is invisible to some row by position
  const int32_t* row_begin;  // [panel] the keys that each row sees by position, counted from k0, if rows bring windows
  const int32_t* row_end;    // of their own; else null
  const R* add;              // [keys][panel] base-2 addend, anything where `bits` hides the key; null if there is none
  const uint64_t* bits;      // [keys] the queries that see the key, by position and by every tensor; null if all do
  int64_t q0, k0;
  int nq, nk;
  int skip;  // keys before k0 that the caller's tile has and this panel does not see

  const LaneBands* bands_or_null() const { return limited ? &bands : nullptr; }
  bool masked() const { return bits != nullptr; }  // some entry is masked, by position or by a tensor
  bool plain() const { return !add && !bits; }
  bool visible(int q, int k) const { return !bits || (bits[k] >> q & 1); }
  // x = the score with its addend, or -inf where masked. Selected, not multiplied: x may be NaN there.
  ATTNFAST_LAMBDA inline Vec<R> modify(Vec<R> x, int key, int j) const {
    constexpr int N = kLanes<R>;
    if (add) x += load(add + key * kPanel<R> + N * j);
    if (bits) x = select_bits<R>(bits[key] >> (N * j), x, splat(-infinity<R>()));
    return x;
  }
};

// f(i) for every vector [key][panel] of a tile that holds a query.
template <class R, class F>
ATTNFAST_INLINE void for_live_vectors(const ScoreTile<R>& tile, F f) {
  for (int k = 0; k < tile.nk; k++)
    for (int q = 0; q < tile.nq; q += kLanes<R>) f(k * kPanel<R> + q);
}

// The keys that each row of a panel sees where rows bring windows, kept while the panels of a block take turns.
struct PanelKeys {
  const int64_t* bounds = nullptr;  // whose rows these are; null: nobody's yet
  int64_t batch = 0, q0 = 0;
  int nq = 0;
  KeyRange all;  // the smallest range that holds them
  KeyRange row[kKeyTile];
};

// Scratch of the score modifications: an addend tile and room to load a tensor tile.
template <class R>
struct ScoreScratch {
  R *add, *rows, *tile;
  uint64_t bits[kKeyTile];
  int32_t row_begin[kKeyTile], row_end[kKeyTile];
  PanelKeys panels[kPanelsPerBlock];
  static int64_t size() { return 3 * int64_t(kKeyTile) * kPanel<R>; }
  explicit ScoreScratch(R* base) : add(base), rows(base + kKeyTile * kPanel<R>), tile(rows + kKeyTile * kPanel<R>) {}
};

// dst[key][query] = scale * t[b, h, q0 + query, k0 + key] as R, q0 and k0 counted from the sequence's first token (`t`
// is indexed by packed token); lanes past nq are zero.
template <class R>
static void load_tile_transposed(const Tensor4& t, const HeadContext& c, const ScoreTile<R>& tile, R* rows, R* dst,
                                 R scale = R(1)) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int64_t offset = offset4(t, c.s.tensor_batch, c.h, c.s.query_begin + tile.q0, c.s.key_begin + tile.k0);
  if (t.stride[2] == 0) {  // one row serves every query
    load_rows<R>(t, offset, 1, tile.nk, rows, kKeyTile);
    for (int k = 0; k < tile.nk; k++)
      for (int q = 0; q < tile.nq; q += N) store(dst + k * W + q, splat(rows[k] * scale));
  } else if (t.stride[3] == 0) {  // one column serves every key
    Tensor4 column = t;
    column.stride[3] = t.stride[2];
    for (int q = 0; q < W; q++) rows[q] = R(0);
    load_rows<R>(column, offset, 1, tile.nq, rows, W);
    for (int k = 0; k < tile.nk; k++)
      for (int q = 0; q < tile.nq; q += N) store(dst + k * W + q, load(rows + q) * scale);
  } else {
    Rows<R> source{static_cast<const R*>(t.data) + offset, t.stride[2]};
    if (t.dtype != kRealType<R> || t.stride[3] != 1 || tile.nk % N != 0) {
      load_rows<R>(t, offset, tile.nq, tile.nk, rows, kKeyTile);
      source = {rows, kKeyTile};
    }
    pack_transposed<R>(source, tile.nq, tile.nk, dst, scale);
  }
}

static inline bool has_addend(const AttentionParams& p) { return p.bias[0].data || p.bias[1].data || p.alibi_slopes; }

// ALiBi in base 2: -slope * |q + offset - k|.
template <class R>
static void add_alibi(const HeadContext& c, const ScoreTile<R>& tile, R* add) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  alignas(64) R slope[W];
  alignas(64) R position[W];
  for (int q = 0; q < W; q++) {
    int64_t head = c.group > 1 ? c.h * c.group + (q < tile.nq ? q : 0) : c.h;
    slope[q] =
        R(kLog2e) * static_cast<const R*>(p.alibi_slopes)[c.s.batch * p.alibi_stride[0] + head * p.alibi_stride[1]];
    position[q] = R(c.position(tile.q0 + q) + c.band.offset - tile.k0);
  }
  for (int k = 0; k < tile.nk; k++)
    for (int q = 0; q < tile.nq; q += N) {
      Vec<R> d = load(position + q) - R(k);
      d = d < R(0) ? -d : d;
      store(add + k * W + q, -load(slope + q) * d);
    }
}

// add (+)= scaled if every sum is above -inf, as it is unless a bias masks or is out of range; else false, and nothing
// is done. NaN counts as above. If `fresh`, the sum is `scaled` itself, which is then `add`.
template <class R>
static bool add_finite_bias(const ScoreTile<R>& tile, const R* scaled, bool fresh, R* add) {
  Vec<R> least{};
  for_live_vectors(tile, [&](int i) ATTNFAST_LAMBDA {
    Vec<R> x = fresh ? load(scaled + i) : load(scaled + i) + load(add + i);
    least = x < least ? x : least;
  });
  if (minus_infinity_bits<R>(least)) return false;
  if (!fresh) for_live_vectors(tile, [&](int i) ATTNFAST_LAMBDA { store(add + i, load(scaled + i) + load(add + i)); });
  return true;
}

// The same for any bias: add (+)= log2(e) * bias. A finite bias stays finite (finfo.min is a number); -inf masks, which
// is noted in `bits`.
template <class R>
static void add_masking_bias(const ScoreTile<R>& tile, const R* bias, bool fresh, R* add, uint64_t* bits) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  constexpr R kLowest = std::is_same_v<R, double> ? R(-__DBL_MAX__) : R(-__FLT_MAX__);
  for (int k = 0; k < tile.nk; k++)
    for (int q = 0; q < tile.nq; q += N) {
      Vec<R> x = load(bias + k * W + q), sum = (fresh ? Vec<R>{} : load(add + k * W + q)) + x * R(kLog2e);
      store(add + k * W + q, sum < kLowest ? splat(kLowest) : sum);
      bits[k] &= ~(minus_infinity_bits<R>(x) << q);
    }
}

static inline bool any_bit(const uint64_t* bits, int count) {
  uint64_t any = 0;
  for (int i = 0; i < count; i++) any |= bits[i];
  return any != 0;
}
static inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }

template <class R>
static const PanelKeys& panel_keys(const HeadContext& c, int64_t q0, int nq, ScoreScratch<R>& scratch) {
  PanelKeys& panel = scratch.panels[q0 / kPanel<R> % kPanelsPerBlock];
  if (panel.bounds == c.bounds.data && panel.batch == c.s.batch && panel.q0 == q0 && panel.nq == nq) return panel;
  panel.bounds = c.bounds.data;
  panel.batch = c.s.batch;
  panel.q0 = q0;
  panel.nq = nq;
  panel.all = {c.band.keys, 0};
  for (int q = 0; q < nq; q++) {
    KeyRange own = panel.row[q] = c.keys(q0 + q);
    panel.all.begin = own.begin < panel.all.begin ? own.begin : panel.all.begin;
    panel.all.end = own.end > panel.all.end ? own.end : panel.all.end;
  }
  return panel;
}

// Rows with windows of their own: the part of each that lies in the tile, `bits`, and bands around them. False if there
// is none.
template <class R>
static bool place_rows(const PanelKeys& panel, ScoreScratch<R>& scratch, ScoreTile<R>& tile) {
  constexpr int W = kPanel<R>;
  bool seen = false, limited = false;
  uint64_t* bits = scratch.bits;
  for (int q = 0; q < kKeyTile; q++) {
    bits[q] = 0;
    scratch.row_begin[q] = tile.nk;
    scratch.row_end[q] = 0;
    if (q >= tile.nq) continue;
    KeyRange keys = panel.row[q];
    int begin = int(clamp_index(keys.begin - tile.k0, 0, tile.nk)),
        end = int(clamp_index(keys.end - tile.k0, 0, tile.nk));
    limited |= begin > 0 || end < tile.nk;
    if (begin >= end) continue;
    seen = true;
    bits[q] = low_bits(end) & ~low_bits(begin);
    scratch.row_begin[q] = begin;
    scratch.row_end[q] = end;
  }
  if (!seen) return false;
  tile.limited = limited;
  tile.row_begin = scratch.row_begin;
  tile.row_end = scratch.row_end;
  if (!limited) return true;
  transpose_bits(bits);
  for (int k = 0; k < tile.nk; k++) {
    tile.bands.begin[k] = bits[k] ? __builtin_ctzll(bits[k]) : W;
    tile.bands.end[k] = bits[k] ? 64 - __builtin_clzll(bits[k]) : 0;
  }
  return true;
}

// Fills `tile` for the panel at q0 and the keys at k0; false if nothing in it is visible (skip it). Keys at either end
// that no row of the panel sees by position are left out, kSkip at a time: the tile begins `skip` keys after k0.
constexpr int kSkip = 4;  // a draw of dropout serves four keys, a pair of bfloat16 two
template <class R>
static bool prepare_tile(const HeadContext& c, int64_t q0, int nq, int64_t k0, int nk, ScoreScratch<R>& scratch,
                         ScoreTile<R>& tile) {
  constexpr int W = kPanel<R>;
  const AttentionParams& p = *c.p;
  tile.q0 = q0;
  tile.nq = nq;
  tile.row_begin = tile.row_end = nullptr;
  int64_t first = c.position(q0), last = c.position(q0 + nq - 1);
  KeyRange seen{first_key(c.band, first), end_key(c.band, last)};
  if (c.bounds.data) seen = panel_keys<R>(c, q0, nq, scratch).all;
  if (seen.begin >= k0 + nk || seen.end <= k0) return false;
  tile.skip = seen.begin > k0 ? int(seen.begin - k0) / kSkip * kSkip : 0;
  k0 += tile.skip;
  nk -= tile.skip;
  int64_t wanted = (seen.end - k0 + kSkip - 1) / kSkip * kSkip;
  nk = wanted < nk ? int(wanted) : nk;
  tile.k0 = k0;
  tile.nk = nk;
  if (c.bounds.data) {
    if (!place_rows<R>(panel_keys<R>(c, q0, nq, scratch), scratch, tile)) return false;
  } else {
    tile.limited = first_key(c.band, last) > k0 || end_key(c.band, first) < k0 + nk;
  }
  if (tile.limited && !c.bounds.data)
    for (int k = 0; k < nk; k++) {
      if (c.group > 1) {  // every row stands at position 0
        bool seen = k0 + k >= first_key(c.band, 0) && k0 + k < end_key(c.band, 0);
        tile.bands.begin[k] = 0;
        tile.bands.end[k] = seen ? W : 0;
      } else {
        tile.bands.begin[k] = int32_t(clamp_index(first_query(c.band, k0 + k) - q0, 0, W));
        tile.bands.end[k] = int32_t(clamp_index(end_query(c.band, k0 + k) - q0, 0, W));
      }
    }
  tile.add = nullptr;
  uint64_t* bits = scratch.bits;
  uint64_t all = low_bits(nq);
  bool hides = tile.limited;
  if (p.mask.data) {
    uint64_t own[kKeyTile];
    if (tile.row_begin)
      for (int k = 0; k < nk; k++) own[k] = tile.limited ? bits[k] : all;
    int64_t offset = offset4(p.mask, c.s.tensor_batch, c.h, c.s.query_begin + q0, c.s.key_begin + k0);
    load_mask_bits(p.mask, offset, nq, nk, bits);
    if (tile.row_begin)
      for (int k = 0; k < nk; k++) bits[k] &= own[k];
    for (int k = 0; k < nk && !hides; k++) hides = bits[k] != all;
  } else if (tile.limited && !tile.row_begin) {
    for (int k = 0; k < nk; k++) bits[k] = all;
  }
  if (tile.limited && !tile.row_begin)
    for (int k = 0; k < nk; k++) bits[k] &= low_bits(tile.bands.end[k]) & ~low_bits(tile.bands.begin[k]);
  if (hides && !any_bit(bits, nk)) return false;

  R* add = scratch.add;
  bool fresh = !p.alibi_slopes;
  if (!fresh) add_alibi<R>(c, tile, add);
  for (const Tensor4& bias : p.bias)
    if (bias.data) {
      R* dst = fresh ? add : scratch.tile;
      load_tile_transposed<R>(bias, c, tile, scratch.rows, dst, R(kLog2e));
      if (!add_finite_bias<R>(tile, dst, fresh, add)) {
        if (!hides && !p.mask.data) {
          for (int k = 0; k < nk; k++) bits[k] = all;
        }
        hides = true;
        load_tile_transposed<R>(bias, c, tile, scratch.rows, dst);
        add_masking_bias<R>(tile, dst, fresh, add, bits);
      }
      fresh = false;
    }
  if (has_addend(p)) tile.add = add;
  tile.bits = hides ? bits : nullptr;
  return !hides || any_bit(bits, nk);
}

// keep[key][query] = 1 / (1 - p) or 0. A draw stands in the low half of a 64-bit lane, so that the products of a round
// are single instructions and nothing is moved between halves; what is above is carried along and ignored.
template <class R>
static void dropout_tile(const HeadContext& c, const ScoreTile<R>& tile, R* keep) {
  constexpr int N = kLanes<uint64_t>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  uint64_t threshold = dropout_threshold(p.dropout_p);
  R scale = R(dropout_scale(p.dropout_p));
  if (threshold >> 32) {
    for_live_vectors(tile, [&](int i) ATTNFAST_LAMBDA { store(keep + i, Vec<R>{}); });
    return;
  }
  uint64_t keys[kPhiloxRounds][2];
  for (int i = 0; i < kPhiloxRounds; i++) {
    keys[i][0] = uint32_t(uint32_t(p.seed) + uint32_t(i) * kPhiloxW0);
    keys[i][1] = uint32_t(uint32_t(p.seed >> 32) + uint32_t(i) * kPhiloxW1);
  }
  constexpr int kPairs = kLanes<R> == N ? 1 : 2;  // vectors of draws for a vector of R
  for (int q = 0; q < tile.nq; q += kLanes<R>) {
    U64 row[kPairs];
    for (int i = 0; i < kPairs; i++) {
      for (int lane = 0; lane < N; lane++) row[i][lane] = uint64_t(c.row(tile.q0)) + uint64_t(q + kPairs * lane + i);
    }
    for (int k = 0; k < tile.nk; k += 4) {
      U64 word[kPairs][4];
      ATTNFAST_UNROLL for (int v = 0; v < kPairs; v++) {
        U64 c0 = U64{} + uint64_t((tile.k0 + k) >> 2), c1 = row[v], c2 = row[v] >> 32, c3 = U64{} + uint32_t(p.offset);
        ATTNFAST_UNROLL for (int i = 0; i < kPhiloxRounds; i++) {
          U64 a = multiply_low(c0, kPhiloxM0), b = multiply_low(c2, kPhiloxM1);
          c0 = (b >> 32) ^ c1 ^ keys[i][0];
          c2 = (a >> 32) ^ c3 ^ keys[i][1];
          c1 = b;
          c3 = a;
        }
        word[v][0] = c0;
        word[v][1] = c1;
        word[v][2] = c2;
        word[v][3] = c3;
      }
      for (int w = 0; w < 4 && k + w < tile.nk; w++) {
        R* out = keep + (k + w) * W + q;
        if constexpr (kPairs == 1) {
          store(out, (word[0][w] & 0xffffffffu) >= threshold ? splat(scale) : Vec<R>{});
        } else {  // even queries are in the low halves of one vector, odd ones in those of the other
          constexpr int kLow = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 1;
          U32 draw = reinterpret_cast<U32>((word[kLow][w] & 0xffffffffu) | word[1 - kLow][w] << 32);
          store(out, draw >= uint32_t(threshold) ? splat(scale) : Vec<R>{});
        }
      }
    }
  }
}

// ---------------------------------------------------------------- what multiplies a weight after the softmax
static inline bool has_factor(const AttentionParams& p) { return p.dropout_p > 0 || p.prior_sigma > 0; }
// 1 / sigma, finite: a distance of 0 must stay 0.
template <class R>
static R prior_rate(const AttentionParams& p) {
  constexpr double kLargest = std::is_same_v<R, double> ? __DBL_MAX__ : double(__FLT_MAX__);
  return p.prior_sigma * kLargest > 1.0 ? R(1.0 / p.prior_sigma) : R(kLargest);
}
// The centres of a panel's rows, counted from the tile's first key.
template <class R>
static void prior_centers(const HeadContext& c, const ScoreTile<R>& tile, R* center) {
  const R* source = static_cast<const R*>(c.p->prior_center) + c.row(tile.q0);
  for (int q = 0; q < kPanel<R>; q++) center[q] = q < tile.nq ? source[q] : R(0);
}
// (key - center) / sigma; the position is exact, so that the difference is rounded once.
template <class R>
ATTNFAST_INLINE Vec<R> prior_distance(const ScoreTile<R>& tile, int k, Vec<R> center, R rate) {
  return (R(tile.k0 + k) - center) * rate;
}

// factor[key][query] = prior * keep. A hidden weight has factor 0 whatever its centre; a dropped one too.
template <class R>
static void factor_tile(const HeadContext& c, const ScoreTile<R>& tile, R* factor) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  bool dropout = p.dropout_p > 0;
  if (dropout) dropout_tile<R>(c, tile, factor);
  if (!(p.prior_sigma > 0)) return;
  const R* table = exp2_table<R>();
  R rate = prior_rate<R>(p), half = R(-0.5 * kLog2e);
  alignas(64) R center[W];
  prior_centers<R>(c, tile, center);
  for (int k = 0; k < tile.nk; k++)
    for (int q = 0; q < tile.nq; q += N) {
      Vec<R> d = prior_distance<R>(tile, k, load(center + q), rate), x = exp2v<R>(d * d * half, table);
      if (dropout) {
        Vec<R> keep = load(factor + k * W + q);
        x = keep == R(0) ? Vec<R>{} : x * keep;
      }
      if (tile.bits) x = select_bits<R>(tile.bits[k] >> q, x, Vec<R>{});
      store(factor + k * W + q, x);
    }
}

// ---------------------------------------------------------------- second products
// Products that contract over the keys of a tile (P V, dS K) or over its queries (P^T dO, dS^T Q). A masked entry has
// weight exactly 0, and 0 * NaN would leak a masked NaN: if the tile has masked entries and the operand has non-finite
// rows, those rows are zeroed for the fast product and then added entry by entry, for visible entries only.

template <class R>
struct CleanRows {
  Rows<R> rows;
  bool bad[kKeyTile > kPanel<R> ? kKeyTile : kPanel<R>];
};
template <class R>
__attribute__((noinline)) void zero_nonfinite(Rows<R> rows, int count, int64_t cols, R* scratch, CleanRows<R>& clean) {
  int64_t stride = padded<R>(cols);
  for (int i = 0; i < count; i++) {
    clean.bad[i] = has_nonfinite<R>({rows.data + i * rows.stride, rows.stride}, 1, cols);
    for (int64_t j = 0; j < stride; j++)
      scratch[i * stride + j] = clean.bad[i] || j >= cols ? R(0) : rows.data[i * rows.stride + j];
  }
  clean.rows = {scratch, stride};
}

// The keys [k0, k1) of a tile that some of m queries from r see, and the queries that see some of m keys.
template <class R>
ATTNFAST_INLINE void seen_keys(const HeadContext& c, const ScoreTile<R>& tile, int r, int m, int64_t& k0, int64_t& k1) {
  if (!tile.limited) return;
  if (tile.row_begin) {
    k0 = tile.row_begin[r];
    k1 = tile.row_end[r];
    for (int i = r + 1; i < r + m; i++) {
      k0 = tile.row_begin[i] < k0 ? tile.row_begin[i] : k0;
      k1 = tile.row_end[i] > k1 ? tile.row_end[i] : k1;
    }
    return;
  }
  k0 = clamp_index(first_key(c.band, c.position(tile.q0 + r)) - tile.k0, 0, tile.nk);
  k1 = clamp_index(end_key(c.band, c.position(tile.q0 + r + m - 1)) - tile.k0, 0, tile.nk);
}
template <class R>
ATTNFAST_INLINE void seeing_queries(const ScoreTile<R>& tile, int r, int m, int64_t& q0, int64_t& q1) {
  if (!tile.limited) return;
  int first, last;
  tile.bands.hull(r, m, first, last);
  q0 = first;
  q1 = last < tile.nq ? last : tile.nq;
}

// The keys that some query of vector j sees; elsewhere every entry of the vector is hidden.
template <class R>
ATTNFAST_INLINE void keys_of_vector(const HeadContext& c, const ScoreTile<R>& tile, int j, int& k0, int& k1) {
  constexpr int N = kLanes<R>;
  int64_t first = 0, last = tile.nk;
  seen_keys<R>(c, tile, N * j, N * j + N < tile.nq ? N : tile.nq - N * j, first, last);
  k0 = int(first < last ? first : 0);
  k1 = int(first < last ? last : 0);
}
// Clears the entries of vector j at all other keys.
template <class R>
ATTNFAST_INLINE void clear_other_keys(const ScoreTile<R>& tile, int j, int k0, int k1, R* P) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  for (int k = 0; k < k0; k++) store(P + k * W + N * j, Vec<R>{});
  for (int k = k1; k < tile.nk; k++) store(P + k * W + N * j, Vec<R>{});
}

// C[query] (+)= sum over keys of P[key][query] * B[key]
template <class R>
__attribute__((noinline)) void accumulate_by_query(const HeadContext& c, const ScoreTile<R>& tile, const R* P,
                                                   Rows<R> B, int64_t cols, R* C, int64_t sc, bool fresh, R* scratch) {
  constexpr int W = kPanel<R>;
  int vectors = int(padded<R>(cols) / kLanes<R>);
  auto range = [&](auto m, int r, int64_t& k0, int64_t& k1)
                   ATTNFAST_LAMBDA { seen_keys<R>(c, tile, r, decltype(m)::value, k0, k1); };
  CleanRows<R> clean{B, {}};
  bool dirty = tile.masked() && has_nonfinite<R>(B, tile.nk, cols);
  if (dirty) zero_nonfinite<R>(B, tile.nk, cols, scratch, clean);
  multiply_panel<R, true, R>(tile.nq, tile.nk, P, W, clean.rows, C, sc, vectors, fresh, range);
  for (int k = 0; dirty && k < tile.nk; k++)
    for (int q = 0; clean.bad[k] && q < tile.nq; q++)
      if (tile.visible(q, k))
        for (int64_t d = 0; d < cols; d++) C[q * sc + d] += P[k * W + q] * B.data[k * B.stride + d];
}

// C[key] += sum over queries of P[key][query] * B[query]
template <class R>
__attribute__((noinline)) void accumulate_by_key(const ScoreTile<R>& tile, const R* P, Rows<R> B, int64_t cols, R* C,
                                                 int64_t sc, R* scratch) {
  constexpr int W = kPanel<R>;
  int vectors = int(padded<R>(cols) / kLanes<R>);
  auto range = [&](auto m, int r, int64_t& q0, int64_t& q1)
                   ATTNFAST_LAMBDA { seeing_queries<R>(tile, r, decltype(m)::value, q0, q1); };
  CleanRows<R> clean{B, {}};
  bool dirty = tile.masked() && has_nonfinite<R>(B, tile.nq, cols);
  if (dirty) zero_nonfinite<R>(B, tile.nq, cols, scratch, clean);
  multiply_panel<R, false, R>(tile.nk, tile.nq, P, W, clean.rows, C, sc, vectors, false, range);
  for (int q = 0; dirty && q < tile.nq; q++)
    for (int k = 0; clean.bad[q] && k < tile.nk; k++)
      if (tile.visible(q, k))
        for (int64_t d = 0; d < cols; d++) C[k * sc + d] += P[k * W + q] * B.data[q * B.stride + d];
}

// ---------------------------------------------------------------- the same products of bfloat16 pairs
// P is rounded, as torch rounds it; the sums are float32. A range grows to whole pairs, which adds exact zeros. Rows
// that are not finite are treated as above, with the rounded P.

// A finished tile P[key][query], rounded: rows[key][query] if not null, pairs[key / 2][query] of keys if not null.
// Queries past nq and the partner of an odd last key are zeros.
template <class R>
__attribute__((noinline)) void round_tile(const ScoreTile<R>& tile, const R* P, BFloat16* rows, uint32_t* pairs) {
#if ATTNFAST_PAIRS
  constexpr int N = kLanes<R>, W = kPanel<R>;
  for (int k = 0; k < tile.nk; k += 2)
    for (int q = 0; q < tile.nq; q += N) {
      Vec<R> a = load(P + k * W + q), b = k + 1 < tile.nk ? load(P + (k + 1) * W + q) : Vec<R>{};
      if (q + N > tile.nq) {
        a = select_bits<R>(low_bits(tile.nq - q), a, Vec<R>{});
        b = select_bits<R>(low_bits(tile.nq - q), b, Vec<R>{});
      }
      U32 two = round_two(a, b);
      if (rows) store_halves(rows + k * W + q, rows + (k + 1) * W + q, two);
      if (pairs) store(pairs + k / 2 * W + q, interleave_halves(two));
    }
#endif
}

ATTNFAST_INLINE float half_of(uint32_t word, int i) {
  uint32_t bits = i % 2 ? word & 0xffff0000u : word << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
// A copy of B in scratch without the rows that are not finite, which `bad` then names.
[[maybe_unused]] static PairRows zero_nonfinite_pairs(const PairRows& B, int count, uint32_t* scratch, bool* bad) {
  constexpr uint32_t kExponent = 0x7f80;
  for (int i = 0; i < count; i += 2) {
    const uint32_t* from = B.words + i / 2 * B.stride;
    uint32_t* to = scratch + i / 2 * B.stride;
    bad[i] = bad[i + 1] = false;
    for (int64_t j = 0; j < B.stride; j++) {
      bad[i] |= (from[j] & kExponent) == kExponent;
      bad[i + 1] |= (from[j] >> 16 & kExponent) == kExponent;
    }
    uint32_t kept = (bad[i] ? 0 : 0xffffu) | (bad[i + 1] ? 0 : 0xffff0000u);
    for (int64_t j = 0; j < B.stride; j++) to[j] = from[j] & kept;
  }
  return {scratch, B.stride, true};
}

// C[query] (+)= sum over keys of P[key][query] * B[key], P in pairs of keys
template <class R>
__attribute__((noinline)) void accumulate_pairs_by_query(const HeadContext& c, const ScoreTile<R>& tile,
                                                         const uint32_t* P, const PairRows& B, int64_t cols, R* C,
                                                         int64_t sc, bool fresh, R* scratch) {
  constexpr int W = kPanel<R>;
  auto range = [&](auto m, int r, int64_t& k0, int64_t& k1) ATTNFAST_LAMBDA {
    if (!tile.limited) return;
    seen_keys<R>(c, tile, r, decltype(m)::value, k0, k1);
    k0 = k0 / 2;
    k1 = (k1 + 1) / 2;
  };
  bool bad[kKeyTile], dirty = tile.masked() && !B.finite;
  PairRows clean = dirty ? zero_nonfinite_pairs(B, tile.nk, reinterpret_cast<uint32_t*>(scratch), bad) : B;
  multiply_panel<R, true, uint32_t>(tile.nq, (tile.nk + 1) / 2, P, W, {clean.words, clean.stride}, C, sc,
                                    int(padded<R>(cols) / kLanes<R>), fresh, range);
  for (int k = 0; dirty && k < tile.nk; k++)
    for (int q = 0; bad[k] && q < tile.nq; q++)
      if (tile.visible(q, k))
        for (int64_t d = 0; d < cols; d++)
          C[q * sc + d] += half_of(P[k / 2 * W + q], k) * half_of(B.words[k / 2 * B.stride + d], k);
}
// C[key] += sum over queries of P[key][query] * B[query]
template <class R>
__attribute__((noinline)) void accumulate_pairs_by_key(const ScoreTile<R>& tile, const BFloat16* P, const PairRows& B,
                                                       int64_t cols, R* C, int64_t sc, R* scratch) {
  constexpr int W = kPanel<R>;
  auto range = [&](auto m, int r, int64_t& q0, int64_t& q1) ATTNFAST_LAMBDA {
    if (!tile.limited) return;
    seeing_queries<R>(tile, r, decltype(m)::value, q0, q1);
    q0 = q0 / 2;
    q1 = (q1 + 1) / 2;
  };
  bool bad[W], dirty = tile.masked() && !B.finite;
  PairRows clean = dirty ? zero_nonfinite_pairs(B, tile.nq, reinterpret_cast<uint32_t*>(scratch), bad) : B;
  multiply_panel<R, false, BFloat16>(tile.nk, (tile.nq + 1) / 2, P, W, {clean.words, clean.stride}, C, sc,
                                     int(padded<R>(cols) / kLanes<R>), false, range);
  for (int q = 0; dirty && q < tile.nq; q++)
    for (int k = 0; bad[q] && k < tile.nk; k++)
      if (tile.visible(q, k))
        for (int64_t d = 0; d < cols; d++)
          C[k * sc + d] += load_one<float>(P + k * W + q) * half_of(B.words[q / 2 * B.stride + d], q);
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
