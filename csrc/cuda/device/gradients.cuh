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

ATTNFAST_HD int64_t plane_size(const AttentionParams& p) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.query_tokens;
}

template <class R>
ATTNFAST_DEVICE QueryValues<R> query_values(const AttentionParams& p, const Rows& rows, int64_t q) {
  if (!has_index(q, rows.sequence.queries)) return {};
  const R* values = static_cast<const R*>(p.delta) + row_index(p, rows.sequence, rows.head, q);
  const int64_t plane = plane_size(p);
  return {values[kDeltaPlane * plane], values[kBasePlane * plane], values[kLogPlane * plane]};
}

// Tokens are counted within their sequence.
struct GradientBlock {
  Rows rows;             // its first head; by keys, first and last are set for each tile of queries
  int64_t own, own_end;  // rows that it writes
  int64_t own_valid;     // from here on they are padding
  int64_t begin, end;    // what it walks along, for each of `heads` heads
  int64_t heads;
};

// The smallest range that holds the queries of `heads` heads which see a key of [first, end); begin >= end if there are
// none. Every lane of a warp comes here together.
ATTNFAST_DEVICE KeyRange queries_that_see(const AttentionParams& p, const Rows& rows, int64_t heads, int64_t first,
                                          int64_t end) {
  const Sequence& s = rows.sequence;
  const KeyRange band = {clamp_index(first_query(rows.band, first), 0, s.queries),
                         clamp_index(end_query(rows.band, end - 1), 0, s.queries)};
  if (!rows.bounds.data) return band;
  KeyRange all = {s.queries, 0};
  for (int64_t head = rows.head; head < rows.head + heads; ++head) {
    const RowBounds bounds = row_bounds_of(p, s, head);
    for (int64_t q = band.begin + threadIdx.x % 32; q < band.end; q += 32) {
      const KeyRange seen = row_keys(rows.band, bounds, q, q);
      if (seen.begin >= end || seen.end <= first) continue;
      all.begin = q < all.begin ? q : all.begin;
      all.end = q + 1 > all.end ? q + 1 : all.end;
    }
  }
  return join_ranges(all);
}

// Every lane of a warp comes here together.
template <bool kByKeys>
ATTNFAST_DEVICE GradientBlock gradient_block(const AttentionParams& p, int64_t own_rows, int64_t tile_rows,
                                             int64_t block) {
  GradientBlock g;
  if constexpr (!kByKeys) {
    g.rows = rows_of_block(p, own_rows, block, 1);
    g.own = g.rows.first;
    g.own_end = g.rows.last;
    g.own_valid = g.own_end < g.rows.sequence.queries ? g.own_end : g.rows.sequence.queries;
    g.begin = g.rows.key_begin / tile_rows * tile_rows;
    g.end = g.rows.key_end;
    g.heads = 1;
  } else {
    const BlockTile tile = block_tile(p, p.cu_seqlens_k, p.key_tokens, p.kv_heads, own_rows, block);
    g.heads = p.heads / p.kv_heads;
    g.rows = rows_of_head(p, tile.batch, tile.head * g.heads, 1);
    const Sequence& s = g.rows.sequence;
    const int64_t keys = p.cu_seqlens_k ? s.keys : p.key_tokens;
    g.own = tile.index < 0 ? keys : clamp_index(tile.index * own_rows, 0, keys);
    g.own_end = g.own + own_rows < keys ? g.own + own_rows : keys;
    g.own_valid = g.own_end < s.keys ? g.own_end : s.keys;
    g.begin = g.end = 0;
    if (g.own < g.own_valid) {
      const KeyRange queries = queries_that_see(p, g.rows, g.heads, g.own, g.own_valid);
      g.begin = queries.begin / tile_rows * tile_rows;
      g.end = queries.end;
    }
  }
  return g;
}

// Blocks of a pass: one for each `rows` of the tokens that they own, of each of `heads` heads.
template <bool kByKeys>
ATTNFAST_HD int64_t gradient_blocks(const AttentionParams& p, int64_t rows) {
  const int64_t tokens = kByKeys ? p.key_tokens : p.query_tokens, heads = kByKeys ? p.kv_heads : p.heads;
  if (p.batch == 0 || tokens == 0) return 0;
  return (p.cu_seqlens_q ? tokens / rows + p.batch : (tokens + rows - 1) / rows * p.batch) * heads;
}

