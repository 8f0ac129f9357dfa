// The additive core on CUDA: reads the arguments as attnfast._C does, and a workspace after them, and queues the
// kernels.
#include <cstdint>
#include <string>

#include "bindings/additive_call.h"
#include "bindings/cuda_call.h"
#include "bindings/functions.h"
#include "cuda/additive_attention.h"

namespace attnfast {
namespace {

void check_workspace(const TensorView& view, const AdditiveAttentionCall& call, int64_t wanted) {
  if (view) check_buffer(view, call.real, {{"elements", -1}});
  const int64_t got = view ? view.numel() : 0;
  if (got < wanted) {
    reject("workspace", "at least " + std::to_string(wanted) + " elements", std::to_string(got));
  }
}

}  // namespace

py::object additive_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_fwd", items, given, 29, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView weight = args.tensor("weight");
  const TensorView score_bias = args.optional_tensor("score_bias");
  const ResultArguments results = ResultArguments::read(args);
  AdditiveAttentionCall call;
  call.on_device = true;  // under the emulator too, so that it runs what a GPU does
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);
  const TensorView workspace = args.optional_tensor("workspace");

  call.set_inputs(query, key, value);
  call.params.weight = set_vector(weight, call, &call.params.weight_by_head);
  call.params.score_bias = set_vector(score_bias, call, &call.params.score_bias_by_head);
  call.set_results(results);
  call.set_modifiers(modifiers);
  check_workspace(workspace, call, cuda::additive_attention_fwd_workspace(call.params));
  queue(args.device(), [&](void* stream) { cuda::additive_attention_fwd(call.params, workspace.data, stream); });
  return py::none();
}

py::object additive_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_bwd", items, given, 41, kDevice);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView weight = args.tensor("weight");
  const TensorView score_bias = args.optional_tensor("score_bias");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  GradientArguments gradients;
  gradients.read_of_operands(args);
  const TensorView grad_weight = args.optional_tensor("grad_weight");
  const TensorView grad_score_bias = args.optional_tensor("grad_score_bias");
  gradients.read_of_modifiers(args);
  AdditiveAttentionCall call;
  call.on_device = true;  // under the emulator too, so that it runs what a GPU does
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);
  static_cast<void>(args.integer("threads"));  // the CPU's
  const TensorView workspace = args.optional_tensor("workspace");

  AdditiveAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  params.weight = set_vector(weight, call, &params.weight_by_head);
  params.score_bias = set_vector(score_bias, call, &params.score_bias_by_head);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  call.set_forward(out, lse);
  call.set_gradients(gradients);
  params.grad_weight = set_vector_gradient(grad_weight, weight, call);
  params.grad_score_bias = set_vector_gradient(grad_score_bias, score_bias, call);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, gradients);
  check_workspace(workspace, call, cuda::additive_attention_bwd_workspace(params));
  queue(args.device(), [&](void* stream) { cuda::additive_attention_bwd(params, workspace.data, stream); });
  return py::none();
}

// How many elements the workspaces of forward and backward need. Nothing is computed.
py::object additive_attention_workspace(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_workspace", items, given, 5, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView cu_seqlens_q = args.optional_tensor("cu_seqlens_q");
  const int64_t weights_mode = args.integer("weights_mode");
  AdditiveAttentionCall call;
  call.set_inputs(query, key, value);
  check_range("weights_mode", weights_mode, 0, 3);
  call.params.weights_mode = static_cast<WeightsMode>(weights_mode);
  if (cu_seqlens_q) {
    check_buffer(cu_seqlens_q, DType::kInt64, {{"N + 1", -1}});
    call.params.cu_seqlens_q = call.params.cu_seqlens_k = static_cast<const int64_t*>(cu_seqlens_q.data);
    call.params.batch = cu_seqlens_q.size[0] - 1;
  }
  return py::make_tuple(cuda::additive_attention_fwd_workspace(call.params),
                        cuda::additive_attention_bwd_workspace(call.params));
}

}  // namespace attnfast
