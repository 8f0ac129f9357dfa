// How the memory functions of attnfast._C and attnfast._cuda fill their parameters: each check that a kernel relies on
// and that needs no look into the tensors.
#pragma once

#include <initializer_list>
#include <string>

#include "bindings/arguments.h"
#include "core/gather_params.h"

namespace attnfast {

// A matrix in the last two of four dimensions.
inline Tensor4 matrix(const TensorView& view) {
  Tensor4 tensor;
  tensor.data = view.data;
  tensor.dtype = view.dtype;
  tensor.stride[2] = view.stride[0];
  tensor.stride[3] = view.stride[1];
  return tensor;
}

inline void set_result(const TensorView& view, DType dtype, std::initializer_list<Dim> dims, void** data) {
  check_buffer(view, dtype, dims);
  check_writable(view);
  *data = view.data;
}

// ---- topk_scores ------------------------------------------------------------------------------------------------

// What is computed in; operands may differ in type within one.
inline DType real_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

inline void set_operands(TopkParams& params, const TensorView& query, const TensorView& keys,
                         const TensorView& key_scales, int64_t count) {
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

// Reads query, keys, key_scales, mask, scores, indices and scale.
inline void read_topk(ArgReader& args, TopkParams& params) {
  const TensorView query = args.tensor("query");
  const TensorView keys = args.tensor("keys");
  const TensorView key_scales = args.optional_tensor("key_scales");
  const TensorView mask = args.optional_tensor("mask");
  const TensorView scores = args.tensor("scores");
  const TensorView indices = args.tensor("indices");
  params.scale = args.number("scale");
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
}

// ---- weighted_gather --------------------------------------------------------------------------------------------

// Returns the dtype that is computed in.
inline DType set_gather(WeightedGatherParams& params, const TensorView& indices, const TensorView& weights,
                        const TensorView& values, const TensorView& scales) {
  check_dtype(indices, DType::kInt64);
  check_shape(indices, {{"B", -1}, {"K", -1}});
  check_contiguous(indices);
  if (values.dtype != DType::kInt8) check_floating(values);
  check_shape(values, {{"N", -1}, {"D_v", -1}});
  const DType real = real_of(values.dtype);
  params.outputs = indices.size[0];
  params.picks = indices.size[1];
  params.slots = values.size[0];
  params.value_size = values.size[1];
  check_buffer(weights, real, {{"B", params.outputs}, {"K", params.picks}});
  if (static_cast<bool>(scales) != (values.dtype == DType::kInt8)) {
    reject("scales", scales ? "None without values in int8" : "a tensor [N] with values in int8",
           scales ? "a tensor" : "None");
  }
  if (scales) {
    check_buffer(scales, DType::kFloat32, {{"N", params.slots}});
    params.scales = static_cast<const float*>(scales.data);
  }
  params.indices = static_cast<const int64_t*>(indices.data);
  params.weights = weights.data;
  params.values = values.data;
  params.values_dtype = values.dtype;
  for (int i = 0; i < 2; ++i) params.values_stride[i] = values.stride[i];
  return real;
}

inline void set_gather_out(WeightedGatherParams& params, DType real, const TensorView& out) {
  if (out.dtype != DType::kBFloat16 && out.dtype != DType::kFloat16) check_dtype(out, real);
  set_result(out, out.dtype, {{"B", params.outputs}, {"D_v", params.value_size}}, &params.out);
  params.out_dtype = out.dtype;
}

// ---- product_keys -----------------------------------------------------------------------------------------------

inline void read_product_keys(ArgReader& args, ProductKeysParams& p) {
  const char* names[2][3] = {{"row_scores", "row_indices", "row_ranks"},
                             {"column_scores", "column_indices", "column_ranks"}};
  TensorView scores[2], indices[2];
  for (int i = 0; i < 2; ++i) {
    scores[i] = args.tensor(names[i][0]);
    indices[i] = args.tensor(names[i][1]);
  }
  p.side = args.integer("side");
  const TensorView slots = args.tensor("slots");
  const TensorView ranks[2] = {args.tensor(names[0][2]), args.tensor(names[1][2])};

  p.dtype = scores[0].dtype;
  if (p.dtype != DType::kFloat64) check_dtype(scores[0], DType::kFloat32);
  check_shape(scores[0], {{"B", -1}, {"candidates", -1}});
  p.rows = scores[0].size[0];
  p.candidates = scores[0].size[1];
  for (int i = 0; i < 2; ++i) {
    check_buffer(scores[i], p.dtype, {{"B", p.rows}, {"candidates", p.candidates}});
    check_buffer(indices[i], DType::kInt64, {{"B", p.rows}, {"candidates", p.candidates}});
    p.scores[i] = scores[i].data;
    p.indices[i] = static_cast<const int64_t*>(indices[i].data);
  }
  check_shape(slots, {{"B", p.rows}, {"k", -1}});
  p.picks = slots.size[1];
  if (p.picks > 0 && (p.candidates == 0 || (p.picks - 1) / p.candidates >= p.candidates)) {
    reject("slots", "k <= candidates^2 with " + std::to_string(p.candidates) + " candidates", std::to_string(p.picks));
  }
  void* data = nullptr;
  set_result(slots, DType::kInt64, {{"B", p.rows}, {"k", p.picks}}, &data);
  p.slots = static_cast<int64_t*>(data);
  for (int i = 0; i < 2; ++i) {
    set_result(ranks[i], DType::kInt64, {{"B", p.rows}, {"k", p.picks}}, &data);
    p.ranks[i] = static_cast<int64_t*>(data);
  }
}

}  // namespace attnfast
