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

// Whether `i` is one of `count` from 0 on.
ATTNFAST_DEVICE bool has_index(int64_t i, int64_t count) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(count);
}

ATTNFAST_DEVICE float exp2_of(float x) { return ptx::exp2_fast(x); }
ATTNFAST_DEVICE double exp2_of(double x) { return exp2(x); }

template <class R>
ATTNFAST_DEVICE R negative_infinity() {
  return -static_cast<R>(__builtin_inf());
}
template <class R>
ATTNFAST_DEVICE R largest_finite() {
  return sizeof(R) == 4 ? static_cast<R>(__FLT_MAX__) : static_cast<R>(__DBL_MAX__);
}

// The queries of one block: `rows` of them from `first` on, of one head of one sequence. Rows are counted within their
// sequence.
struct Rows {
  Sequence sequence;
  Band band;
  RowBounds bounds;
  int64_t group;  // > 1: the rows are the heads that share a key head, each with one query, at position 0
  int64_t head, kv_head, first, last;  // [first, last): those that are written
  int64_t key_begin, key_end;          // keys that any valid one of them may see by position
};

ATTNFAST_DEVICE int64_t position_of(const Rows& r, int64_t q) { return r.group > 1 ? 0 : q; }
ATTNFAST_DEVICE int64_t head_of(const Rows& r, int64_t q) { return r.group > 1 ? r.head * r.group + q : r.head; }

// A block that has part of a call's tiles, of packed sequences: which sequence, and which of its tiles.
//
// Where sequences lie, only the device knows; the host counts total / size + sequences tiles. Those of sequence b begin
// at offset[b] / size + b, which leaves it offset[b + 1] / size - offset[b] / size + 1: as many as it needs, and at
// most one more. Offsets that make no sense give a tile that is negative or beyond the sequence, to be left alone.
struct PackedTile {
  int64_t batch, index;
};
ATTNFAST_DEVICE PackedTile packed_tile(const int64_t* offsets, int64_t sequences, int64_t total, int64_t size,
                                       int64_t tile) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const bool before = clamp_index(offsets[middle], 0, total) / size + middle <= tile;
    low = before ? middle : low;
    high = before ? high : middle;
  }
  return {low, tile - clamp_index(offsets[low], 0, total) / size - low};
}

// The sequence that has a token, or any one if offsets make no sense.
ATTNFAST_DEVICE int64_t packed_sequence(const int64_t* offsets, int64_t sequences, int64_t token) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const bool before = offsets[middle] <= token;
    low = before ? middle : low;
    high = before ? high : middle;
  }
  return low;
}

// One head of one sequence, without rows. The host has not seen lengths and offsets that lie on the device: what is
// outside of the tensors is cut off.
ATTNFAST_DEVICE Rows rows_of_head(const AttentionParams& p, int64_t batch, int64_t head, int64_t group) {
  Rows r;
  Sequence& s = r.sequence;
  if (p.cu_seqlens_q) {
    const int64_t query_end = clamp_index(p.cu_seqlens_q[batch + 1], 0, p.query_tokens);
    const int64_t key_end = clamp_index(p.cu_seqlens_k[batch + 1], 0, p.key_tokens);
    s.batch = batch;
    s.tensor_batch = 0;
    s.query_begin = clamp_index(p.cu_seqlens_q[batch], 0, query_end);
    s.key_begin = clamp_index(p.cu_seqlens_k[batch], 0, key_end);
    s.query_rows = s.queries = query_end - s.query_begin;
    s.keys = key_end - s.key_begin;
  } else {
    s = sequence_of(p, batch);
  }
  int64_t queries = clamp_index(s.queries, 0, group > 1 ? 1 : s.query_rows);
  if (group > 1 && !p.query_lengths) queries = 1;
  s.keys = clamp_index(s.keys, 0, p.key_tokens);
  s.offset = p.causal == Causal::kBottomRight ? s.keys - queries : 0;
  s.queries = group > 1 ? queries * group : queries;
  r.band = band_of(p, s);
  r.bounds = row_bounds_of(p, s, head);
  r.group = group;
  r.head = head;
  r.kv_head = group > 1 ? head : head / (p.heads / p.kv_heads);
  r.first = r.last = r.key_begin = r.key_end = 0;
  return r;
}

