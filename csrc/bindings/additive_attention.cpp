// The additive core: reads the arguments, fills the parameters, releases the GIL and calls the kernel of the chosen
// ISA.
#include <memory>

#include "bindings/additive_call.h"
#include "bindings/functions.h"
#include "cpu/isa.h"

namespace attnfast {

py::object additive_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_fwd", items, given, 28);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView weight = args.tensor("weight");
  const TensorView score_bias = args.optional_tensor("score_bias");
  const ResultArguments results = ResultArguments::read(args);
  AdditiveAttentionCall call;
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);

  call.set_inputs(query, key, value);
  call.params.weight = set_vector(weight, call, &call.params.weight_by_head);
  call.params.score_bias = set_vector(score_bias, call, &call.params.score_bias_by_head);
  call.set_results(results);
  call.set_modifiers(modifiers);

  {
    const py::gil_scoped_release no_gil;
    kernels().additive_attention_fwd(call.params);
  }
  return py::none();
}

py::object additive_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_bwd", items, given, 40);
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
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);
  const int64_t threads = args.integer("threads");

  AdditiveAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  params.weight = set_vector(weight, call, &params.weight_by_head);
  params.score_bias = set_vector(score_bias, call, &params.score_bias_by_head);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  call.set_forward(out, lse);
  // A workspace nobody else reads; doubles, so that either type fits.
  const std::unique_ptr<double[]> delta(new double[static_cast<size_t>(lse.numel())]);
  params.delta = delta.get();
  call.set_gradients(gradients);
  params.grad_weight = set_vector_gradient(grad_weight, weight, call);
  params.grad_score_bias = set_vector_gradient(grad_score_bias, score_bias, call);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, gradients);
  call.set_threads(threads);

  {
    const py::gil_scoped_release no_gil;
    kernels().additive_attention_bwd(params);
  }
  return py::none();
}

// None if the forward takes the decode kernel, else why not. Nothing is computed.
py::object additive_attention_decode_obstacle(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_decode_obstacle", items, given, 21);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  AdditiveAttentionCall call;
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);
  call.set_inputs(query, key, value);
  call.set_modifiers(modifiers);
  const char* obstacle = kernels().additive_attention_decode_obstacle(call.params);
  if (obstacle == nullptr) return py::none();
  return py::str(obstacle);
}

}  // namespace attnfast
