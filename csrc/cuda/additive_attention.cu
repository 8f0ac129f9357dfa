// How a call of the additive core is cut into tiles and splits, the workspace that this takes, and what no kernel has
// yet.
#include "cuda/additive_attention.h"

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
  call.workspace = workspace;
  return call;
}

void refuse_missing(const AdditiveAttentionParams& p, const char* name) {
  if (const char* missing = additive_attention_missing(p)) {
    throw std::runtime_error(call_text(name, p) + ": no kernel has " + missing);
  }
}

}  // namespace

const char* additive_attention_missing(const AdditiveAttentionParams& p) {
  if (p.cu_seqlens_q) return "packed sequences (cu_seqlens)";
  if (p.weights_mode != WeightsMode::kNone) return "weights on request (return_weights)";
  if (p.window_bounds) return "windows around centres (window_center)";
  if (p.prior_sigma > 0.0) return "a Gaussian prior (prior)";
  return nullptr;
}

bool additive_attention_is_narrow(const AttentionParams& p) { return p.query_tokens <= kNarrowRows; }

int64_t additive_attention_rows(const AttentionParams& p) {
  if (additive_attention_is_narrow(p)) return kNarrowRows;
  return p.query.dtype == DType::kFloat64 ? 16 : 32;
}

int64_t additive_attention_splits(const AttentionParams& p) {
  const int64_t rows = additive_attention_rows(p);
  const int64_t blocks = (p.query_tokens + rows - 1) / rows * p.heads * p.batch;
  if (blocks == 0 || blocks >= kWantedBlocks) return 1;
  const int64_t wanted = (kWantedBlocks + blocks - 1) / blocks, possible = p.key_tokens / kMinSplitKeys;
  return possible < 1 ? 1 : wanted < possible ? wanted : possible;
}

int64_t additive_attention_fwd_workspace(const AdditiveAttentionParams& p) {
  const int64_t splits = additive_attention_splits(p);
  // A split leaves the output of its keys, its maximum and its sum.
  return splits == 1 ? 0 : splits * p.batch * p.heads * p.query_tokens * (p.value_size + 2);
}

void additive_attention_fwd(const AdditiveAttentionParams& p, void* workspace, void* stream) {
  refuse_missing(p, "additive_attention_fwd");
  if (p.batch == 0 || p.heads == 0 || p.query_tokens == 0) return;
  additive_attention_fwd_launch(call_of(p, workspace), stream);
}

void additive_attention_bwd(const AdditiveAttentionParams& p, void* workspace, void* stream) {
  refuse_missing(p, "additive_attention_bwd");
  additive_attention_bwd_launch(call_of(p, workspace), stream);
}

}  // namespace attnfast::cuda
