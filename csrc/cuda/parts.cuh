// A block's part of a call: its rows, its range of keys, and where its rows go when they are done.
#pragma once

#include "cuda/attention_merge.h"
#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

// Blocks are numbered by rows, then by range of keys. Every lane of a warp comes here together.
ATTNFAST_DEVICE Rows rows_of_part(const AttentionParams& p, int64_t rows, const Parts& parts, int64_t block) {
  Rows r = rows_of_block(p, rows, block / parts.splits, parts.group);
  if (parts.splits == 1) return r;
  const int64_t begin = block % parts.splits * parts.share, end = begin + parts.share;
  r.key_begin = r.key_begin > begin ? r.key_begin : begin;
  r.key_end = r.key_end < end ? r.key_end : end;
  return r;
}

// Where a row of the output goes, and its factor.
template <class R>
struct Finish {
  void* data;
  DType dtype;
  int64_t offset, stride;
  R scale;
};
template <class R>
ATTNFAST_DEVICE Finish<R> finish_row(const AttentionParams& p, const Rows& r, const Parts& parts, int64_t block,
                                     int64_t q, R maximum, R sum, bool writes) {
  if (parts.splits == 1) {
    const R scale = close_row_of(p, r, q, maximum, sum, writes);
    return {p.out.data, p.out.dtype, query_offset(r, p.out) + q * p.out.stride[2], p.out.stride[3], scale};
  }
  const int64_t slots = parts.splits * parts.rows;
  const int64_t slot = block % parts.splits * parts.rows + row_index(p, r.sequence, r.head, q);
  R* states = static_cast<R*>(parts.partial) + slots * p.value_size;
  if (writes) {
    states[slot] = maximum;
    states[slots + slot] = sum;
  }
  return {parts.partial, sizeof(R) == 4 ? DType::kFloat32 : DType::kFloat64, slot * p.value_size, 1, R(1)};
}

}  // namespace attnfast::cuda
