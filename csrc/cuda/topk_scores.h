// The k best slots of each query on CUDA, as the bindings call it. Pointers of the parameters are of the device, the
// parameters themselves of the host.
#pragma once

#include "core/params.h"

namespace attnfast::cuda {

// What the kernel does not have and this call needs, or null. Such a call must be refused by this name.
const char* topk_scores_missing(const TopkParams& params);

// Bytes of `workspace`; 0 where none is needed.
int64_t topk_scores_workspace(const TopkParams& params);

// Queues the forward on `stream` (a cudaStream_t). Throws std::runtime_error naming kernel and shape if it cannot be
// launched. `workspace` is memory of the device, aligned to 16 bytes.
void topk_scores_fwd(const TopkParams& params, void* workspace, void* stream);

// ---- Parts, of which the above is made --------------------------------------------------------------------------

// kMany: many queries and small k. kSome, kFew: longer lists of candidates, of fewer queries.
enum class TopkSize { kMany, kSome, kFew };

// Blocks of a call: groups of queries times ranges of `share` slots.
struct TopkSchedule {
  TopkSize size;
  int64_t groups, splits, share;
};

// Tensor cores: types of 16 bits, the same on both sides. Nothing else decides, so that layouts and numbers of queries
// show in no bit. Leaves the best of each range in the workspace where there are several.
bool topk_scores_mma_takes(const TopkParams& params);
void topk_scores_mma(const TopkParams& params, const TopkSchedule& schedule, void* workspace, void* stream);

}  // namespace attnfast::cuda
