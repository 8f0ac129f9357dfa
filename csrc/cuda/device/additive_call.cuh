// One call of the additive core, as its kernels are given it.
#pragma once

#include "core/params.h"

namespace attnfast::cuda {

// Calls of up to so many queries take tiles of so many rows.
constexpr int kNarrowRows = 4;

// What a kernel is given: the additive core's parameters, and the dot core's with a scale of 1, whose modifiers and
// softmax (device/rows.cuh) it shares.
struct AdditiveCall : DotAttentionParams {
  const void* weight = nullptr;
  const void* score_bias = nullptr;
  bool weight_by_head = false, score_bias_by_head = false;
  void *grad_weight = nullptr, *grad_score_bias = nullptr;
  // The keys of a block of queries are shared among so many blocks; their parts are merged in order. By shapes alone.
  int64_t splits = 1;
  void* workspace = nullptr;  // AttentionParams::delta, of three planes (device/gradients.cuh), is its beginning
};

}  // namespace attnfast::cuda
