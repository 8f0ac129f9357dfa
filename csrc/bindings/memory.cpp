// The memory functions: reads the arguments, checks everything a kernel relies on, fills the parameters, releases the
// GIL and calls the kernel of the chosen ISA. One section a function.
#include <cstdint>
#include <limits>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/memory_call.h"
#include "cpu/isa.h"

namespace attnfast {

// ---- topk_scores ------------------------------------------------------------------------------------------------

py::object topk_scores_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_fwd", items, given, 7);
  TopkParams params;
  read_topk(args, params);
  const int64_t threads = args.integer("threads");
  check_range("threads", threads, 1, std::numeric_limits<int32_t>::max());
  params.threads = static_cast<int32_t>(threads);

  const KernelTable& table = kernels();
  params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.topk_scores_fwd(params);
  }
  return py::none();
}

py::object topk_scores_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_bwd", items, given, 8);
  const TensorView grad_scores = args.tensor("grad_scores");
  const TensorView query = args.tensor("query");
  const TensorView keys = args.tensor("keys");
  const TensorView indices = args.tensor("indices");
  const TensorView order = args.optional_tensor("order");
  const TensorView grad_query = args.optional_tensor("grad_query");
  const TensorView grad_keys = args.optional_tensor("grad_keys");
  TopkGradientParams params;
  params.scale = args.number("scale");

  check_shape(indices, {{"B", -1}, {"k", -1}});
  set_operands(params, query, keys, indices.size[1]);
  const int64_t total = params.queries * params.count;
  check_buffer(indices, DType::kInt64, {{"B", params.queries}, {"k", params.count}});
  check_buffer(grad_scores, real_of(query.dtype), {{"B", params.queries}, {"k", params.count}});
  if (query.size[1] > 1 && query.stride[1] != 1) {
    throw py::value_error("query: expected rows of neighbouring elements, got stride " +
                          std::to_string(query.stride[1]));
  }
  params.grad_scores = grad_scores.data;
  params.indices = static_cast<const int64_t*>(indices.data);
  for (int64_t i = 0; i < total; ++i) check_range("indices", params.indices[i], -1, params.slots - 1);
  if (grad_query) {
    check_buffer(grad_query, query.dtype, {{"B", params.queries}, {"D", params.size}});
    params.grad_query = matrix(grad_query);
  }
  if (grad_keys) {
    check_buffer(grad_keys, keys.dtype, {{"N", params.slots}, {"D", params.size}});
    params.grad_keys = matrix(grad_keys);
    if (!order) reject("order", "a tensor where grad_keys is one", "None");
    check_buffer(order, DType::kInt64, {{"B * k", total}});
    params.order = static_cast<const int64_t*>(order.data);
    for (int64_t i = 0; i < total; ++i) {
      check_range("order", params.order[i], 0, total - 1);
      if (i > 0 && params.indices[params.order[i]] < params.indices[params.order[i - 1]]) {
        reject("order", "positions sorted by their slots", "a smaller slot at " + std::to_string(i));
      }
    }
  }

  const KernelTable& table = kernels();
  {
    const py::gil_scoped_release no_gil;
    table.topk_scores_bwd(params);
  }
  return py::none();
}

}  // namespace attnfast
