// Forwards whose keys are split among blocks, of either core: what a block leaves, and the kernel that adds it up.
#pragma once

#include "core/params.h"

namespace attnfast::cuda {

// How a forward is cut beyond its tiles of queries. From shapes alone, so that the same call gives the same bits on any
// GPU.
struct Parts {
  int64_t group = 1;        // > 1: T_q is 1, and the heads of a key head are the rows of a tile (params are changed)
  int64_t splits = 1;       // ranges of keys, each the work of blocks of its own
  int64_t share = 0;        // keys of one range, whole tiles of any kernel
  int64_t rows = 0;         // B * H * T_q
  void* partial = nullptr;  // if splits > 1, Real: out [splits][rows][D_v], maxima [splits][rows], sums [splits][rows]
};

// Adds up the ranges in their order.
void attention_merge(const AttentionParams& params, const Parts& parts, void* stream);

}  // namespace attnfast::cuda
