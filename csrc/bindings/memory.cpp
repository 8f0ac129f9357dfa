// The memory functions: reads the arguments, checks everything a kernel relies on, fills the parameters, releases the
// GIL and calls the kernel of the chosen ISA. One section a function.
#include <cstdint>
#include <limits>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "cpu/isa.h"

namespace attnfast {
namespace {

// A matrix in the last two of four dimensions.
Tensor4 matrix(const TensorView& view) {
  Tensor4 tensor;
  tensor.data = view.data;
  tensor.dtype = view.dtype;
  tensor.stride[2] = view.stride[0];
  tensor.stride[3] = view.stride[1];
  return tensor;
}

// ---- topk_scores ------------------------------------------------------------------------------------------------

// What is computed in; operands may differ in type within one.
DType real_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void set_operands(TopkParams& params, const TensorView& query, const TensorView& keys, const TensorView& key_scales,
                  int64_t count) {
  check_floating(query);
  if (keys.dtype != DType::kInt8) check_floating(keys);
  check_shape(query, {{"B", -1}, {"D", -1}});
  check_shape(keys, {{"N", -1}, {"D", query.size[1]}});
  if (real_of(keys.dtype) != real_of(query.dtype)) {
    throw py::type_error(std::string("keys: expected float64 where query is and only there, got ") +
                         dtype_name(keys.dtype) + " with " + dtype_name(query.dtype));
  }
  if (keys.size[1] > 1 && keys.stride[1] != 1) {
    throw py::value_error("keys: expected rows of neighbouring elements, got stride " + std::to_string(keys.stride[1]));
  }
  if (static_cast<bool>(key_scales) != (keys.dtype == DType::kInt8)) {
    reject("key_scales", key_scales ? "None without keys in int8" : "a tensor [N] with keys in int8",
           key_scales ? "a tensor" : "None");
  }
  if (key_scales) {
    check_buffer(key_scales, DType::kFloat32, {{"N", keys.size[0]}});
    params.key_scales = static_cast<const float*>(key_scales.data);
  }
  check_range("k", count, 0, keys.size[0]);
  params.queries = query.size[0];
  params.slots = keys.size[0];
  params.size = query.size[1];
  params.count = count;
  params.query = matrix(query);
  params.keys = matrix(keys);
}

}  // namespace

py::object topk_scores_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_fwd", items, given, 8);
  const TensorView query = args.tensor("query");
  const TensorView keys = args.tensor("keys");
  const TensorView key_scales = args.optional_tensor("key_scales");
  const TensorView mask = args.optional_tensor("mask");
  const TensorView scores = args.tensor("scores");
  const TensorView indices = args.tensor("indices");
  TopkParams params;
  params.scale = args.number("scale");
  const int64_t threads = args.integer("threads");

  check_shape(scores, {{"B", -1}, {"k", -1}});
  set_operands(params, query, keys, key_scales, scores.size[1]);
  check_buffer(scores, real_of(query.dtype), {{"B", params.queries}, {"k", params.count}});
  check_buffer(indices, DType::kInt64, {{"B", params.queries}, {"k", params.count}});
  params.scores = scores.data;
  params.indices = static_cast<int64_t*>(indices.data);
  if (mask) {
    check_dtype(mask, DType::kBool);
    check_shape(mask, {{"B", params.queries}, {"N", params.slots}});
    params.mask = matrix(mask);
  }
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

}  // namespace attnfast
