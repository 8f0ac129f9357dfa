// How a call of the additive core is cut into tiles and splits, and the workspace that this takes.
#include "cuda/additive_attention.h"

#include "cuda/device/gradients.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

// Keys are split until there are this many blocks, about two for each multiprocessor of a large GPU.
constexpr int64_t kWantedBlocks = 256, kMinSplitKeys = 64;

AdditiveCall call_of(const AdditiveAttentionParams& p, void* workspace) {
  AdditiveCall call;
  static_cast<AttentionParams&>(call) = p;
  call.scale = 1.0;
  call.weight = p.weight;
  call.score_bias = p.score_bias;
  call.weight_by_head = p.weight_by_head;
  call.score_bias_by_head = p.score_bias_by_head;
  call.grad_weight = p.grad_weight;
  call.grad_score_bias = p.grad_score_bias;
  call.splits = additive_attention_splits(p);
  call.workspace = call.delta = workspace;
  return call;
}

}  // namespace

// Of packed sequences the host knows no lengths, but how long they are on average.
bool additive_attention_is_narrow(const AttentionParams& p) {
  return p.query_tokens <= kNarrowRows * (p.cu_seqlens_q ? p.batch : 1);
}

int64_t additive_attention_rows(const AttentionParams& p) {
  if (additive_attention_is_narrow(p)) return kNarrowRows;
  return p.query.dtype == DType::kFloat64 ? 16 : 32;
}

int64_t additive_attention_splits(const AttentionParams& p) {
  if (p.cu_seqlens_q) return 1;
  const int64_t rows = additive_attention_rows(p);
  const int64_t blocks = (p.query_tokens + rows - 1) / rows * p.heads * p.batch;
  if (blocks == 0 || blocks >= kWantedBlocks) return 1;
  const int64_t wanted = (kWantedBlocks + blocks - 1) / blocks, possible = p.key_tokens / kMinSplitKeys;
  return possible < 1 ? 1 : wanted < possible ? wanted : possible;
}

int64_t additive_attention_fwd_workspace(const AdditiveAttentionParams& p) {
  const int64_t splits = additive_attention_splits(p), rows = plane_size(p);
  // A split leaves the output of its keys, its maximum and its sum. They have been merged when weights are formed.
  const int64_t parts = splits == 1 ? 0 : splits * rows * (p.value_size + 2);
  const int64_t planes = p.weights_mode == WeightsMode::kNone ? 0 : kQueryPlanes * rows;
  return parts > planes ? parts : planes;
}

void additive_attention_fwd(const AdditiveAttentionParams& p, void* workspace, void* stream) {
  if (p.batch == 0 || p.heads == 0) return;
  const AdditiveCall call = call_of(p, workspace);
  if (p.query_tokens > 0) additive_attention_fwd_launch(call, stream);
  if (p.weights_mode != WeightsMode::kNone) additive_attention_weights(call, stream);
}

void additive_attention_bwd(const AdditiveAttentionParams& p, void* workspace, void* stream) {
  additive_attention_bwd_launch(call_of(p, workspace), stream);
}

}  // namespace attnfast::cuda
