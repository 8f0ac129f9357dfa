// The dot core on CUDA, as the bindings call it. Pointers of the parameters are of the device, the parameters
// themselves of the host.
#pragma once

#include "core/params.h"
#include "cuda/attention_merge.h"

namespace attnfast::cuda {

// The kernel that a call takes, for reports; without params.out, which may be any that is allocated for it.
const char* dot_attention_kernel_name(const DotAttentionParams& params);

// How many Reals of workspace a forward needs; from the shapes alone.
int64_t dot_attention_workspace(const DotAttentionParams& params);

// Queues the forward on `stream` (a cudaStream_t); it owns `workspace` until it is done. Throws std::runtime_error
// naming kernel and shape if it cannot be launched. Lengths and offsets are cut to the tensors: checking them here
// would wait for the device.
void dot_attention_fwd(const DotAttentionParams& params, void* workspace, void* stream);

// Where the call allows tf32 and its queries, keys and values suit tensor cores, their dtype becomes kTf32. All kernels
// of a call, forward and backward, then round these operands alike, also those without tensor cores: weights and
// gradients form the scores again that the log-sum-exp was made of.
DotAttentionParams with_rounded_operands(const DotAttentionParams& params);

// The kernels, each with what it takes; dot_attention_fwd chooses.
bool dot_attention_mma_takes(const DotAttentionParams& params);
void dot_attention_mma_fwd(const DotAttentionParams& params, const Parts& parts, void* stream);
void dot_attention_fma_fwd(const DotAttentionParams& params, const Parts& parts, void* stream);
// Weights on request, when lse is there.
void dot_attention_weights(const DotAttentionParams& params, void* stream);

// The same of the gradients. params.delta is a workspace of three planes [B, H, T_q]; gradients of biases are
// overwritten.
const char* dot_attention_bwd_kernel_name(const DotAttentionParams& params);
void dot_attention_bwd(const DotAttentionParams& params, void* stream);

// Its parts: gradients of queries, keys and values by one of two kernels, and that of one bias.
bool dot_attention_mma_bwd_takes(const DotAttentionParams& params);
void dot_attention_mma_bwd(const DotAttentionParams& params, void* stream);
void dot_attention_fma_bwd(const DotAttentionParams& params, void* stream);
void dot_attention_bias_bwd(const DotAttentionParams& params, int which, void* stream);

}  // namespace attnfast::cuda
