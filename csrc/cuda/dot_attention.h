// The dot core on CUDA, as the bindings call it. Pointers of the parameters are of the device, the parameters
// themselves of the host.
#pragma once

#include "core/params.h"

namespace attnfast::cuda {

// What the kernels do not have yet and this call needs, or null. Such a call must be refused by this name.
const char* dot_attention_missing(const DotAttentionParams& params);

// The kernel that a call takes, for reports.
const char* dot_attention_kernel_name(const DotAttentionParams& params);

// Queues the forward on `stream` (a cudaStream_t). Throws std::runtime_error naming kernel and shape if it cannot be
// launched. Lengths are clamped to [0, T]: checking them here would wait for the device.
void dot_attention_fwd(const DotAttentionParams& params, void* stream);

// The two kernels, each with what it takes; dot_attention_fwd chooses.
bool dot_attention_mma_takes(const DotAttentionParams& params);
void dot_attention_mma_fwd(const DotAttentionParams& params, void* stream);
void dot_attention_fma_fwd(const DotAttentionParams& params, void* stream);

// The same of the gradients. params.delta is a workspace of three planes [B, H, T_q]; gradients of biases are
// overwritten.
const char* dot_attention_bwd_missing(const DotAttentionParams& params);
const char* dot_attention_bwd_kernel_name(const DotAttentionParams& params);
void dot_attention_bwd(const DotAttentionParams& params, void* stream);

// Its parts: gradients of queries, keys and values by one of two kernels, and that of one bias.
bool dot_attention_mma_bwd_takes(const DotAttentionParams& params);
void dot_attention_mma_bwd(const DotAttentionParams& params, void* stream);
void dot_attention_fma_bwd(const DotAttentionParams& params, void* stream);
void dot_attention_bias_bwd(const DotAttentionParams& params, int which, void* stream);

}  // namespace attnfast::cuda
