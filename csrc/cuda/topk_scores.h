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

}  // namespace attnfast::cuda
