// Plain-data descriptions of the memory reads by index: the weighted gather and the merge of product keys.
// Pointers are borrowed and all tensors are contiguous unless strides are named. "Real" is double where values (scores)
// are float64, float otherwise.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "params.h"

namespace attnfast {

// out[b] = sum_j weights[b, j] * values[indices[b, j]], and its backward. An index is a slot, or -1 for none.
struct WeightedGatherParams {
  int64_t outputs = 0;     // B
  int64_t picks = 0;       // K
  int64_t slots = 0;       // N
  int64_t value_size = 0;  // D_v

  const int64_t* indices = nullptr;  // [B, K]
  const void* weights = nullptr;     // Real [B, K]
  const void* values = nullptr;      // [N, D_v], strides below, in elements
  int64_t values_stride[2] = {0, 0};
  DType values_dtype = DType::kFloat32;  // a floating type or int8
  const float* scales = nullptr;         // [N], for int8: slot n holds scales[n] * values[n]
  void* out = nullptr;                   // [B, D_v]
  DType out_dtype = DType::kFloat32;     // Real or a half type

  // Position in [B, K] of the first index that is neither a slot nor -1; the caller sets it to INT64_MAX. Such an
  // index is never used, but results are then worthless.
  int64_t* bad_position = nullptr;

  // Backward only; null: not wanted.
  const void* grad_out = nullptr;   // Real [B, D_v]
  void* grad_weights = nullptr;     // Real [B, K]
  void* grad_values = nullptr;      // rows of D_v in the dtype of values: [N, D_v], zero-filled; with grad_rows, one
  int64_t* grad_rows = nullptr;     // row for each slot that occurs, whose numbers, ascending, are written here
  uint64_t* sorted = nullptr;       // workspace of 2 B K words: weighted_gather_sort writes, the sums read
  int64_t* chunk_starts = nullptr;  // workspace of one word per chunk and one more, likewise
  void* partial_sums = nullptr;     // workspace, Real, of two rows of D_v per chunk: segments cut by a chunk's edge
};

// Entries of one task of the backward, and the longest chain of additions; part of the definition of the result.
constexpr int64_t kGatherChunk = 256;

// Bits that hold 0 ... n.
ATTNFAST_HD constexpr int gather_bits(int64_t n) {
  int bits = 0;
  for (; bits < 63 && (n >> bits) != 0; bits++) {
  }
  return bits;
}
// A word of `sorted` holds a slot above a position.
ATTNFAST_HD constexpr int gather_position_bits(const WeightedGatherParams& p) {
  return gather_bits(p.outputs * p.picks);
}
ATTNFAST_HD constexpr bool gather_fits(const WeightedGatherParams& p) {
  return gather_position_bits(p) + gather_bits(p.slots) <= 64;
}

// The `picks` largest sums of one score of a row key and one of a column key, out of the best `candidates` of each
// half.
struct ProductKeysParams {
  int64_t rows = 0;                                // queries times heads
  int64_t candidates = 0;                          // per half
  int64_t picks = 0;                               // k <= candidates^2
  int64_t side = 0;                                // n: slot = row key * n + column key
  DType dtype = DType::kFloat32;                   // Real type of the scores
  const void* scores[2] = {nullptr, nullptr};      // [rows, candidates], descending; NaN counts as the largest
  const int64_t* indices[2] = {nullptr, nullptr};  // [rows, candidates], ascending among equal scores
  int64_t* slots = nullptr;                        // [rows, k], by falling sum, equal sums by rising slot
  int64_t* ranks[2] = {nullptr, nullptr};          // [rows, k]: places of a pick in the two halves
};

}  // namespace attnfast
