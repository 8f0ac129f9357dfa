// What every backward needs beside the gradient of its own score: delta, the gradients of sink and biases, and the
// gradient that arrives at weights. Nothing here knows how a score is formed.
#pragma once

#include "parallel.h"
#include "score_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// extra[key][query] = gradient that arrives directly at the weights.
template <class R>
void weight_gradient_tile(const HeadContext& c, const ScoreTile<R>& tile, R* rows, R* extra) {
  constexpr int W = kPanel<R>;
  const AttentionParams& p = *c.p;
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

// S = dS and P = the applied probabilities, from P before prior and dropout and S = dP of the products alone. `slope`:
// the derivative of the soft cap, or null for dS after it. `center`: null, or sums by row of what the prior's centre
// gets (times sigma), to add to. rows, extra, keep: room for a tile each.
template <class R>
void finish_score_gradient(const HeadContext& c, const ScoreTile<R>& tile, const R* minus_delta, const R* slope,
                           R* rows, R* extra, R* keep, R* P, R* S, R* center) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  const AttentionParams& p = *c.p;
  int vectors = (tile.nq + N - 1) / N;
  bool at_weights = p.grad_weights.data, factor = has_factor(p), capped = p.softcap > 0 && slope;
  if (at_weights) weight_gradient_tile<R>(c, tile, rows, extra);
  if (factor) factor_tile<R>(c, tile, keep);
  alignas(64) R from[W], sum[W];
  R rate = prior_rate<R>(p);
  if (center) {
    prior_centers<R>(c, tile, from);
    for (int q = 0; q < W; q++) sum[q] = R(0);
  }
  for (int j = 0; j < vectors; j++) {
    int first, last;
    keys_of_vector<R>(c, tile, j, first, last);
    clear_other_keys<R>(tile, j, first, last, S);
    clear_other_keys<R>(tile, j, first, last, P);
    for (int k = first; k < last; k++) {
      int64_t i = k * W + N * j;
      Vec<R> x = load(S + i), w = load(P + i);
      if (at_weights) x += load(extra + i);
      // Rounded, so that no pass contracts it with the sum below: all must give the same bits.
      if (factor) x = rounded<R>(x * load(keep + i));
      if (center) {
        Vec<R> t = w * x * prior_distance<R>(tile, k, load(from + N * j), rate);
        store(sum + N * j, load(sum + N * j) + (w == R(0) ? Vec<R>{} : t));
      }
      Vec<R> y = w * (x + load(minus_delta + N * j));
      if (capped) y *= load(slope + i);
      // Selected, not multiplied: x may be NaN where the weight is zero by a mask.
      store(S + i, w == R(0) ? Vec<R>{} : y);
      if (factor) store(P + i, w * load(keep + i));
    }
  }
  for (int q = 0; center && q < tile.nq; q++) center[q] += sum[q];
}

// The gradient of the prior's centre: what the parts of the keys give to it, [parts][rows], added in order.
template <class R>
void center_gradient(const AttentionParams& p, const R* parts, int64_t count, int64_t rows) {
  R rate = prior_rate<R>(p);
  for (int64_t row = 0; row < rows; row++) {
    R sum = 0;
    for (int64_t i = 0; i < count; i++) sum += parts[i * rows + row];
    static_cast<R*>(p.grad_center)[row] = sum * rate;
  }
}

// delta[row] = rowsum(dO * O) + shift for a few rows.
constexpr int64_t kDeltaRows = 64;
static inline int64_t delta_pieces(const AttentionParams& p) { return (p.query_tokens + kDeltaRows - 1) / kDeltaRows; }
template <class R>
void delta_rows(const AttentionParams& p, int64_t task) {
  int64_t value_pad = padded<R>(p.value_size), pieces = delta_pieces(p), head = task / pieces;
  int64_t b = head / p.heads, h = head % p.heads, q0 = task % pieces * kDeltaRows;
  R* grad = static_cast<R*>(scratch(0, size_t(2 * value_pad) * sizeof(R)));
  R* out = grad + value_pad;
  for (int64_t q = q0; q < q0 + kDeltaRows && q < p.query_tokens; q++) {
    load_rows<R>(p.grad_out, offset4(p.grad_out, b, h, q, 0), 1, p.value_size, grad, value_pad);
    load_rows<R>(p.out, offset4(p.out, b, h, q, 0), 1, p.value_size, out, value_pad);
    Vec<R> sum{};
    for (int64_t d = 0; d < value_pad; d += kLanes<R>) sum += load(grad + d) * load(out + d);
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
void sink_gradient(const AttentionParams& p, int64_t h) {
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
                                                 const R* S, R* extra) {
  constexpr int W = kPanel<R>, N = kLanes<R>;
  R* base = static_cast<R*>(grad.data) +
            offset4(grad, c.s.tensor_batch, c.h, c.s.query_begin + tile.q0, c.s.key_begin + tile.k0);
  int64_t q_stride = grad.stride[2], k_stride = grad.stride[3];
  if (q_stride != 0 && k_stride != 0) {
    for (int k = 0; k < tile.nk; k += W) {
      int count = tile.nk - k < W ? tile.nk - k : W;
      pack_transposed<R>({S + k * W, W}, count, tile.nq, extra, R(1));
      for (int q = 0; q < tile.nq; q++) add_row<R>(extra + q * W, count, base + q * q_stride + k * k_stride, k_stride);
    }
  } else if (q_stride == 0) {
    R total = 0;
    for (int k = 0; k < tile.nk; k++) {
      const R* row = S + k * W;
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
      for (int k = 0; k < tile.nk; k++) sum += load(S + k * W + q);
      for (int i = 0; i < N && q + i < tile.nq; i++) base[(q + i) * q_stride] += sum[i];
    }
  }
}

// Which tasks are the only ones to touch the elements of a bias gradient that their tiles of dS add to.
struct BiasOwner {
  bool by_queries, by_keys;  // tasks of one head and a block of queries; tasks of one head and a range of keys
  bool by_both;              // tasks of one head, a range of keys and a block of queries
};
static inline BiasOwner bias_owner(const AttentionParams& p, int i) {
  const Tensor4& grad = p.grad_bias[i];
  bool own_head = (grad.stride[0] != 0 || p.batch == 1 || p.cu_seqlens_q) && (grad.stride[1] != 0 || p.heads == 1);
  if (!grad.data || !own_head || p.softcap > 0) return {false, false, false};
  bool rows = grad.stride[2] != 0, columns = grad.stride[3] != 0;
  return {rows, !rows && columns, columns};
}

// What a task of the bias pass owns: a slice [b][h] of the gradient and, of that, a panel of rows or a tile of columns.
struct BiasOwnership {
  int64_t batches, heads, units;
  bool by_row, by_column;
};
static inline BiasOwnership bias_ownership(const AttentionParams& p, int bias, int64_t panels, int64_t tiles) {
  const int64_t* stride = p.grad_bias[bias].stride;
  BiasOwnership o;
  o.batches = stride[0] != 0 && !p.cu_seqlens_q ? p.batch : 1;  // packed sequences share one slice
  o.heads = stride[1] != 0 ? p.heads : 1;
  o.by_row = stride[2] != 0;
  o.by_column = !o.by_row && stride[3] != 0;
  o.units = o.by_row ? panels : o.by_column ? tiles : 1;
  return o;
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
