// Everything that changes a score between q.k and the softmax, for one tile of 64 keys by one panel of queries:
// position bands, boolean masks, biases, ALiBi; dropout; and the products that must not let a masked NaN through.
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
  int64_t h, kv_h;
  // Rows of a panel are the heads that share a key head (T_q = 1, grouped queries), all at position 0.
  int64_t group;  // 1 normally

  int64_t position(int64_t q) const { return group > 1 ? 0 : q; }
  int64_t query_offset(const Tensor4& t, int64_t q) const {
    return offset4(t, s.tensor_batch, h, s.query_begin + q, 0);
  }
  int64_t key_offset(const Tensor4& t, int64_t k) const { return offset4(t, s.tensor_batch, kv_h, s.key_begin + k, 0); }
  int64_t row(int64_t q) const { return row_index(*p, s, h, q); }
};
static inline HeadContext head_context(const AttentionParams& p, int64_t b, int64_t h, int64_t group = 1) {
  Sequence s = sequence_of(p, b);
  if (group > 1) {  // p.query_tokens counts the heads of a group; each has one query
    s.queries = p.query_lengths ? p.query_lengths[b] : 1;
    s.offset = p.causal == Causal::kBottomRight ? s.keys - s.queries : 0;
  }
  return {&p, s, band_of(p, s), h, group > 1 ? h : h / (p.heads / p.kv_heads), group};
}

template <class R>
struct ScoreTile {
  LaneBands bands;
  bool limited;          // some key is invisible to some row by position
  bool masked;           // some entry is masked, by position or by a tensor
  const R* add;          // [keys][panel] base-2 addend, -inf where a bias masks; null if there is none
  const uint64_t* bits;  // [keys] the queries that the boolean mask lets see the key; null if it hides nothing here
  int64_t q0, k0;
  int nq, nk;

  const LaneBands* bands_or_null() const { return limited ? &bands : nullptr; }
  bool plain() const { return !add && !limited && !bits; }
  bool visible(int q, int k) const {
    if (limited && (q < bands.begin[k] || q >= bands.end[k])) return false;
    if (bits && !(bits[k] >> q & 1)) return false;
    return !add || add[k * kPanel<R> + q] != -infinity<R>();
  }
  // x = the score with its addend, or -inf where masked. Selected, not multiplied: x may be NaN there.
  ATTNFAST_LAMBDA inline Vec<R> modify(Vec<R> x, int key, int j) const {
    constexpr int N = kLanes<R>;
    using I = MaskInt<R>;
    using U = std::make_unsigned_t<I>;
    if (add) {
      Vec<R> a = load(add + key * kPanel<R> + N * j);
      x = a == -infinity<R>() ? splat(-infinity<R>()) : x + a;
    }
    if (bits) {
      Vec<U> lane = (Vec<U>{} + U(1)) << reinterpret_cast<Vec<U>>(iota<I>());
      x = ((Vec<U>{} + U(bits[key] >> (N * j))) & lane) != U(0) ? x : splat(-infinity<R>());
    }
    if (limited) {
      Vec<U> lane = reinterpret_cast<Vec<U>>(iota<I>()) + U(N * j - bands.begin[key]);
      U width = bands.end[key] > bands.begin[key] ? U(bands.end[key] - bands.begin[key]) : U(0);
      x = lane < width ? x : splat(-infinity<R>());
    }
    return x;
  }
};

// f(i) for every vector [key][panel] of a tile that holds a query.
template <class R, class F>
ATTNFAST_INLINE void for_live_vectors(const ScoreTile<R>& tile, F f) {
  for (int k = 0; k < tile.nk; k++)
    for (int q = 0; q < tile.nq; q += kLanes<R>) f(k * kPanel<R> + q);
}

// Scratch of the score modifications: an addend tile and room to load a tensor tile.
template <class R>
struct ScoreScratch {
  R *add, *rows, *tile;
  uint64_t bits[kKeyTile];
  static int64_t size() { return 3 * int64_t(kKeyTile) * kPanel<R>; }
  explicit ScoreScratch(R* base) : add(base), rows(base + kKeyTile * kPanel<R>), tile(rows + kKeyTile * kPanel<R>) {}
};

