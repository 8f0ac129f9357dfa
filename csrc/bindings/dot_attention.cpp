// The dot-product core: reads the arguments, fills the parameters, releases the GIL and calls the kernel of the chosen
// ISA.
#include <memory>
#include <string>

#include "bindings/attention_call.h"
#include "bindings/functions.h"
#include "cpu/isa.h"

namespace attnfast {
namespace {

using Call = CallOf<DotAttentionParams>;

}  // namespace

py::object dot_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_fwd", items, given, 27);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView weights = args.optional_tensor("weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);

  call.set_inputs(query, key, value);
  call.set_results(out, lse, weights, weights_index, weights_mode);
  call.set_modifiers(modifiers);

  const KernelTable& table = kernels();
  call.params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.dot_attention_fwd(call.params);
  }
  return py::none();
}

py::object dot_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_bwd", items, given, 38);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.optional_tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView delta = args.optional_tensor("delta");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  const TensorView delta_shift = args.optional_tensor("delta_shift");
  const TensorView grad_query = args.optional_tensor("grad_query");
  const TensorView grad_key = args.optional_tensor("grad_key");
  const TensorView grad_value = args.optional_tensor("grad_value");
  const TensorView grad_bias[2] = {args.optional_tensor("grad_bias"), args.optional_tensor("grad_bias2")};
  const TensorView grad_sink = args.optional_tensor("grad_sink");
  const TensorView grad_center = args.optional_tensor("grad_center");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  const int64_t threads = args.integer("threads");

  DotAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  if (static_cast<bool>(out) != static_cast<bool>(lse)) {
    reject(out ? "lse" : "out", "both out and lse or neither", "None");
  }
  std::unique_ptr<double[]> own_delta;
  if (lse) {
    call.check_out_shape(out);
    params.out = tensor4(out);
    call.check_rows_buffer(lse, call.real);
    params.lse = lse.data;
    if (delta) {
      call.check_rows_buffer(delta, call.real);
      params.delta = delta.data;
    } else {
      // A workspace nobody else reads: for a small problem, a tensor for it would cost as much as the kernel.
      own_delta.reset(new double[static_cast<size_t>(call.rows_batch * params.heads * params.query_tokens)]);
      params.delta = own_delta.get();
    }
  } else {
    const bool only_operands = !modifiers.cu_seqlens_q && !modifiers.sink && !grad_weights && !delta_shift &&
                               !grad_bias[0] && !grad_bias[1] && params.softcap == 0.0 && params.dropout_p == 0.0 &&
                               params.prior_sigma == 0.0;
    if (params.key_tokens > kWholeRowKeys || !only_operands) {
      reject("lse",
             "a tensor (only calls with at most " + std::to_string(kWholeRowKeys) +
                 " keys and no gradient but those of query, key and value do without)",
             "None");
    }
  }
  if (delta_shift) {
    call.check_rows_buffer(delta_shift, call.real);
    params.delta_shift = delta_shift.data;
  }
  call.set_weights("grad_weights", grad_weights, weights_index, weights_mode);
  if (grad_weights) params.grad_weights = call.weights_view(grad_weights);
  call.set_gradients(grad_query, grad_key, grad_value);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, grad_bias, grad_sink, grad_center);
  call.set_threads(threads);

  const KernelTable& table = kernels();
  params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.dot_attention_bwd(params);
  }
  return py::none();
}

// None if the forward takes the decode kernel, else why not. Nothing is computed.
py::object dot_attention_decode_obstacle(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_decode_obstacle", items, given, 22);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  call.set_inputs(query, key, value);
  call.set_modifiers(modifiers);
  const char* obstacle = kernels().dot_attention_decode_obstacle(call.params);
  if (obstacle == nullptr) return py::none();
  return py::str(obstacle);
}

}  // namespace attnfast
