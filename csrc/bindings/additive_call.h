// One checked call of the additive core: what attention_call.h does not know, its weight and score bias.
#pragma once

#include "bindings/attention_call.h"

namespace attnfast {

using AdditiveAttentionCall = CallOf<AdditiveAttentionParams>;

// A vector of each head or one for all, [H, D] or [1, D].
inline const void* set_vector(const TensorView& view, const AdditiveAttentionCall& call, bool* by_head) {
  if (!view) return nullptr;
  *by_head = view.ndim == 2 && view.size[0] == call.params.heads;
  check_buffer(view, call.real, {{"H or 1", *by_head ? call.params.heads : 1}, {"D", call.params.head_size}});
  return view.data;
}
inline void* set_vector_gradient(const TensorView& view, const TensorView& input, const AdditiveAttentionCall& call) {
  if (!view) return nullptr;
  if (!input) reject(view.name, "None without its input", "a tensor");
  check_buffer(view, call.real, {{"H or 1", input.size[0]}, {"D", call.params.head_size}});
  return view.data;
}

}  // namespace attnfast
