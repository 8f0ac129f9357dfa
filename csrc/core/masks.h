// Which keys a query row may see by position: lengths, causal alignment, sliding window, and a window of its own. Valid
// as C++ and CUDA.
// Masks given as tensors are read where scores are formed; both kinds compose by "and".
#pragma once

#include "host_device.h"
#include "params.h"

namespace attnfast {

// One sequence of the batch: where its tokens start and how many of them are valid.
struct Sequence {
  int64_t batch;                   // its number in the batch, packed or not
  int64_t tensor_batch;            // index into the batch dimension of the tensors (0 for packed input)
  int64_t query_begin, key_begin;  // first token of the sequence in the tensors
  int64_t query_rows;              // rows to write, valid or not
  int64_t queries, keys;           // valid rows and keys
  int64_t offset;                  // alignment: row q lines up with key q + offset
};

ATTNFAST_HD Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s;
  s.batch = b;
  if (p.cu_seqlens_q) {
    s.tensor_batch = 0;
    s.query_begin = p.cu_seqlens_q[b];
    s.key_begin = p.cu_seqlens_k[b];
    s.query_rows = s.queries = p.cu_seqlens_q[b + 1] - s.query_begin;
    s.keys = p.cu_seqlens_k[b + 1] - s.key_begin;
  } else {
    s.tensor_batch = b;
    s.query_begin = s.key_begin = 0;
    s.query_rows = p.query_tokens;
    s.queries = p.query_lengths ? p.query_lengths[b] : p.query_tokens;
    s.keys = p.key_lengths ? p.key_lengths[b] : p.key_tokens;
  }
  s.offset = p.causal == Causal::kBottomRight ? s.keys - s.queries : 0;
  return s;
}

// The longest sequence of a call.
struct Longest {
  int64_t queries, keys;
};
ATTNFAST_HD Longest longest_sequence(const AttentionParams& p) {
  if (!p.cu_seqlens_q) return {p.query_tokens, p.key_tokens};
  Longest longest{0, 0};
  for (int64_t b = 0; b < p.batch; b++) {
    Sequence s = sequence_of(p, b);
    longest.queries = s.query_rows > longest.queries ? s.query_rows : longest.queries;
    longest.keys = s.keys > longest.keys ? s.keys : longest.keys;
  }
  return longest;
}

// Row index of the counter-based random numbers and of every contiguous [B, H, T_q] tensor.
ATTNFAST_HD int64_t row_index(const AttentionParams& p, const Sequence& s, int64_t h, int64_t q) {
  return (s.tensor_batch * p.heads + h) * p.query_tokens + s.query_begin + q;
}

// The visible keys of row q are [key_begin, key_end); both ends never decrease with q.
struct Band {
  int64_t left, right;  // relative to q + offset; kUnbounded when open
  int64_t offset, keys;
};
constexpr int64_t kUnbounded = int64_t(1) << 62;

ATTNFAST_HD Band band_of(const AttentionParams& p, const Sequence& s) {
  Band band;
  band.left = p.window_left < 0 || p.window_left > kUnbounded ? kUnbounded : p.window_left;
  band.right = p.window_right < 0 || p.window_right > kUnbounded ? kUnbounded : p.window_right;
  if (p.causal != Causal::kNone && band.right > 0) band.right = 0;
  band.offset = s.offset;
  band.keys = s.keys;
  return band;
}
ATTNFAST_HD int64_t clamp_index(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

ATTNFAST_HD int64_t first_key(const Band& band, int64_t q) {
  return band.left == kUnbounded ? 0 : clamp_index(q + band.offset - band.left, 0, band.keys);
}
ATTNFAST_HD int64_t end_key(const Band& band, int64_t q) {
  return band.right == kUnbounded ? band.keys : clamp_index(q + band.offset + band.right + 1, 0, band.keys);
}
// Rows that see key k: [first_query, end_query), not clipped to the number of rows.
ATTNFAST_HD int64_t first_query(const Band& band, int64_t k) {
  return band.right == kUnbounded ? 0 : k - band.offset - band.right;
}
ATTNFAST_HD int64_t end_query(const Band& band, int64_t k) {
  return band.left == kUnbounded ? kUnbounded : k - band.offset + band.left + 1;
}

// Keys [begin, end).
struct KeyRange {
  int64_t begin, end;
};

// The windows that the rows of one (sequence, head) bring themselves; null: none.
struct RowBounds {
  const int64_t* data;  // of row 0
  int64_t stride;
};
ATTNFAST_HD RowBounds row_bounds_of(const AttentionParams& p, const Sequence& s, int64_t h) {
  if (!p.window_bounds) return {nullptr, 0};
  const int64_t* stride = p.window_bounds_stride;
  return {p.window_bounds + s.tensor_batch * stride[0] + h * stride[1] + s.query_begin * stride[2], stride[2]};
}
// The keys that row q at `position` sees; {keys, 0} if none, whatever the bounds hold.
ATTNFAST_HD KeyRange row_keys(const Band& band, const RowBounds& bounds, int64_t q, int64_t position) {
  KeyRange range{first_key(band, position), end_key(band, position)};
  if (bounds.data) {
    int64_t begin = bounds.data[q * bounds.stride], end = bounds.data[q * bounds.stride + 1];
    range.begin = begin > range.begin ? begin : range.begin;
    range.end = end < range.end ? end : range.end;
  }
  return range.begin < range.end ? range : KeyRange{band.keys, 0};
}

ATTNFAST_HD int64_t offset4(const Tensor4& t, int64_t b, int64_t h, int64_t i, int64_t j) {
  return b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3];
}

}  // namespace attnfast
