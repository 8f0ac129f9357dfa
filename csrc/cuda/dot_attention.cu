// Which kernel takes a forward of the dot core, and what none of them has yet.
#include "cuda/dot_attention.h"

#include "cuda/launch.h"

namespace attnfast::cuda {

const char* dot_attention_missing(const DotAttentionParams& p) {
  if (p.head_size > 256 || p.value_size > 256) return "head sizes above 256";
  if (p.cu_seqlens_q) return "packed sequences (cu_seqlens)";
  if (p.weights_mode != WeightsMode::kNone) return "weights on request (return_weights)";
  if (p.window_bounds) return "windows around centres (window_center)";
  if (p.prior_sigma > 0.0) return "a Gaussian prior (prior)";
  return nullptr;
}

const char* dot_attention_kernel_name(const DotAttentionParams& p) {
  return dot_attention_mma_takes(p) ? "dot_attention_mma" : "dot_attention_fma";
}

void dot_attention_fwd(const DotAttentionParams& p, void* stream) {
  if (const char* missing = dot_attention_missing(p)) {
    throw std::runtime_error(call_text("dot_attention_fwd", p) + ": no kernel has " + missing);
  }
  if (p.batch == 0 || p.heads == 0 || p.query_tokens == 0) return;
  if (dot_attention_mma_takes(p))
    dot_attention_mma_fwd(p, stream);
  else
    dot_attention_fma_fwd(p, stream);
}

}  // namespace attnfast::cuda
