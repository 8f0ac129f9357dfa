// The additive core on CUDA, as the bindings call it. Pointers of the parameters are of the device, the parameters
// themselves of the host. Nothing is allocated here: a caller brings a workspace of as many elements (double for
// float64, float otherwise) as additive_attention_*_workspace says, which nobody else uses meanwhile.
#pragma once

#include "cuda/device/additive_call.cuh"

namespace attnfast::cuda {

// What the kernels do not have yet and this call needs, or null. Such a call must be refused by this name.
const char* additive_attention_missing(const AdditiveAttentionParams& params);

int64_t additive_attention_fwd_workspace(const AdditiveAttentionParams& params);
int64_t additive_attention_bwd_workspace(const AdditiveAttentionParams& params);

// Queues the call on `stream` (a cudaStream_t). Throws std::runtime_error naming kernel and shape if it cannot be
// launched. Lengths are clamped to [0, T]: checking them here would wait for the device.
void additive_attention_fwd(const AdditiveAttentionParams& params, void* workspace, void* stream);
void additive_attention_bwd(const AdditiveAttentionParams& params, void* workspace, void* stream);

// The parts of these: by the tiles that a call takes, in additive_attention_{fwd,bwd}.cu.
bool additive_attention_is_narrow(const AttentionParams& params);
int64_t additive_attention_rows(const AttentionParams& params);    // of a tile
int64_t additive_attention_splits(const AttentionParams& params);  // see AdditiveCall
void additive_attention_fwd_launch(const AdditiveCall& call, void* stream);
void additive_attention_bwd_launch(const AdditiveCall& call, void* stream);

}  // namespace attnfast::cuda
