// The memory functions on CUDA: reads the arguments, checks what needs no look into device memory, and queues the
// kernels. One section a function. What torch does better stays in Python: the sort of picks by slot, and all memory.
#include <cstdint>

#include "bindings/cuda_call.h"
#include "bindings/functions.h"
#include "bindings/memory_call.h"
#include "cuda/product_keys.h"
#include "cuda/topk_scores.h"
#include "cuda/weighted_gather.h"

namespace attnfast {

// ---- topk_scores ------------------------------------------------------------------------------------------------

py::object topk_scores_workspace(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_workspace", items, given, 3, kDevice);
  const TensorView keys = args.tensor("keys");
  check_shape(keys, {{"N", -1}, {"D", -1}});
  TopkParams params;
  params.queries = args.integer("queries");
  params.count = args.integer("k");
  params.slots = keys.size[0];
  params.size = keys.size[1];
  params.keys = matrix(keys);
  return py::int_(cuda::topk_scores_workspace(params) / static_cast<int64_t>(sizeof(int64_t)));
}

py::object topk_scores_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_fwd", items, given, 8, kDevice);
  TopkParams params;
  read_topk(args, params);
  const TensorView workspace = args.tensor("workspace");
  if (const char* missing = cuda::topk_scores_missing(params)) refuse(missing);
  check_buffer(workspace, DType::kInt64, {{"words", cuda::topk_scores_workspace(params) / 8}});
  queue(args.device(), [&](void* stream) { cuda::topk_scores_fwd(params, workspace.data, stream); });
  return py::none();
}

// ---- weighted_gather --------------------------------------------------------------------------------------------

py::object weighted_gather_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_fwd", items, given, 5, kDevice);
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView out = args.tensor("out");
  WeightedGatherParams params;
  const DType real = set_gather(params, indices, weights, values, scales);
  set_gather_out(params, real, out);
  queue(args.device(), [&](void* stream) { cuda::weighted_gather_fwd(params, stream); });
  return py::none();
}

py::object weighted_gather_partial_rows(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_partial_rows", items, given, 1, kDevice);
  return py::int_(2 * cuda::segment_chunks(args.integer("entries")));
}

py::object weighted_gather_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_bwd", items, given, 11, kDevice);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView slots = args.optional_tensor("slots");
  const TensorView order = args.optional_tensor("order");
  const TensorView ranks = args.optional_tensor("ranks");
  const TensorView partial_sums = args.optional_tensor("partial_sums");
  const TensorView grad_values = args.optional_tensor("grad_values");
  WeightedGatherParams params;
  const DType real = set_gather(params, indices, weights, values, scales);
  check_buffer(grad_out, real, {{"B", params.outputs}, {"D_v", params.value_size}});
  params.grad_out = grad_out.data;
  if (grad_weights) {
    set_result(grad_weights, real, {{"B", params.outputs}, {"K", params.picks}}, &params.grad_weights);
  }
  cuda::GatherSegments segments;
  segments.entries = params.outputs * params.picks;
  if (grad_values) {
    if (values.dtype == DType::kInt8) reject("grad_values", "None for values in int8", "a tensor");
    if (!slots || !order || !partial_sums) {
      reject("slots, order and partial_sums", "tensors where grad_values is one", "None");
    }
    check_buffer(slots, DType::kInt64, {{"B * K", segments.entries}});
    check_buffer(order, DType::kInt64, {{"B * K", segments.entries}});
    segments.slots = static_cast<const int64_t*>(slots.data);
    segments.order = static_cast<const int64_t*>(order.data);
    if (ranks) {
      check_buffer(ranks, DType::kInt64, {{"B * K", segments.entries}});
      segments.ranks = static_cast<const int64_t*>(ranks.data);
    }
    set_result(partial_sums, real, {{"rows", 2 * cuda::segment_chunks(segments.entries)}, {"D_v", params.value_size}},
               &params.partial_sums);
    set_result(grad_values, values.dtype, {{"rows", ranks ? -1 : params.slots}, {"D_v", params.value_size}},
               &params.grad_values);
  }
  queue(args.device(), [&](void* stream) {
    if (grad_weights) cuda::weighted_gather_dots(params, stream);
    if (grad_values) cuda::weighted_gather_sums(params, segments, stream);
  });
  return py::none();
}

// ---- product_keys -----------------------------------------------------------------------------------------------

py::object product_keys(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("product_keys", items, given, 8, kDevice);
  ProductKeysParams params;
  read_product_keys(args, params);
  if (const char* missing = cuda::product_keys_missing(params)) refuse(missing);
  queue(args.device(), [&](void* stream) { cuda::product_keys(params, stream); });
  return py::none();
}

}  // namespace attnfast
