// The dot-product core on CUDA: reads the arguments as attnfast._C does, and queues the kernel.
#include <cstdint>
#include <string>

#include "bindings/attention_call.h"
#include "bindings/cuda_call.h"
#include "bindings/functions.h"
#include "cuda/dot_attention.h"

namespace attnfast {

py::object dot_attention_workspace(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_workspace", items, given, 4, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView cu_seqlens_q = args.optional_tensor("cu_seqlens_q");
  CallOf<DotAttentionParams> call;
  call.set_inputs(query, key, value);
  call.params.cu_seqlens_q = static_cast<const int64_t*>(cu_seqlens_q.data);
  return py::int_(cuda::dot_attention_workspace(call.params));
}

// For reports. The output is a new tensor.
py::object dot_attention_kernel(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_kernel", items, given, 4, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  CallOf<DotAttentionParams> call;
  call.params.tf32 = args.integer("tf32") != 0;
  call.set_inputs(query, key, value);
  return py::str(cuda::dot_attention_kernel_name(call.params));
}

py::object dot_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_fwd", items, given, 29, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const ResultArguments results = ResultArguments::read(args);
  CallOf<DotAttentionParams> call;
  call.on_device = true;  // under the emulator too, so that it runs what a GPU does
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  const TensorView workspace = args.optional_tensor("workspace");
  call.params.tf32 = args.integer("tf32") != 0;

  call.set_inputs(query, key, value);
  call.set_results(results);
  call.set_modifiers(modifiers);
  const int64_t needed = cuda::dot_attention_workspace(call.params);
  if (workspace) {
    check_buffer(workspace, call.real, {{"elements", needed}});
  } else if (needed > 0) {
    reject("workspace", "a tensor of " + std::to_string(needed) + " elements", "None");
  }
  queue(args.device(), [&](void* stream) { cuda::dot_attention_fwd(call.params, workspace.data, stream); });
  return py::none();
}

py::object dot_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_bwd", items, given, 39, kDevice);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView delta = args.tensor("delta");
  GradientArguments gradients;
  gradients.read_of_operands(args);
  gradients.read_of_modifiers(args);
  CallOf<DotAttentionParams> call;
  call.on_device = true;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  const int64_t threads = args.integer("threads");
  call.params.tf32 = args.integer("tf32") != 0;

  DotAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  call.set_forward(out, lse);
  check_buffer(delta, call.real,
               {{"planes", 3}, {"B", call.rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}});
  params.delta = delta.data;
  call.set_gradients(gradients);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, gradients);
  call.set_threads(threads);
  queue(args.device(), [&](void* stream) { cuda::dot_attention_bwd(params, stream); });
  return py::none();
}

}  // namespace attnfast
