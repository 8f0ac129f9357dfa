// The additive core's own part: s = sum_d w_d tanh(a_d + k_d) of a tile, a = query + bias, in raw (natural) scores.
//
// With A = e^2a and B = e^2k, formed once a token, tanh(a + k) = 1 - 2 / x where x = 1 + A B: one FMA a triple, and
// four dimensions share one division, w0/x0 + ... + w3/x3 = n / (x0 x1 x2 x3). Half of w0 + ... + w3 is taken off each
// quotient at once: what is summed is -w tanh / 2, as small as the terms themselves, and exact where tanh is +-1.
//
// A tile takes one of four ways by the largest elements of its rows:
//   near    |a| + |k| <= 0.625: tanh is a short polynomial, exact to the relative precision of its argument;
//   fast    x cannot pass 2^30: as above;
//   clamped |a|, |k| <= 43, so that A and B are finite: x is cut at 2^30, where 1 / x no longer counts;
//   direct  anything else, NaN and infinity too: tanh itself. Nothing there is shared between queries, keys or
//           dimensions, so a NaN stays in its own row.
// float64 goes the direct way always.
#pragma once

#include "additive_single.h"
#include "softmax_rows.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

enum class Tier { kNear, kFast, kClamped, kDirect };
constexpr bool uses_exponentials(Tier tier) { return tier == Tier::kFast || tier == Tier::kClamped; }
constexpr float kLargestX = 0x1p30f;  // the product of four, times a sum of four weights, stays finite
constexpr double kFastSum = 10.39;    // e^(2 * 10.39) < 2^30
constexpr int kKeySlots = kKeyTile + 1;
constexpr int kKeyBlock = 4;    // keys that share a loaded vector of queries in the score pass
constexpr int kQueryBlock = 4;  // queries that share a division in the gradient pass

// ---------------------------------------------------------------- operands
// Some rows (a panel of queries, a tile of keys), as they are or as e^2x, in the layouts that the loops read:
//   lanes[j][d][N]: tokens in lanes;  dims[d / N][slot][N]: dimensions in lanes, a slot for each token and one more, so
//   that the blocks of a token are not 4 KB apart, which the first-level cache cannot hold together.
// Tokens past `count` are zeros, so that x is 1 there; dimensions past D are e^0 and meet weights of 0.
template <class R>
struct AdditiveRows {
  Rows<R> rows;
  R *copy, *lanes, *dims;
  int count, slots;
  R largest, size;  // of x and of |x|; size is infinite if an element is infinite or NaN
  int form;         // of lanes and dims: -1 none, 0 as they are, 1 exponentials

  static int64_t floats(int64_t tokens, int64_t depth_pad) { return (3 * tokens + 1) * depth_pad; }
  void place(R* base, int tokens, int64_t depth_pad) {
    slots = tokens + 1;
    copy = base;
    lanes = copy + tokens * depth_pad;
    dims = lanes + tokens * depth_pad;
    count = 0;
    form = -1;
  }
};

template <class R>
static void load_additive_rows(const Tensor4& t, int64_t offset, int count, int64_t depth, const R* bias,
                               AdditiveRows<R>& x) {
  constexpr int N = kLanes<R>;
  int64_t stride = padded<R>(depth);
  // Rows are read once or twice and in order, so any stride will do in place.
  if (!bias && t.dtype == kRealType<R> && t.stride[3] == 1 && depth == stride) {
    x.rows = {static_cast<const R*>(t.data) + offset, t.stride[2]};
  } else {
    load_rows<R>(t, offset, count, depth, x.copy, stride);
    x.rows = {x.copy, stride};
  }
  x.count = count;
  x.form = -1;
  Vec<R> largest = splat(-infinity<R>()), smallest = splat(infinity<R>()), bad{};
  for (int i = 0; i < count; i++)
    for (int64_t d = 0; d < stride; d += N) {
      Vec<R> v = load(x.rows.data + i * x.rows.stride + d);
      if (bias) {
        v += load(bias + d);
        store(x.copy + i * stride + d, v);
      }
      largest = v > largest ? v : largest;
      smallest = v < smallest ? v : smallest;
      bad += v * R(0);
    }
  x.largest = -infinity<R>();
  R least = infinity<R>();
  for (int i = 0; i < N; i++) {
    x.largest = largest[i] > x.largest ? largest[i] : x.largest;
    least = smallest[i] < least ? smallest[i] : least;
  }
  x.size = -least > x.largest ? -least : x.largest;
  if (!(sum_lanes<R>(bad) == R(0))) x.size = infinity<R>();
}