// The smallest range that holds what all lanes have; {keys, 0} if they have nothing. Every lane of a warp comes here
// together.
ATTNFAST_DEVICE KeyRange join_ranges(KeyRange all) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t begin = __shfl_xor_sync(0xFFFFFFFFu, all.begin, step);
    const int64_t end = __shfl_xor_sync(0xFFFFFFFFu, all.end, step);
    all.begin = begin < all.begin ? begin : all.begin;
    all.end = end > all.end ? end : all.end;
  }
  return all;
}

// Gives `r` rows [first, last) and the keys that valid ones among them see. Every lane of a warp comes here together.
ATTNFAST_DEVICE void set_rows(Rows& r, int64_t first, int64_t last) {
  r.first = first;
  r.last = last;
  const int64_t last_valid = r.last < r.sequence.queries ? r.last : r.sequence.queries;
  if (r.first >= last_valid) return;
  if (!r.bounds.data) {
    r.key_begin = first_key(r.band, position_of(r, r.first));
    r.key_end = end_key(r.band, position_of(r, last_valid - 1));
    return;
  }
  KeyRange all = {r.sequence.keys, 0};
  for (int64_t q = r.first + threadIdx.x % 32; q < last_valid; q += 32) {
    const KeyRange own = row_keys(r.band, r.bounds, q, position_of(r, q));
    all.begin = own.begin < all.begin ? own.begin : all.begin;
    all.end = own.end > all.end ? own.end : all.end;
  }
  all = join_ranges(all);
  if (all.begin < all.end) {
    r.key_begin = all.begin;
    r.key_end = all.end;
  }
}

// Which `rows` tokens a block has, of `tokens` of each of `heads` heads.
struct BlockTile {
  int64_t batch, head, index;
};
ATTNFAST_DEVICE BlockTile block_tile(const AttentionParams& p, const int64_t* offsets, int64_t tokens, int64_t heads,
                                     int64_t rows, int64_t block) {
  const int64_t per_head = offsets ? tokens / rows + p.batch : (tokens + rows - 1) / rows;
  const int64_t head = block / per_head % heads;
  if (!offsets) return {block / per_head / heads, head, block % per_head};
  const PackedTile tile = packed_tile(offsets, p.batch, tokens, rows, block % per_head);
  return {tile.batch, head, tile.index};
}

// Every lane of a warp comes here together.
ATTNFAST_DEVICE Rows rows_of_block(const AttentionParams& p, int64_t rows, int64_t block, int64_t group) {
  const BlockTile tile = block_tile(p, p.cu_seqlens_q, p.query_tokens, p.heads, rows, block);
  Rows r = rows_of_head(p, tile.batch, tile.head, group);
  const int64_t first =
      tile.index < 0 ? r.sequence.query_rows : clamp_index(tile.index * rows, 0, r.sequence.query_rows);
  set_rows(r, first, clamp_index(first + rows, 0, r.sequence.query_rows));
  return r;
}

ATTNFAST_DEVICE Rows rows_of_block(const AttentionParams& p, int64_t rows) {
  return rows_of_block(p, rows, blockIdx.x, 1);
}

// Queries [first, first + rows) of one head and sample, for a block that names them itself; what is below 0 is not
// there. Every lane of a warp comes here together.
ATTNFAST_DEVICE Rows rows_at(const AttentionParams& p, int64_t batch, int64_t head, int64_t first, int64_t rows) {
  Rows r = rows_of_head(p, batch, head, 1);
  const int64_t last = first + rows < r.sequence.query_rows ? first + rows : r.sequence.query_rows;
  set_rows(r, first > 0 ? first : 0, last);
  return r;
}

// Offsets of the first row of a head's queries (or out), and of its keys or values.
ATTNFAST_DEVICE int64_t query_offset(const Rows& r, const Tensor4& t) {
  return offset4(t, r.sequence.tensor_batch, r.head, r.sequence.query_begin, 0);
}
ATTNFAST_DEVICE int64_t key_offset(const Rows& r, const Tensor4& t) {
  return offset4(t, r.sequence.tensor_batch, r.kv_head, r.sequence.key_begin, 0);
}

// Whether anything but the position decides over scores.
ATTNFAST_DEVICE bool is_modified(const AttentionParams& p) {
  return p.mask.data || p.bias[0].data || p.bias[1].data || p.alibi_slopes || p.softcap > 0.0;
}

