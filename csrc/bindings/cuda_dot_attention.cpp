// The dot-product core on CUDA: reads the arguments as attnfast._C does, and queues the kernel.
#include <cstdint>

#include "bindings/attention_call.h"
#include "bindings/cuda_call.h"
#include "bindings/functions.h"
#include "cuda/dot_attention.h"

namespace attnfast {

py::object dot_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_fwd", items, given, 27, kDevice);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView weights = args.optional_tensor("weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  CallOf<DotAttentionParams> call;
  call.on_device = kDevice != dlpack::kCpu;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);

  call.set_inputs(query, key, value);
  call.set_results(out, lse, weights, weights_index, weights_mode);
  // Before their values are looked at: what the kernels do not have is refused by name.
  call.params.cu_seqlens_q = static_cast<const int64_t*>(modifiers.cu_seqlens_q.data);
  if (const char* missing = cuda::dot_attention_missing(call.params)) refuse(missing);
  call.set_modifiers(modifiers);
  if (const char* missing = cuda::dot_attention_missing(call.params)) refuse(missing);
  queue(args.device(), [&](void* stream) { cuda::dot_attention_fwd(call.params, stream); });
  return py::none();
}

}  // namespace attnfast