// Fills the layouts asked for, if they are not there yet. A caller asks for the same layouts of an operand every time.
template <class R>
__attribute__((noinline)) void shape_rows(AdditiveRows<R>& x, int64_t depth_pad, bool exponentials, bool want_lanes,
                                          bool want_dims) {
  constexpr int N = kLanes<R>;
  if (x.form == int(exponentials)) return;
  x.form = int(exponentials);
  constexpr int kBlock = N > kKeyBlock ? N : kKeyBlock;
  for (int q = 0; q < (x.count + kBlock - 1) / kBlock * kBlock; q += N)
    for (int64_t d = 0; d < depth_pad; d += N) {
      Vec<R> r[N];
      ATTNFAST_UNROLL for (int i = 0; i < N; i++) {
        r[i] = q + i < x.count ? load(x.rows.data + (q + i) * x.rows.stride + d) : Vec<R>{};
        if constexpr (std::is_same_v<R, float>) {
          if (exponentials && q + i < x.count) r[i] = exp_twice(r[i]);
        }
      }
      if (want_dims) {
        R* to = x.dims + (d * x.slots + q * N);
        ATTNFAST_UNROLL for (int i = 0; i < N; i++) store(to + i * N, r[i]);
      }
      if (want_lanes) {
        transpose<R>(r);
        ATTNFAST_UNROLL for (int i = 0; i < N; i++) store(x.lanes + (q * depth_pad + (d + i) * N), r[i]);
      }
    }
}

// The weights of one head, padded with zeros.
template <class R>
struct AdditiveWeights {
  R *weight, *bias;
  R* unit;               // weight times a power of two, the largest in [1, 2): products with x^3 stay in range
  R *half4, *half_dims;  // half of what four terms sum to where tanh is -1, as the tanh-free part of a term
  R scale;               // weight = unit * scale
  int64_t depth;
  bool has_bias, finite;
  bool single;  // a call of one query, whose scores are those of additive_single.h
  bool narrow;  // a call whose rows may see few keys of a tile: see few_pairs

  static int64_t floats(int64_t depth_pad) { return 5 * depth_pad; }
  void place(R* base, int64_t depth_pad) {
    weight = base;
    bias = weight + depth_pad;
    unit = bias + depth_pad;
    half4 = unit + depth_pad;
    half_dims = half4 + depth_pad;
  }
};

template <class R>
static void load_additive_weights(const AdditiveAttentionParams& p, int64_t h, AdditiveWeights<R>& w) {
  constexpr int N = kLanes<R>;
  int64_t depth = p.head_size, depth_pad = padded<R>(depth);
  const R* weight = static_cast<const R*>(p.weight) + (p.weight_by_head ? h * depth : 0);
  load_row<R>(weight, 1, depth, w.weight);
  w.depth = depth;
  w.single = single_query(p);
  w.narrow =
      p.window_bounds || (p.window_left >= 0 && p.window_right >= 0 && p.window_left + p.window_right < kKeyTile);
  w.has_bias = p.score_bias != nullptr;
  if (w.has_bias)
    load_row<R>(static_cast<const R*>(p.score_bias) + (p.score_bias_by_head ? h * depth : 0), 1, depth, w.bias);
  R largest = 0;
  w.finite = true;
  for (int64_t d = 0; d < depth; d++) {
    R size = weight[d] < R(0) ? -weight[d] : weight[d];
    largest = size > largest ? size : largest;
    w.finite &= size - size == R(0);
  }
  w.scale = R(1);
  if (w.finite && largest > R(0)) {
    while (w.scale > largest) w.scale *= R(0.5);
    while (w.scale <= largest * R(0.5)) w.scale *= R(2);
  }
  for (int64_t d = 0; d < depth_pad; d++) w.unit[d] = w.weight[d] / w.scale;
  const R half = R(0.5);
  for (int64_t d = 0; d + 4 <= depth_pad; d += 4)
    w.half4[d / 4] = half * ((w.unit[d] + w.unit[d + 1]) + (w.unit[d + 2] + w.unit[d + 3]));
  // Dimensions in lanes: four whole vectors share a division, what is left goes one by one.
  int64_t d = 0;
  for (; d + 4 * N <= depth_pad; d += 4 * N)
    for (int i = 0; i < N; i++) {
      const R* u = w.unit + d + i;
      w.half_dims[d / 4 + i] = half * ((u[0] + u[N]) + (u[2 * N] + u[3 * N]));
    }
  for (; d < depth_pad; d++) w.half_dims[d] = half * w.unit[d];
}