// dst[key][query] = t[b, h, q0 + query, k0 + key] as R, q0 and k0 counted from the sequence's first token (`t` is
// indexed by packed token); lanes past nq are zero.
template <class R>
static void load_tile_transposed(const Tensor4& t, const HeadContext& c, const ScoreTile<R>& tile, R* rows, R* dst) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int64_t offset = offset4(t, c.s.tensor_batch, c.h, c.s.query_begin + tile.q0, c.s.key_begin + tile.k0);
  if (t.stride[2] == 0) {  // one row serves every query
    load_rows<R>(t, offset, 1, tile.nk, rows, kKeyTile);
    for (int k = 0; k < tile.nk; k++)
      for (int q = 0; q < tile.nq; q += N) store(dst + k * W + q, splat(rows[k]));
  } else if (t.stride[3] == 0) {  // one column serves every key
    Tensor4 column = t;
    column.stride[3] = t.stride[2];
    for (int q = 0; q < W; q++) rows[q] = R(0);
    load_rows<R>(column, offset, 1, tile.nq, rows, W);
    for (int k = 0; k < tile.nk; k++)
      for (int q = 0; q < tile.nq; q += N) store(dst + k * W + q, load(rows + q));
  } else {
    Rows<R> source{static_cast<const R*>(t.data) + offset, t.stride[2]};
    if (t.dtype != kRealType<R> || t.stride[3] != 1 || tile.nk % N != 0) {
      load_rows<R>(t, offset, tile.nq, tile.nk, rows, kKeyTile);
      source = {rows, kKeyTile};
    }
    pack_transposed<R>(source, tile.nq, tile.nk, dst, R(1));
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

// add = (fresh ? 0 : add) + log2(e) * bias; false if that masks every entry of the tile. Notes masked entries in
// `tile`.
template <class R>
static bool add_bias(ScoreTile<R>& tile, const R* bias, bool fresh, R* add) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  using I = MaskInt<R>;
  constexpr R kLowest = std::is_same_v<R, double> ? R(-__DBL_MAX__) : R(-__FLT_MAX__);
  bool any_visible = false;
  for (int q = 0; q < tile.nq; q += N) {
    Vec<I> seen{}, hidden{};
    for (int k = 0; k < tile.nk; k++) {
      Vec<R> x = load(bias + k * W + q), before = fresh ? Vec<R>{} : load(add + k * W + q);
      Vec<R> sum = before + x * R(kLog2e);
      // A finite bias stays finite: finfo.min is a number, only -inf masks.
      sum = sum < kLowest ? splat(kLowest) : sum;
      auto masked = (x == -infinity<R>()) | (before == -infinity<R>());
      store(add + k * W + q, masked ? splat(-infinity<R>()) : sum);
      hidden |= masked;
      seen |= ~masked;
    }
    for (int i = 0; i < N && q + i < tile.nq; i++) {
      any_visible |= seen[i] != 0;
      tile.masked |= hidden[i] != 0;
    }
  }
  return any_visible;
}

// Fills `tile` for the panel at q0 and the keys at k0; false if nothing in it is visible (skip it).
template <class R>
static bool prepare_tile(const HeadContext& c, int64_t q0, int nq, int64_t k0, int nk, ScoreScratch<R>& scratch,
                         ScoreTile<R>& tile) {
  constexpr int W = kPanel<R>;
  const AttentionParams& p = *c.p;
  tile.q0 = q0;
  tile.k0 = k0;
  tile.nq = nq;
  tile.nk = nk;
  int64_t first = c.position(q0), last = c.position(q0 + nq - 1);
  if (first_key(c.band, first) >= k0 + nk || end_key(c.band, last) <= k0) return false;
  tile.limited = first_key(c.band, last) > k0 || end_key(c.band, first) < k0 + nk;
  if (tile.limited)
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
  tile.masked = tile.limited;
  tile.add = nullptr;
  tile.bits = nullptr;
  if (p.mask.data) {
    int64_t offset = offset4(p.mask, c.s.tensor_batch, c.h, c.s.query_begin + q0, c.s.key_begin + k0);
    load_mask_bits(p.mask, offset, nq, nk, scratch.bits);
    uint64_t any = 0, every = ~uint64_t(0), all = nq < 64 ? (uint64_t(1) << nq) - 1 : ~uint64_t(0);
    for (int k = 0; k < nk; k++) {
      any |= scratch.bits[k];
      every &= scratch.bits[k];
    }
    if (any == 0) return false;
    if (every != all) {
      tile.bits = scratch.bits;
      tile.masked = true;
    }
  }
  if (!has_addend(p)) return true;

  R* add = scratch.add;
  tile.add = add;
  bool fresh = !p.alibi_slopes, any_visible = true;
  if (!fresh) add_alibi<R>(c, tile, add);
  for (const Tensor4& bias : p.bias)
    if (bias.data) {
      R* dst = fresh ? add : scratch.tile;
      load_tile_transposed<R>(bias, c, tile, scratch.rows, dst);
      any_visible = add_bias<R>(tile, dst, fresh, add);
      fresh = false;
    }
  return any_visible;
}

