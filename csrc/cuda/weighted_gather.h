// Reads by index on CUDA, as the bindings call them. Pointers of the parameters are of the device, the parameters
// themselves of the host. All are queued on `stream` (a cudaStream_t) and throw std::runtime_error naming kernel and
// shape if they cannot be launched.
//
// An index that is neither a slot nor -1 is taken as -1: telling the caller would wait for the device, so
// WeightedGatherParams::bad_position is left alone.
#pragma once

#include "core/gather_params.h"

namespace attnfast::cuda {

void weighted_gather_fwd(const WeightedGatherParams& params, void* stream);

// Gradient of the weights (params.grad_weights).
void weighted_gather_dots(const WeightedGatherParams& params, void* stream);

// Where the uses of each slot stand, for the gradient of the values: the list of all `entries` picks sorted by slot,
// stably, those without a slot last and with slot N.
struct GatherSegments {
  int64_t entries = 0;             // B K
  const int64_t* slots = nullptr;  // [entries], ascending
  const int64_t* order = nullptr;  // [entries]: position of each in [B, K]
  const int64_t* ranks = nullptr;  // [entries]: its slot's number among those that occur, for a sparse gradient; null:
                                   // the row of a slot is its own number
};

// Entries that one team of threads adds up: part of the definition of the result.
constexpr int64_t kSegmentChunk = 64;
ATTNFAST_HD constexpr int64_t segment_chunks(int64_t entries) { return (entries + kSegmentChunk - 1) / kSegmentChunk; }

// Gradient of the values (params.grad_values, a row of which is written for each slot that occurs; params.partial_sums
// has two rows per chunk). params.sorted, chunk_starts and grad_rows are not used.
void weighted_gather_sums(const WeightedGatherParams& params, const GatherSegments& segments, void* stream);

}  // namespace attnfast::cuda