template <class R>
static Tier additive_tier(const AdditiveWeights<R>& w, const AdditiveRows<R>& queries, const AdditiveRows<R>& keys) {
  if (std::is_same_v<R, double> || !w.finite) return Tier::kDirect;
  if (queries.size + keys.size <= R(kTanhNearZero)) return Tier::kNear;
  if (!(queries.size <= R(kExpTwiceLimit) && keys.size <= R(kExpTwiceLimit))) return Tier::kDirect;
  return double(queries.largest) + double(keys.largest) <= kFastSum ? Tier::kFast : Tier::kClamped;
}
// Few queries leave most lanes of a vector of queries empty; dimensions fill them.
template <class R>
static bool dims_in_lanes(int nq) {
  return std::is_same_v<R, float> && 2 * nq <= kLanes<R>;
}

// ---------------------------------------------------------------- scores
// total[m] = sum_d -w_d / 2 * tanh(a_d + k_d), queries in lanes, for kKeyBlock keys. A fresh sum for every kSumDims
// dimensions: one chain of additions over all of them would cost digits.
constexpr int kSumDims = 32;
template <Tier TIER, class R>
ATTNFAST_INLINE void score_block(const AdditiveWeights<R>& w, const R* queries, const R* keys, int64_t depth_pad,
                                 Vec<R> (&total)[kKeyBlock]) {
  constexpr int N = kLanes<R>, M = kKeyBlock;
  for (int64_t first = 0; first < depth_pad; first += kSumDims) {
    int64_t end = first + kSumDims < depth_pad ? first + kSumDims : depth_pad;
    Vec<R> acc[M] = {};
    for (int64_t block = first; block < end; block += N, keys += kKeySlots * N) {
      if constexpr (!uses_exponentials(TIER)) {
        for (int u = 0; u < N; u++) {
          Vec<R> a = load(queries + (block + u) * N), weight = splat(w.weight[block + u] * R(-0.5));
          for (int m = 0; m < M; m++) {
            Vec<R> x = a + keys[m * N + u];
            if constexpr (TIER == Tier::kNear)
              acc[m] += weight * tanh_near_zero(x);
            else
              acc[m] += weight * tanhv(x);
          }
        }
      } else {
        for (int u = 0; u < N; u += 4) {
          Vec<R> a[4];
          ATTNFAST_UNROLL for (int i = 0; i < 4; i++) a[i] = load(queries + (block + u + i) * N);
          const R* unit = w.unit + block + u;
          Vec<R> half = splat(w.half4[(block + u) / 4]);
          ATTNFAST_UNROLL for (int m = 0; m < M; m++) {
            Vec<R> x[4];
            ATTNFAST_UNROLL for (int i = 0; i < 4; i++) {
              x[i] = a[i] * keys[m * N + u + i] + R(1);
              if constexpr (TIER == Tier::kClamped) x[i] = smaller(x[i], splat(kLargestX));
            }
            Vec<R> low = x[0] * unit[1] + x[1] * unit[0], high = x[2] * unit[3] + x[3] * unit[2];
            Vec<R> p = x[0] * x[1], q = x[2] * x[3];
            acc[m] += (low * q + high * p) / (p * q) - half;
          }
        }
      }
    }
    ATTNFAST_UNROLL for (int m = 0; m < M; m++) total[m] += acc[m];
  }
}

// P[key][query] = raw scores, queries in lanes. Vectors that no lane of a block of keys can see hold 0.
template <Tier TIER, class R>
__attribute__((noinline)) void scores_by_query(const AdditiveWeights<R>& w, const R* queries, const R* keys,
                                               int64_t depth_pad, const ScoreTile<R>& tile, R* P) {
  constexpr int N = kLanes<R>, W = kPanel<R>, M = kKeyBlock;
  R scale = uses_exponentials(TIER) ? w.scale : R(1);
  const LaneBands* bands = tile.bands_or_null();
  for (int q = 0; q < tile.nq; q += N)
    for (int k = 0; k < tile.nk; k += M) {
      Vec<R> acc[M] = {};
      bool seen = true;
      if (bands) {
        int begin, end;
        bands->hull(k, k + M < tile.nk ? M : tile.nk - k, begin, end);
        seen = q + N > begin && q < end;
      }
      if (seen) score_block<TIER, R>(w, queries + q * depth_pad, keys + k * N, depth_pad, acc);
      ATTNFAST_UNROLL for (int m = 0; m < M; m++) store(P + (k + m) * W + q, acc[m] * R(-2) * scale);
    }
}

