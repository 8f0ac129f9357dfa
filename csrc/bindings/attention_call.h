// One checked call of an attention op: from the tensors that Python passes to the parameters that both score cores
// share.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "core/params.h"

namespace attnfast {

// The arguments that forward and backward share, in the order in which both list them.
struct Modifiers {
  TensorView mask, bias[2], query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sink, center, seed,
      window_bounds;

  void read(ArgReader& args, AttentionParams& params, double* scale) {
    mask = args.optional_tensor("mask");
    bias[0] = args.optional_tensor("bias");
    bias[1] = args.optional_tensor("bias2");
    query_lengths = args.optional_tensor("query_lengths");
    key_lengths = args.optional_tensor("key_lengths");
    cu_seqlens_q = args.optional_tensor("cu_seqlens_q");
    cu_seqlens_k = args.optional_tensor("cu_seqlens_k");
    alibi_slopes = args.optional_tensor("alibi_slopes");
    sink = args.optional_tensor("sink");
    center = args.optional_tensor("prior_center");
    seed = args.optional_host_tensor("seed");
    window_bounds = args.optional_tensor("window_bounds");
    if (scale != nullptr) *scale = args.number("scale");
    params.softcap = args.number("softcap");
    params.dropout_p = args.number("dropout_p");
    params.prior_sigma = args.number("prior_sigma");
    params.causal = causal(args.integer("causal"));
    params.window_left = args.integer("window_left");
    params.window_right = args.integer("window_right");
  }

 private:
  static Causal causal(int64_t value) {
    check_range("causal", value, 0, 2);
    return static_cast<Causal>(value);
  }
};

// What every forward takes for its results, in the order in which it lists them.
struct ResultArguments {
  TensorView out, lse, weights, weights_index;
  int64_t weights_mode;

  // In place, as every call of a small problem passes here: elements of a braced list are made from left to right.
  static ResultArguments read(ArgReader& args) {
    return {args.tensor("out"), args.optional_tensor("lse"), args.optional_tensor("weights"),
            args.optional_tensor("weights_index"), args.integer("weights_mode")};
  }
};

// What every backward takes from the gradient of the weights on, in the order in which it lists them; a core's own
// gradients stand between the two runs.
struct GradientArguments {
  TensorView grad_weights, weights_index, delta_shift, grad_query, grad_key, grad_value, grad_bias[2], grad_sink,
      grad_center;
  int64_t weights_mode = 0;

  void read_of_operands(ArgReader& args) {
    grad_weights = args.optional_tensor("grad_weights");
    weights_index = args.optional_tensor("weights_index");
    weights_mode = args.integer("weights_mode");
    delta_shift = args.optional_tensor("delta_shift");
    grad_query = args.optional_tensor("grad_query");
    grad_key = args.optional_tensor("grad_key");
    grad_value = args.optional_tensor("grad_value");
  }
  void read_of_modifiers(ArgReader& args) {
    grad_bias[0] = args.optional_tensor("grad_bias");
    grad_bias[1] = args.optional_tensor("grad_bias2");
    grad_sink = args.optional_tensor("grad_sink");
    grad_center = args.optional_tensor("grad_center");
  }
};

// One checked call: the parameters and what they point to beside the tensors.
template <class Params>
struct CallOf {
  Params params;
  DType dtype = DType::kFloat32;
  DType real = DType::kFloat32;
  // The tensors lie on a GPU: values of lengths and offsets are not looked at here, because that would wait for it.
  bool on_device = false;
  int64_t rows_batch = 0;  // the first dimension of the tensors: B, or 1 for packed input
  // Copies: a kernel runs without the GIL, and a length that another thread changes after the check must do no harm.
  std::vector<int64_t> query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k;

