// What the gradient kernels of the dot core share: what a block owns and walks along, and what a score and its product
// give to the gradients.
//
// A pass by queries owns rows of queries and of grad_out and walks along keys and values; a pass by keys owns keys and
// values and walks along the queries and grad_out of every head that reads them. Each writes what it owns, so nothing
// is added to by two blocks.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

// Beyond this a log-sum-exp has no place for the logarithm of the sum: it is kept apart from the row's maximum.
constexpr double kHugeLse = 0x1p20;

// The workspace params.delta: three planes [B, H, T_q], written by dot_attention_bwd_rows_kernel. The probability of a
// score s (base 2) is exp2(s - base - log).
template <class R>
struct QueryValues {
  R delta, base, log;
};
enum QueryPlane { kDeltaPlane, kBasePlane, kLogPlane, kQueryPlanes };

ATTNFAST_HD int64_t plane_size(const AttentionParams& p) { return p.batch * p.heads * p.query_tokens; }

template <class R>
ATTNFAST_DEVICE QueryValues<R> query_values(const AttentionParams& p, const Rows& rows, int64_t q) {
  if (q >= rows.sequence.queries) return {};
  const R* values = static_cast<const R*>(p.delta) + row_index(p, rows.sequence, rows.head, q);
  const int64_t plane = plane_size(p);
  return {values[kDeltaPlane * plane], values[kBasePlane * plane], values[kLogPlane * plane]};
}

struct GradientBlock {
  Rows rows;             // its first head; by keys, first and last are set for each tile of queries
  int64_t own, own_end;  // rows that it writes
  int64_t own_valid;     // from here on they are padding
  int64_t begin, end;    // what it walks along, for each of `heads` heads
  int64_t heads;
};

template <bool kByKeys>
ATTNFAST_DEVICE GradientBlock gradient_block(const AttentionParams& p, int64_t own_rows, int64_t tile_rows) {
  const int64_t tokens = kByKeys ? p.key_tokens : p.query_tokens, heads = kByKeys ? p.kv_heads : p.heads;
  const int64_t per_head = (tokens + own_rows - 1) / own_rows, block = blockIdx.x;
  const int64_t head = block / per_head % heads, batch = block / per_head / heads;
  GradientBlock g;
  g.own = block % per_head * own_rows;
  g.own_end = g.own + own_rows < tokens ? g.own + own_rows : tokens;
  if constexpr (!kByKeys) {
    g.rows = rows_at(p, batch, head, g.own, own_rows);
    g.own_valid = g.own_end < g.rows.sequence.queries ? g.own_end : g.rows.sequence.queries;
    g.begin = g.rows.key_begin / tile_rows * tile_rows;
    g.end = g.rows.key_end;
    g.heads = 1;
  } else {
    g.heads = p.heads / p.kv_heads;
    g.rows = rows_at(p, batch, head * g.heads, 0, 0);
    const Sequence& s = g.rows.sequence;
    g.own_valid = g.own_end < s.keys ? g.own_end : s.keys;
    g.begin = g.end = 0;
    if (g.own < g.own_valid) {
      g.begin = clamp_index(first_query(g.rows.band, g.own), 0, s.queries) / tile_rows * tile_rows;
      g.end = clamp_index(end_query(g.rows.band, g.own_valid - 1), 0, s.queries);
    }
  }
  return g;
}

// Whether nothing but the product decides over the scores of a block's tile; sets the tile's queries by the way.
template <bool kByKeys>
ATTNFAST_DEVICE bool enter_tile(GradientBlock& g, int64_t first, int64_t own_rows, int64_t tile_rows, bool modified) {
  if constexpr (!kByKeys) return !modified && sees_all(g.rows, first, tile_rows);
  g.rows.first = first;
  g.rows.last = first + tile_rows;
  return !modified && sees_all(g.rows, g.own, own_rows);
}

// From query times key in `product` and grad_out times value in `grad`: the weight that meets the value, and the
// gradient of the score before the soft cap if `through_cap`, else after it. Both are -0 where the query may not see
// the key, whatever that holds; no other weight or gradient has that value.
template <class R>
ATTNFAST_DEVICE void differentiate(const DotAttentionParams& p, const Rows& rows, const TileRow<R>& row,
                                   const QueryValues<R>& values, bool plain, bool modified, bool through_cap, int64_t q,
                                   int64_t key, int column, R& product, R& grad) {
  const R score = plain ? product * static_cast<R>(p.scale * kLog2e) : score_of(p, row, modified, column, product);
  const bool hidden = score == negative_infinity<R>();
  // Rounded before base is taken off, so that the largest score of a row with a huge one gives exactly 0.
  R weight = exp2_of(ptx::rounded(score) - values.base - values.log);
  const R probability = weight;
  if (p.dropout_p > 0.0 && !hidden) {
    const R keep = drop(p, rows, q, key + column, R(1));
    weight *= keep;
    grad *= keep;
  }
  grad = probability * (grad - values.delta);
  if (through_cap && p.softcap > 0.0) {
    // 1 - tanh^2 without the difference, which has no digits left where tanh is nearly 1.
    const R capped = fabs(product * static_cast<R>(p.scale) / static_cast<R>(p.softcap));
    const R power = exp2_of(capped * static_cast<R>(-2 * kLog2e));
    grad *= R(4) * power / ((R(1) + power) * (R(1) + power));
  }
  product = hidden ? R(-0.0) : weight;
  grad = hidden ? R(-0.0) : grad + R(0);
}

// The same where nothing but the product decides over score and weight: a few instructions, which may stand in a kernel
// once for each element. `scale` is base 2.
template <class R>
ATTNFAST_DEVICE void differentiate_plain(const QueryValues<R>& values, R scale, R& product, R& grad) {
  const R score = product * scale;
  const bool hidden = score == negative_infinity<R>();
  const R weight = exp2_of(ptx::rounded(score) - values.base - values.log);
  product = hidden ? R(-0.0) : weight;
  grad = hidden ? R(-0.0) : weight * (grad - values.delta) + R(0);
}

}  // namespace attnfast::cuda
