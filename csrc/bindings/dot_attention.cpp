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
  const ResultArguments results = ResultArguments::read(args);
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);

  call.set_inputs(query, key, value);
  call.set_results(results);
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
  GradientArguments gradients;
  gradients.read_of_operands(args);
  gradients.read_of_modifiers(args);
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
    call.set_forward(out, lse);
    if (delta) {
      call.check_rows_buffer(delta, call.real);
      params.delta = delta.data;
    } else {
      // A workspace nobody else reads: for a small problem, a tensor for it would cost as much as the kernel.
      own_delta.reset(new double[static_cast<size_t>(call.rows_batch * params.heads * params.query_tokens)]);
      params.delta = own_delta.get();
    }
  } else {
    const bool only_operands = !modifiers.cu_seqlens_q && !modifiers.sink && !gradients.grad_weights &&
                               !gradients.delta_shift && !gradients.grad_bias[0] && !gradients.grad_bias[1] &&
                               params.softcap == 0.0 && params.dropout_p == 0.0 && params.prior_sigma == 0.0;
    if (params.key_tokens > kWholeRowKeys || !only_operands) {
      reject("lse",
             "a tensor (only calls with at most " + std::to_string(kWholeRowKeys) +
                 " keys and no gradient but those of query, key and value do without)",
             "None");
    }
  }
  call.set_gradients(gradients);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, gradients);
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