// keep[key][query] = 1 / (1 - p) or 0.
template <class R>
static void dropout_tile(const HeadContext& c, const ScoreTile<R>& tile, R* keep) {
  constexpr int U = kLanes<uint32_t>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  uint64_t threshold = dropout_threshold(p.dropout_p);
  R scale = R(dropout_scale(p.dropout_p));
  if (threshold >> 32) {
    for_live_vectors(tile, [&](int i) ATTNFAST_LAMBDA { store(keep + i, Vec<R>{}); });
    return;
  }
  uint64_t row0 = uint64_t(c.row(tile.q0));
  for (int q = 0; q < tile.nq; q += U) {
    U32 low = reinterpret_cast<U32>(iota<int32_t>()) + uint32_t(row0 + uint64_t(q));
    U32 carry = low < uint32_t(row0 + uint64_t(q)) ? U32{} + 1u : U32{};
    U32 high = carry + uint32_t((row0 + uint64_t(q)) >> 32);
    for (int k = 0; k < tile.nk; k += 4) {
      U32 c0 = U32{} + uint32_t((tile.k0 + k) >> 2), c1 = low, c2 = high, c3 = U32{} + uint32_t(p.offset);
      uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
      for (int i = 0; i < kPhiloxRounds; i++) {
        U32 hi0, lo0, hi1, lo1;
        multiply_wide(c0, kPhiloxM0, hi0, lo0);
        multiply_wide(c2, kPhiloxM1, hi1, lo1);
        c0 = hi1 ^ c1 ^ k0;
        c2 = hi0 ^ c3 ^ k1;
        c1 = lo1;
        c3 = lo0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      const U32 word[4] = {c0, c1, c2, c3};
      for (int w = 0; w < 4 && k + w < tile.nk; w++) {
        alignas(64) uint32_t draw[U];
        store(draw, word[w]);
        for (int i = 0; i < U && q + i < W; i++)
          keep[(k + w) * W + q + i] = draw[i] >= uint32_t(threshold) ? scale : R(0);
      }
    }
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

// C[query] (+)= sum over keys of P[key][query] * B[key]
template <class R>
__attribute__((noinline)) void accumulate_by_query(const HeadContext& c, const ScoreTile<R>& tile, const R* P,
                                                   Rows<R> B, int64_t cols, R* C, int64_t sc, bool fresh, R* scratch) {
  constexpr int W = kPanel<R>;
  int vectors = int(padded<R>(cols) / kLanes<R>);
  auto range = [&](auto m, int r, int64_t& k0, int64_t& k1) ATTNFAST_LAMBDA {
    if (!tile.limited) return;
    constexpr int M = decltype(m)::value;
    k0 = clamp_index(first_key(c.band, c.position(tile.q0 + r)) - tile.k0, 0, tile.nk);
    k1 = clamp_index(end_key(c.band, c.position(tile.q0 + r + M - 1)) - tile.k0, 0, tile.nk);
  };
  CleanRows<R> clean{B, {}};
  bool dirty = tile.masked && has_nonfinite<R>(B, tile.nk, cols);
  if (dirty) zero_nonfinite<R>(B, tile.nk, cols, scratch, clean);
  multiply_panel<R, true>(tile.nq, tile.nk, P, W, clean.rows, C, sc, vectors, fresh, range);
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
  auto range = [&](auto m, int r, int64_t& q0, int64_t& q1) ATTNFAST_LAMBDA {
    if (!tile.limited) return;
    constexpr int M = decltype(m)::value;
    q0 = tile.bands.begin[r];
    q1 = tile.bands.end[r + M - 1] < tile.nq ? tile.bands.end[r + M - 1] : tile.nq;
  };
  CleanRows<R> clean{B, {}};
  bool dirty = tile.masked && has_nonfinite<R>(B, tile.nq, cols);
  if (dirty) zero_nonfinite<R>(B, tile.nq, cols, scratch, clean);
  multiply_panel<R, false>(tile.nk, tile.nq, P, W, clean.rows, C, sc, vectors, false, range);
  for (int q = 0; dirty && q < tile.nq; q++)
    for (int k = 0; clean.bad[q] && k < tile.nk; k++)
      if (tile.visible(q, k))
        for (int64_t d = 0; d < cols; d++) C[k * sc + d] += P[k * W + q] * B.data[q * B.stride + d];
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
