// What the kernels of the dot core share: which queries a block has, how a product becomes a score, and the end of a
// row.
#pragma once

#include "core/masks.h"
#include "core/online_softmax.h"
#include "core/random.h"
#include "cuda/device/elements.cuh"

namespace attnfast::cuda {

// A weight that nobody may see is -0: no visible weight has that sign, and in a sum it is nothing.
template <class R>
ATTNFAST_DEVICE bool is_hidden(R weight) {
  return weight == R(0) && signbit(weight);
}

ATTNFAST_DEVICE float exp2_of(float x) { return ptx::exp2_fast(x); }
ATTNFAST_DEVICE double exp2_of(double x) { return exp2(x); }

template <class R>
ATTNFAST_DEVICE R negative_infinity() {
  return -static_cast<R>(__builtin_inf());
}

// The queries of one block: `rows` of them from `first` on, of one head of one sequence.
struct Rows {
  Sequence sequence;
  Band band;
  int64_t head, kv_head, first, last;  // [first, last): those that are written
  int64_t key_begin, key_end;          // keys that any valid one of them may see by position
};

ATTNFAST_DEVICE Rows rows_of_block(const AttentionParams& p, int64_t rows) {
  Rows r;
  const int64_t per_head = (p.query_tokens + rows - 1) / rows, block = blockIdx.x;
  const int64_t head = block / per_head % p.heads, batch = block / per_head / p.heads;
  r.sequence = sequence_of(p, batch);
  // The host has not seen lengths that lie on the device.
  r.sequence.queries = clamp_index(r.sequence.queries, 0, r.sequence.query_rows);
  r.sequence.keys = clamp_index(r.sequence.keys, 0, p.key_tokens);
  if (p.causal == Causal::kBottomRight) r.sequence.offset = r.sequence.keys - r.sequence.queries;
  r.band = band_of(p, r.sequence);
  r.head = head;
  r.kv_head = head / (p.heads / p.kv_heads);
  r.first = block % per_head * rows;
  r.last = r.first + rows < p.query_tokens ? r.first + rows : p.query_tokens;
  const int64_t last_valid = r.last < r.sequence.queries ? r.last : r.sequence.queries;
  r.key_begin = r.key_end = 0;
  if (r.first < last_valid) {
    r.key_begin = first_key(r.band, r.first);
    r.key_end = end_key(r.band, last_valid - 1);
  }
  return r;
}

// Whether anything but the position decides over scores.
ATTNFAST_DEVICE bool is_modified(const AttentionParams& p) {
  return p.mask.data || p.bias[0].data || p.bias[1].data || p.alibi_slopes || p.softcap > 0.0;
}

// Whether each of the rows sees each key of [key, key + keys) by its position.
ATTNFAST_DEVICE bool sees_all(const Rows& r, int64_t key, int64_t keys) {
  return r.last <= r.sequence.queries && first_key(r.band, r.last - 1) <= key && end_key(r.band, r.first) >= key + keys;
}

// One query and one tile of keys. 64-bit arithmetic is done here, once a row, and not for every score.
template <class R>
struct TileRow {
  int begin, end;         // columns of the tile that the query sees by position
  int64_t mask, bias[2];  // offsets of the tile's first column
  R slope, distance;      // ALiBi: of the first column, q - k
};

template <class R>
ATTNFAST_DEVICE TileRow<R> tile_row_of(const AttentionParams& p, const Rows& r, bool modified, int64_t q, int64_t key,
                                       int keys) {
  TileRow<R> row = {};
  if (q >= r.sequence.queries) return row;
  row.begin = static_cast<int>(clamp_index(first_key(r.band, q) - key, 0, keys));
  row.end = static_cast<int>(clamp_index(end_key(r.band, q) - key, 0, keys));
  if (!modified) return row;
  const int64_t b = r.sequence.tensor_batch;
  row.mask = offset4(p.mask, b, r.head, q, key);
  for (int i = 0; i < 2; ++i) row.bias[i] = offset4(p.bias[i], b, r.head, q, key);
  if (p.alibi_slopes) {
    const int64_t at = r.sequence.batch * p.alibi_stride[0] + r.head * p.alibi_stride[1];
    row.slope = static_cast<const R*>(p.alibi_slopes)[at];
    row.distance = static_cast<R>(q + r.sequence.offset - key);
  }
  return row;
}

// The score, base 2, at a column of the tile, given query times key; -inf if the query may not see it.
template <class R>
ATTNFAST_DEVICE R score_of(const DotAttentionParams& p, const TileRow<R>& row, bool modified, int column, R product) {
  const R hidden = negative_infinity<R>();
  if (column < row.begin || column >= row.end) return hidden;
  R score = product * static_cast<R>(modified ? p.scale : p.scale * kLog2e);
  if (!modified) return score;
  if (p.mask.data && !static_cast<const bool*>(p.mask.data)[row.mask + column * p.mask.stride[3]]) return hidden;
  if (p.softcap > 0.0) score = static_cast<R>(p.softcap) * tanh(score / static_cast<R>(p.softcap));
  score -= row.slope * fabs(row.distance - static_cast<R>(column));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!p.bias[i].data) continue;
    const R bias = load_element<R>(p.bias[i].data, p.bias[i].dtype, row.bias[i] + column * p.bias[i].stride[3]);
    if (bias == hidden) return hidden;  // whatever the key holds
    score += bias;
  }
  return score * static_cast<R>(kLog2e);
}

// What dropout makes of a weight.
template <class R>
ATTNFAST_DEVICE R drop(const AttentionParams& p, const Rows& r, int64_t q, int64_t k, R weight) {
  const auto row = static_cast<uint64_t>(row_index(p, r.sequence, r.head, q));
  const Philox4 random = philox(p.seed, p.offset, row, static_cast<uint32_t>(k / 4));
  // Without an index that a loop computes: compilers for sm_100 and later put the words in local memory for it.
  const bool odd = (k & 1) != 0, second = (k & 2) != 0;
  const uint32_t low = odd ? random.word[1] : random.word[0], high = odd ? random.word[3] : random.word[2];
  const uint32_t word = second ? high : low;
  return word < dropout_threshold(p.dropout_p) ? R(0) : weight * static_cast<R>(dropout_scale(p.dropout_p));
}

// Closes row q: stores its log-sum-exp if `writes`, and gives the factor of its output.
template <class R>
ATTNFAST_DEVICE R close_row_of(const AttentionParams& p, const Rows& r, int64_t q, R maximum, R sum, bool writes) {
  const R sink = p.sink ? static_cast<const R*>(p.sink)[r.head] * static_cast<R>(kLog2e) : R(0);
  const SoftmaxResult<R> result = close_row(SoftmaxState<R>{maximum, sum}, p.sink != nullptr, sink);
  if (writes && p.lse) static_cast<R*>(p.lse)[row_index(p, r.sequence, r.head, q)] = result.lse;
  return result.output_scale;
}

}  // namespace attnfast::cuda