  void set_inputs(const TensorView& query, const TensorView& key, const TensorView& value) {
    check_floating(query);
    check_shape(query, {{"B", -1}, {"H", -1}, {"T_q", -1}, {"D", -1}});
    dtype = query.dtype;
    real = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    check_dtype(key, dtype);
    check_shape(key, {{"B", query.size[0]}, {"H_kv", -1}, {"T_k", -1}, {"D", query.size[3]}});
    check_dtype(value, dtype);
    check_shape(value, {{"B", query.size[0]}, {"H_kv", key.size[1]}, {"T_k", key.size[2]}, {"D_v", -1}});
    rows_batch = params.batch = query.size[0];
    params.heads = query.size[1];
    params.kv_heads = key.size[1];
    params.query_tokens = query.size[2];
    params.key_tokens = key.size[2];
    params.head_size = query.size[3];
    params.value_size = value.size[3];
    if (params.heads != params.kv_heads &&
        (params.heads == 0 || params.kv_heads == 0 || params.heads % params.kv_heads != 0)) {
      reject("key", "H_kv dividing H = " + std::to_string(params.heads), std::to_string(params.kv_heads));
    }
    params.query = tensor4(query);
    params.key = tensor4(key);
    params.value = tensor4(value);
  }

  void set_modifiers(const Modifiers& given) {
    if (given.mask) {
      check_dtype(given.mask, DType::kBool);
      check_scores_shape(given.mask);
      params.mask = tensor4(given.mask);
    }
    for (int i = 0; i < 2; ++i) {
      if (!given.bias[i]) continue;
      check_floating(given.bias[i]);
      check_scores_shape(given.bias[i]);
      params.bias[i] = tensor4(given.bias[i]);
    }
    set_packing(given);
    params.query_lengths = set_lengths(given.query_lengths, "T_q", params.query_tokens, query_lengths);
    params.key_lengths = set_lengths(given.key_lengths, "T_k", params.key_tokens, key_lengths);
    if (given.alibi_slopes) {
      check_dtype(given.alibi_slopes, real);
      check_shape(given.alibi_slopes, {{"B", params.batch}, {"H", params.heads}});
      params.alibi_slopes = given.alibi_slopes.data;
      for (int i = 0; i < 2; ++i) params.alibi_stride[i] = given.alibi_slopes.stride[i];
    }
    if (given.sink) {
      check_buffer(given.sink, real, {{"H", params.heads}});
      params.sink = given.sink.data;
    }
    if (!(params.softcap >= 0.0) || std::isinf(params.softcap)) {
      reject("softcap", "a finite float >= 0", std::to_string(params.softcap));
    }
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    check_range("window_left", params.window_left, -1, kMax);
    check_range("window_right", params.window_right, -1, kMax);
    if (given.window_bounds) {
      const TensorView& bounds = given.window_bounds;
      check_dtype(bounds, DType::kInt64);
      check_shape(bounds, {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"(begin, end)", 2}});
      if (bounds.stride[3] != 1 && bounds.numel() > 0) {
        reject(bounds.name, "a contiguous last dimension", "a stride of " + std::to_string(bounds.stride[3]));
      }
      params.window_bounds = static_cast<const int64_t*>(bounds.data);
      for (int i = 0; i < 3; ++i) params.window_bounds_stride[i] = bounds.stride[i];
    }
    set_prior(given.center);
    set_dropout(given.seed);
  }