// Whether each of the rows sees each key of [key, key + keys) by its position.
ATTNFAST_DEVICE bool sees_all(const Rows& r, int64_t key, int64_t keys) {
  return !r.bounds.data && r.last <= r.sequence.queries && first_key(r.band, position_of(r, r.last - 1)) <= key &&
         end_key(r.band, position_of(r, r.first)) >= key + keys;
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
  if (!has_index(q, r.sequence.queries)) return row;
  const KeyRange seen = row_keys(r.band, r.bounds, q, position_of(r, q));
  row.begin = static_cast<int>(clamp_index(seen.begin - key, 0, keys));
  row.end = static_cast<int>(clamp_index(seen.end - key, 0, keys));
  if (!modified) return row;
  const int64_t b = r.sequence.tensor_batch, i = r.sequence.query_begin + q, j = r.sequence.key_begin + key;
  row.mask = offset4(p.mask, b, r.head, i, j);
  for (int x = 0; x < 2; ++x) row.bias[x] = offset4(p.bias[x], b, r.head, i, j);
  if (p.alibi_slopes) {
    const int64_t at = r.sequence.batch * p.alibi_stride[0] + head_of(r, q) * p.alibi_stride[1];
    row.slope = static_cast<const R*>(p.alibi_slopes)[at];
    row.distance = static_cast<R>(position_of(r, q) + r.sequence.offset - key);
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
  const bool finite = score > hidden;
  score -= row.slope * fabs(row.distance - static_cast<R>(column));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!p.bias[i].data) continue;
    const R bias = load_element<R>(p.bias[i].data, p.bias[i].dtype, row.bias[i] + column * p.bias[i].stride[3]);
    if (bias == hidden) return hidden;  // whatever the key holds
    score += bias;
  }
  score *= static_cast<R>(kLog2e);
  // The most negative finite bias is a number and hides nothing.
  return finite && score < -largest_finite<R>() ? -largest_finite<R>() : score;
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

// The Gaussian prior of one row in one tile of keys.
template <class R>
struct RowPrior {
  R first, center, rate;  // position of the tile's first key, centre, 1 / sigma
};
template <class R>
ATTNFAST_DEVICE RowPrior<R> prior_row_of(const AttentionParams& p, const Rows& r, int64_t q, int64_t key) {
  RowPrior<R> row = {};
  if (!(p.prior_sigma > 0.0) || !has_index(q, r.sequence.queries)) return row;
  row.first = static_cast<R>(key);
  row.center = static_cast<const R*>(p.prior_center)[row_index(p, r.sequence, r.head, q)];
  row.rate = fmin(R(1) / static_cast<R>(p.prior_sigma), largest_finite<R>());  // a distance of 0 must stay 0
  return row;
}

// Whether weights are multiplied by anything after the softmax.
ATTNFAST_DEVICE bool has_factor(const AttentionParams& p) { return p.dropout_p > 0.0 || p.prior_sigma > 0.0; }

// What prior and dropout make of a weight, at a column of the tile that begins at `key`. What falls out is zero,
// whatever its prior.
template <class R>
ATTNFAST_DEVICE R apply_factor(const AttentionParams& p, const Rows& r, const RowPrior<R>& prior, int64_t q,
                               int64_t key, int column, R weight) {
  if (p.prior_sigma > 0.0) {
    // Positions are exact, so that the difference is rounded once.
    const R distance = (prior.first + static_cast<R>(column) - prior.center) * prior.rate;
    weight *= exp2_of(distance * distance * static_cast<R>(-0.5 * kLog2e));
  }
  return p.dropout_p > 0.0 ? drop(p, r, q, key + column, weight) : weight;
}

// Closes row q: stores its log-sum-exp if `writes`, and gives the factor of its output.
template <class R>
ATTNFAST_DEVICE R close_row_of(const AttentionParams& p, const Rows& r, int64_t q, R maximum, R sum, bool writes) {
  const R sink = p.sink ? static_cast<const R*>(p.sink)[head_of(r, q)] * static_cast<R>(kLog2e) : R(0);
  const SoftmaxResult<R> result = close_row(SoftmaxState<R>{maximum, sum}, p.sink != nullptr, sink);
  if (writes && p.lse) static_cast<R*>(p.lse)[row_index(p, r.sequence, r.head, q)] = result.lse;
  return result.output_scale;
}

}  // namespace attnfast::cuda