// By keys, gives the block's rows the head and the queries of a tile.
template <bool kByKeys>
ATTNFAST_DEVICE void enter_tile(const AttentionParams& p, GradientBlock& g, int64_t head, int64_t first,
                                int64_t tile_rows) {
  if constexpr (kByKeys) {
    g.rows.head = head;
    g.rows.bounds = row_bounds_of(p, g.rows.sequence, head);
    g.rows.first = first;
    g.rows.last = first + tile_rows;
  }
}

// Whether all queries of a tile and a block see all of their keys by position.
template <bool kByKeys>
ATTNFAST_DEVICE bool sees_tile(const GradientBlock& g, int64_t first, int64_t own_rows, int64_t tile_rows) {
  return kByKeys ? sees_all(g.rows, g.own, own_rows) : sees_all(g.rows, first, tile_rows);
}

// What arrives at the weight of query q and key k itself, which the query sees.
template <class R>
ATTNFAST_DEVICE R weight_gradient(const AttentionParams& p, const Rows& rows, int64_t q, int64_t k) {
  const Sequence& s = rows.sequence;
  const Tensor4& grad = p.grad_weights;
  if (p.weights_mode == WeightsMode::kRowMax && p.weights_index[row_index(p, s, rows.head, q)] != s.key_begin + k) {
    return R(0);
  }
  // Of the reduced forms one of the strides is 0.
  return load_element<R>(grad.data, grad.dtype,
                         offset4(grad, s.tensor_batch, rows.head, s.query_begin + q, s.key_begin + k));
}

// What the weights' gradient, prior and dropout make of a weight and of the gradient that arrives at it; `center` is
// added what the prior's centre gets, times sigma.
template <class R>
ATTNFAST_DEVICE void take_factor(const AttentionParams& p, const Rows& rows, int64_t q, int64_t k, R& weight, R& grad,
                                 R& center) {
  if (!has_index(q, rows.sequence.queries)) return;  // padding of a tile in which everything else is visible
  if (p.grad_weights.data) grad += weight_gradient<R>(p, rows, q, k);
  const RowPrior<R> prior = prior_row_of<R>(p, rows, q, k);
  const R keep = apply_factor(p, rows, prior, q, k, 0, R(1));
  grad *= keep;
  center += weight * grad * ((prior.first - prior.center) * prior.rate);
  weight *= keep;
}

// From query times key in `product` and grad_out times value in `grad`: the weight that meets the value, and the
// gradient of the score before the soft cap if `through_cap`, else after it. Both are -0 where the query may not see
// the key, whatever that holds; no other weight or gradient has that value. For `center` see take_factor.
template <class R>
ATTNFAST_DEVICE void differentiate(const DotAttentionParams& p, const Rows& rows, const TileRow<R>& row,
                                   const QueryValues<R>& values, bool plain, bool modified, bool through_cap, int64_t q,
                                   int64_t key, int column, R& product, R& grad, R& center) {
  const R score = plain ? product * static_cast<R>(p.scale * kLog2e) : score_of(p, row, modified, column, product);
  const bool hidden = score == negative_infinity<R>();
  // Rounded before base is taken off, so that the largest score of a row with a huge one gives exactly 0.
  R weight = exp2_of(ptx::rounded(score) - values.base - values.log);
  const R probability = weight;
  if ((has_factor(p) || p.grad_weights.data) && !hidden) take_factor(p, rows, q, key + column, weight, grad, center);
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

// The gradient of a row's centre from the sum of what take_factor gave.
template <class R>
ATTNFAST_DEVICE void store_center(const AttentionParams& p, const Rows& rows, int64_t q, R sum) {
  const R rate = fmin(R(1) / static_cast<R>(p.prior_sigma), largest_finite<R>());
  static_cast<R*>(p.grad_center)[row_index(p, rows.sequence, rows.head, q)] = sum * rate;
}

}  // namespace attnfast::cuda
