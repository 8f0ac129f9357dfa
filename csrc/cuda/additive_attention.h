// The additive core on CUDA, as the bindings call it. Pointers of the parameters are of the device, the parameters
// themselves of the host. Nothing is allocated here: a caller brings a workspace of as many elements (double for
// float64, float otherwise) as additive_attention_*_workspace says, which nobody else uses meanwhile.
#pragma once

#include <type_traits>

#include "cuda/device/additive_call.cuh"

namespace attnfast::cuda {

// From shapes, the mode of the weights, and whether sequences are packed.
int64_t additive_attention_fwd_workspace(const AdditiveAttentionParams& params);
int64_t additive_attention_bwd_workspace(const AdditiveAttentionParams& params);

// Queues the call on `stream` (a cudaStream_t). Throws std::runtime_error naming kernel and shape if it cannot be
// launched. Lengths and offsets are cut to the tensors: checking them here would wait for the device.
void additive_attention_fwd(const AdditiveAttentionParams& params, void* workspace, void* stream);
void additive_attention_bwd(const AdditiveAttentionParams& params, void* workspace, void* stream);

// How a call is cut: by its shapes.
bool additive_attention_is_narrow(const AttentionParams& params);
int64_t additive_attention_rows(const AttentionParams& params);    // of a tile
int64_t additive_attention_splits(const AttentionParams& params);  // see AdditiveCall

// launch(R(), std::bool_constant<NARROW>()) of the AdditivePlan of a call.
template <class Launch>
void with_plan(const AttentionParams& p, Launch launch) {
  const bool narrow = additive_attention_is_narrow(p);
  if (p.query.dtype == DType::kFloat64)
    narrow ? launch(double(), std::true_type()) : launch(double(), std::false_type());
  else
    narrow ? launch(float(), std::true_type()) : launch(float(), std::false_type());
}

// The parts of these, a file each. call.delta has three planes (device/gradients.cuh).
void additive_attention_fwd_launch(const AdditiveCall& call, void* stream);
// Planes base and log, from the log-sum-exp.
void additive_attention_bases(const AdditiveCall& call, void* stream);
// Weights on request, when lse is there.
void additive_attention_weights(const AdditiveCall& call, void* stream);
// Everything of a backward; of it, when the planes are there: what queries are given, what keys and values are, and the
// gradient of one bias.
void additive_attention_bwd_launch(const AdditiveCall& call, void* stream);
void additive_attention_query_bwd(const AdditiveCall& call, void* stream);
void additive_attention_key_bwd(const AdditiveCall& call, void* stream);
void additive_attention_bias_bwd(const AdditiveCall& call, int which, void* stream);

}  // namespace attnfast::cuda