  void check_rows_buffer(const TensorView& view, DType type) const {
    check_buffer(view, type, {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}});
  }

  void check_scores_shape(const TensorView& view) const {
    check_shape(view,
                {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"T_k", params.key_tokens}});
  }

  void check_out_shape(const TensorView& view) const {
    check_dtype(view, dtype);
    check_shape(view,
                {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"D_v", params.value_size}});
  }

  // The weights or their gradient, which have one layout; the reduced forms are seen as [B, H, 1, T_k], [B, H, T_q, 1].
  Tensor4 weights_view(const TensorView& view) const {
    if (params.weights_mode == WeightsMode::kFull) {
      check_dtype(view, dtype);
      check_scores_shape(view);
      return tensor4(view);
    }
    const bool column_sum = params.weights_mode == WeightsMode::kColumnSum;
    check_dtype(view, real);
    check_shape(view, {{"B", rows_batch},
                       {"H", params.heads},
                       {column_sum ? "T_k" : "T_q", column_sum ? params.key_tokens : params.query_tokens}});
    Tensor4 tensor;
    tensor.data = view.data;
    tensor.dtype = view.dtype;
    tensor.stride[0] = view.stride[0];
    tensor.stride[1] = view.stride[1];
    tensor.stride[column_sum ? 3 : 2] = view.stride[2];
    return tensor;
  }

  // What a forward writes.
  void set_results(const ResultArguments& given) {
    check_out_shape(given.out);
    check_writable(given.out);
    params.out = tensor4(given.out);
    if (given.lse) {
      check_rows_buffer(given.lse, real);
      params.lse = given.lse.data;
    } else if (given.weights) {
      reject("lse", "a tensor, because weights are asked for", "None");
    }
    set_weights("weights", given.weights, given.weights_index, given.weights_mode);
    if (given.weights) {
      params.weights = weights_view(given.weights);
      check_writable(given.weights);
    }
  }

  // What a backward knows of its forward: out and lse.
  void set_forward(const TensorView& out, const TensorView& lse) {
    check_out_shape(out);
    params.out = tensor4(out);
    check_rows_buffer(lse, real);
    params.lse = lse.data;
  }

  // What a backward is told of the weights' gradient and writes for query, key and value.
  void set_gradients(const GradientArguments& given) {
    if (given.delta_shift) {
      check_rows_buffer(given.delta_shift, real);
      params.delta_shift = given.delta_shift.data;
    }
    set_weights("grad_weights", given.grad_weights, given.weights_index, given.weights_mode);
    if (given.grad_weights) params.grad_weights = weights_view(given.grad_weights);
    if (given.grad_query) {
      check_dtype(given.grad_query, dtype);
      check_shape(given.grad_query,
                  {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"D", params.head_size}});
      check_writable(given.grad_query);
      params.grad_query = tensor4(given.grad_query);
    }
    if (given.grad_key) {
      check_dtype(given.grad_key, dtype);
      check_shape(given.grad_key,
                  {{"B", rows_batch}, {"H_kv", params.kv_heads}, {"T_k", params.key_tokens}, {"D", params.head_size}});
      check_writable(given.grad_key);
      params.grad_key = tensor4(given.grad_key);
    }
    if (given.grad_value) {
      check_dtype(given.grad_value, dtype);
      check_shape(
          given.grad_value,
          {{"B", rows_batch}, {"H_kv", params.kv_heads}, {"T_k", params.key_tokens}, {"D_v", params.value_size}});
      check_writable(given.grad_value);
      params.grad_value = tensor4(given.grad_value);
    }
  }

  // What a backward writes for biases, sink and prior; after set_modifiers.
  void set_modifier_gradients(const Modifiers& modifiers, const GradientArguments& given) {
    for (int i = 0; i < 2; ++i) {
      if (!given.grad_bias[i]) continue;
      if (!modifiers.bias[i]) reject(given.grad_bias[i].name, "None without its bias", "a tensor");
      check_dtype(given.grad_bias[i], real);
      check_scores_shape(given.grad_bias[i]);
      params.grad_bias[i] = tensor4(given.grad_bias[i]);
    }
    if (given.grad_sink) {
      if (!modifiers.sink) reject("grad_sink", "None without sink", "a tensor");
      check_buffer(given.grad_sink, real, {{"H", params.heads}});
      params.grad_sink = given.grad_sink.data;
    }
    if (given.grad_center) {
      if (!modifiers.center) reject("grad_center", "None without prior_center", "a tensor");
      check_rows_buffer(given.grad_center, real);
      params.grad_center = given.grad_center.data;
    }
  }

  void set_threads(int64_t threads) {
    check_range("threads", threads, 1, std::numeric_limits<int32_t>::max());
    params.threads = static_cast<int32_t>(threads);
  }

  // `weights` is the forward's output or the backward's grad_weights: there exactly when the mode asks for it.
  void set_weights(const char* name, const TensorView& weights, const TensorView& index, int64_t mode) {
    check_range("weights_mode", mode, 0, 3);
    params.weights_mode = static_cast<WeightsMode>(mode);
    if (static_cast<bool>(weights) != (mode != 0)) {
      reject(name, mode != 0 ? "a tensor" : "None",
             (mode != 0 ? "None with weights_mode = " : "a tensor with weights_mode = ") + std::to_string(mode));
    }
    const bool wants_index = params.weights_mode == WeightsMode::kRowMax;
    if (static_cast<bool>(index) != wants_index) {
      reject("weights_index", wants_index ? "a tensor" : "None",
             (wants_index ? "None with weights_mode = " : "a tensor with weights_mode = ") + std::to_string(mode));
    }
    if (wants_index) {
      check_rows_buffer(index, DType::kInt64);
      params.weights_index = static_cast<int64_t*>(index.data);
    }
  }

 private:
  void set_packing(const Modifiers& given) {
    if (static_cast<bool>(given.cu_seqlens_q) != static_cast<bool>(given.cu_seqlens_k)) {
      const char* missing = given.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q";
      reject(missing, "both cu_seqlens_q and cu_seqlens_k or neither", "None");
    }
    if (!given.cu_seqlens_q) return;
    if (rows_batch != 1) reject("query", "B = 1 for packed input (cu_seqlens given)", std::to_string(rows_batch));
    params.cu_seqlens_q = set_offsets(given.cu_seqlens_q, "T_q", params.query_tokens, cu_seqlens_q);
    params.cu_seqlens_k = set_offsets(given.cu_seqlens_k, "T_k", params.key_tokens, cu_seqlens_k);
    const int64_t count_q = given.cu_seqlens_q.size[0], count_k = given.cu_seqlens_k.size[0];
    if (count_q != count_k) {
      reject("cu_seqlens_k", "N + 1 = " + std::to_string(count_q) + " elements, as cu_seqlens_q",
             std::to_string(count_k));
    }
    params.batch = count_q - 1;
  }

  const int64_t* set_offsets(const TensorView& view, const char* total_name, int64_t total,
                             std::vector<int64_t>& copy) const {
    check_buffer(view, DType::kInt64, {{"N + 1", -1}});
    if (view.size[0] < 1) reject(view.name, "at least one element", "none");
    const int64_t* values = static_cast<const int64_t*>(view.data);
    if (on_device) return values;
    copy.assign(values, values + view.size[0]);
    if (copy.front() != 0) reject(view.name, "its first value to be 0", std::to_string(copy.front()));
    for (size_t i = 1; i < copy.size(); ++i) {
      if (copy[i] < copy[i - 1]) {
        reject(view.name, "nondecreasing values",
               std::to_string(copy[i]) + " after " + std::to_string(copy[i - 1]) + " at index " + std::to_string(i));
      }
    }
    if (copy.back() != total) {
      reject(view.name, std::string("its last value to be ") + total_name + " = " + std::to_string(total),
             std::to_string(copy.back()));
    }
    return copy.data();
  }

  const int64_t* set_lengths(const TensorView& view, const char* limit_name, int64_t limit,
                             std::vector<int64_t>& copy) const {
    if (!view) return nullptr;
    if (params.cu_seqlens_q != nullptr) reject(view.name, "None for packed input (cu_seqlens given)", "a tensor");
    check_buffer(view, DType::kInt64, {{"B", params.batch}});
    const int64_t* values = static_cast<const int64_t*>(view.data);
    if (on_device) return values;
    copy.assign(values, values + view.size[0]);
    for (size_t i = 0; i < copy.size(); ++i) {
      if (copy[i] >= 0 && copy[i] <= limit) continue;
      reject(view.name, std::string("values from 0 to ") + limit_name + " = " + std::to_string(limit),
             std::to_string(copy[i]) + " at index " + std::to_string(i));
    }
    return copy.data();
  }

  void set_prior(const TensorView& center) {
    if (!(params.prior_sigma >= 0.0) || std::isinf(params.prior_sigma)) {
      reject("prior_sigma", "a finite float >= 0 (0 = off)", std::to_string(params.prior_sigma));
    }
    if (static_cast<bool>(center) != (params.prior_sigma > 0.0)) {
      reject("prior_center", center ? "None (prior_sigma = 0)" : "a tensor (prior_sigma > 0)",
             center ? "a tensor" : "None");
    }
    if (!center) return;
    check_rows_buffer(center, real);
    params.prior_center = center.data;
  }

  void set_dropout(const TensorView& seed) {
    if (!(params.dropout_p >= 0.0 && params.dropout_p <= 1.0)) {
      reject("dropout_p", "a float from 0 to 1", std::to_string(params.dropout_p));
    }
    if (!seed) {
      if (params.dropout_p > 0.0) reject("seed", "a tensor (dropout_p > 0)", "None");
      return;
    }
    check_buffer(seed, DType::kInt64, {{"(seed, offset)", 2}});
    params.seed = static_cast<const uint64_t*>(seed.data)[0];
    params.offset = static_cast<const uint64_t*>(seed.data)[1];
  }
};

}  // namespace attnfast