// The same with dimensions in lanes, for a few queries or a few pairs. What is hidden is not formed: P holds 0 there.
template <Tier TIER>
__attribute__((noinline)) void scores_by_dimension(const AdditiveWeights<float>& w, const float* queries,
                                                   const float* keys, int64_t depth_pad, int slots,
                                                   const ScoreTile<float>& tile, float* P) {
  constexpr int N = kLanes<float>, W = kPanel<float>;
  const LaneBands* bands = tile.bands_or_null();
  for (int k = 0; k < tile.nk; k++) {
    int first = bands ? bands->begin[k] : 0, last = bands && bands->end[k] < tile.nq ? bands->end[k] : tile.nq;
    for (int q = first; q < last; q++) {
      if (!tile.visible(q, k)) continue;
      const float *a = queries + q * N, *b = keys + k * N;
      int64_t stride_a = int64_t(slots) * N, stride_b = int64_t(kKeySlots) * N, d = 0;
      VecF acc{};
      for (; d + 4 * N <= depth_pad; d += 4 * N, a += 4 * stride_a, b += 4 * stride_b) {
        VecF x[4], u[4];
        ATTNFAST_UNROLL for (int i = 0; i < 4; i++) {
          x[i] = load(a + i * stride_a) * load(b + i * stride_b) + 1.0f;
          if constexpr (TIER == Tier::kClamped) x[i] = smaller(x[i], splat(kLargestX));
          u[i] = load(w.unit + d + i * N);
        }
        VecF low = x[0] * u[1] + x[1] * u[0], high = x[2] * u[3] + x[3] * u[2];
        VecF s = x[0] * x[1], t = x[2] * x[3];
        acc += (low * t + high * s) / (s * t) - load(w.half_dims + d / 4);
      }
      for (; d < depth_pad; d += N, a += stride_a, b += stride_b) {
        VecF x = load(a) * load(b) + 1.0f;
        if constexpr (TIER == Tier::kClamped) x = smaller(x, splat(kLargestX));
        acc += load(w.unit + d) / x - load(w.half_dims + d);
      }
      P[k * W + q] = sum_lanes<float>(acc) * -2.0f * w.scale;
    }
  }
}

// Whether a tile has so few visible pairs that forming them one by one, dimensions in lanes, costs less than the blocks
// of kKeyBlock keys by a vector of queries which hold them. In steps of one vector; a pair takes a few more to be
// summed.
template <class R>
static bool few_pairs(const ScoreTile<R>& tile, int64_t depth_pad) {
  constexpr int N = kLanes<R>, kSumSteps = 6;
  const LaneBands* bands = tile.bands_or_null();
  if (!bands) return false;
  int64_t pairs = 0, blocks = 0;
  for (int k = 0; k < tile.nk; k += kKeyBlock) {
    int count = k + kKeyBlock < tile.nk ? kKeyBlock : tile.nk - k, begin, end;
    bands->hull(k, count, begin, end);
    if (begin < end) blocks += (end + N - 1) / N - begin / N;
    for (int i = k; i < k + count; i++) pairs += bands->begin[i] < bands->end[i] ? bands->end[i] - bands->begin[i] : 0;
  }
  return pairs * (depth_pad / N + kSumSteps) < blocks * kKeyBlock * depth_pad;
}

// Raw scores of a tile into P[key][query]; its keys are those of `keys` from `skip` on. Vectors past the last query are
// left alone.
template <class R>
static void additive_scores(const AdditiveWeights<R>& w, AdditiveRows<R>& queries, AdditiveRows<R>& keys,
                            int64_t depth_pad, const ScoreTile<R>& tile, int skip, bool want_dims, R* P) {
  Tier tier = additive_tier<R>(w, queries, keys);
  bool exponentials = uses_exponentials(tier), few = dims_in_lanes<R>(queries.count);
  if (w.single) {
    if (want_dims) {
      shape_rows<R>(queries, depth_pad, exponentials, false, true);
      shape_rows<R>(keys, depth_pad, exponentials, false, true);
    }
    alignas(64) R scores[kKeyTile];
    single_query_scores<false, 0, R>(keys.rows.from(skip).data, keys.rows.stride, tile.nk, static_cast<R*>(nullptr),
                                     queries.rows.data, w.weight, Extent<R>(w.depth), static_cast<R*>(nullptr), 0,
                                     scores, Soon<0>{});
    for (int k = 0; k < tile.nk; k++) {
      Vec<R> x{};
      x[0] = scores[k];
      store(P + k * kPanel<R>, x);
    }
    return;
  }
  shape_rows<R>(queries, depth_pad, exponentials, !(few && exponentials), want_dims || few || w.narrow);
  shape_rows<R>(keys, depth_pad, exponentials, false, true);
  const R* dims = keys.dims + skip * kLanes<R>;
  if constexpr (std::is_same_v<R, float>) {
    if (exponentials && (few || (w.narrow && few_pairs<R>(tile, depth_pad)))) {
      for (int k = 0; k < tile.nk; k++)
        for (int q = 0; q < tile.nq; q += kLanes<R>) store(P + k * kPanel<R> + q, VecF{});
      if (tier == Tier::kFast)
        scores_by_dimension<Tier::kFast>(w, queries.dims, dims, depth_pad, queries.slots, tile, P);
      else
        scores_by_dimension<Tier::kClamped>(w, queries.dims, dims, depth_pad, queries.slots, tile, P);
      return;
    }
    if (tier == Tier::kNear) return scores_by_query<Tier::kNear, R>(w, queries.lanes, dims, depth_pad, tile, P);
    if (tier == Tier::kFast) return scores_by_query<Tier::kFast, R>(w, queries.lanes, dims, depth_pad, tile, P);
    if (tier == Tier::kClamped) return scores_by_query<Tier::kClamped, R>(w, queries.lanes, dims, depth_pad, tile, P);
  }
  scores_by_query<Tier::kDirect, R>(w, queries.lanes, dims, depth_pad, tile, P);
}

static inline const AdditiveAttentionParams& additive_params(const HeadContext& c) {
  return static_cast<const AdditiveAttentionParams&>(*c.p);
}

// One panel of queries and one tile of keys, for the passes that recompute scores panel by panel.
template <class R>
struct AdditivePanel {
  AdditiveWeights<R> weights;
  AdditiveRows<R> queries, keys;
  int64_t depth_pad;

  static int64_t floats(int64_t depth_pad) {
    return AdditiveWeights<R>::floats(depth_pad) + AdditiveRows<R>::floats(kPanel<R>, depth_pad) +
           AdditiveRows<R>::floats(kKeyTile, depth_pad);
  }
  AdditivePanel(R* base, int64_t depth_pad) : depth_pad(depth_pad) {
    weights.place(base, depth_pad);
    base += AdditiveWeights<R>::floats(depth_pad);
    queries.place(base, kPanel<R>, depth_pad);
    keys.place(base + AdditiveRows<R>::floats(kPanel<R>, depth_pad), kKeyTile, depth_pad);
  }
  void load_head(const HeadContext& c) { load_additive_weights<R>(additive_params(c), c.h, weights); }
  void load_queries(const HeadContext& c, int64_t q0, int nq) {
    load_additive_rows<R>(c.p->query, c.query_offset(c.p->query, q0), nq, c.p->head_size,
                          weights.has_bias ? weights.bias : nullptr, queries);
  }
  void load_keys(const HeadContext& c, int64_t k0, int nk) {
    load_additive_rows<R>(c.p->key, c.key_offset(c.p->key, k0), nk, c.p->head_size, nullptr, keys);
  }
  void scores(const ScoreTile<R>& tile, R* P) {
    additive_scores<R>(weights, queries, keys, depth_pad, tile, 0, false, P);
  }
  bool split_lse(const HeadContext& c, int64_t q0, int nq, R* minus_lse, R* minus_log, R* P, ScoreScratch<R>& scratch) {
    return split_huge_lse<R>(c, q0, nq, kLog2e, minus_lse, minus_log, P, scratch, [&](const ScoreTile<R>& tile, R* P) {
      load_keys(c, tile.k0, tile.nk);
      scores(tile, P);
    });
  }
};

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
