// Plain-data descriptions of one call, shared by the bindings and by every kernel (CPU and CUDA).
// All strides are in elements. Pointers are borrowed: Python owns every tensor for the length of the call.
#pragma once

#include <cstdint>

namespace attnfast {

// kTf32 is float32 whose elements are rounded to tf32 when they are read: operands of a call on CUDA that allows it.
// Python has no such tensors.
enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16, kBool, kInt64, kInt8, kTf32 };

// How row q and column k line up when T_q != T_k.
enum class Causal : int32_t { kNone = 0, kTopLeft = 1, kBottomRight = 2 };

enum class WeightsMode : int32_t { kNone = 0, kFull = 1, kColumnSum = 2, kRowMax = 3 };

// A strided tensor of four dimensions, [B, H, T, D] or broadcast to [B, H, T_q, T_k]; stride 0 means broadcast.
struct Tensor4 {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;
};

// Up to so many keys, a backward that differentiates nothing but out by query, key and value needs neither out nor lse:
// it forms whole rows of the softmax at once.
constexpr int64_t kWholeRowKeys = 64;

// What every score core is told of one call, forward or backward. "Real" below is the accumulation type: double for
// float64 inputs, float otherwise. Tensors marked contiguous carry no strides.
struct AttentionParams {
  int64_t batch = 0;  // B; for packed (varlen) input the number of sequences
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t query_tokens = 0;  // T_q; for packed input the total
  int64_t key_tokens = 0;    // T_k; for packed input the total
  int64_t head_size = 0;     // D
  int64_t value_size = 0;    // D_v

  Tensor4 query, key, value;  // [B, H, T_q, D], [B, H_kv, T_k, D], [B, H_kv, T_k, D_v]
  Tensor4 out;                // [B, H, T_q, D_v]; written by forward, read by backward
  void* lse = nullptr;        // Real, contiguous [B, H, T_q]: log2 of the row's sum of exp, sink included;
                              // forward without weights may leave it out

  // Score modifications. `mask` is boolean (true = may attend); each bias is added; all broadcast to [B, H, T_q, T_k].
  Tensor4 mask, bias[2];
  const int64_t* query_lengths = nullptr;  // [B]
  const int64_t* key_lengths = nullptr;    // [B]
  const int64_t* cu_seqlens_q = nullptr;   // [B + 1], packed input only; batch strides are then ignored
  const int64_t* cu_seqlens_k = nullptr;
  const void* alibi_slopes = nullptr;  // Real, [B, H] with the strides below
  int64_t alibi_stride[2] = {0, 0};
  const void* sink = nullptr;  // Real, contiguous [H]
  double softcap = 0.0;        // 0 = off
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;  // -1 = unbounded
  // A window of each row's own, beside the one above: row q sees no key outside [begin, end) = window_bounds[b][h][q],
  // two neighbours in memory; the strides are those of b, h and q. Any values: who reads them cuts them to the keys.
  const int64_t* window_bounds = nullptr;
  int64_t window_bounds_stride[3] = {0, 0, 0};
  double dropout_p = 0.0;
  uint64_t seed = 0, offset = 0;
  // Gaussian prior: weights times exp(-(key - center)^2 / (2 sigma^2)) after the softmax, not normalised again.
  double prior_sigma = 0.0;            // 0 = off
  const void* prior_center = nullptr;  // Real, contiguous [B, H, T_q], a position inside the row's own sequence

  // Attention weights on request (after prior and dropout: output == weights @ value).
  WeightsMode weights_mode = WeightsMode::kNone;
  Tensor4 weights;                   // full [B, H, T_q, T_k]; column sum [B, H, 1, T_k]; row maximum [B, H, T_q, 1]
  int64_t* weights_index = nullptr;  // contiguous [B, H, T_q]: argument of the row maximum (-1: nothing visible)

  // Backward only. A null pointer means "not wanted".
  Tensor4 grad_out;                   // [B, H, T_q, D_v]
  Tensor4 grad_weights;               // laid out as `weights`, any strides
  const void* delta_shift = nullptr;  // Real, contiguous [B, H, T_q], added to rowsum(grad_out * out)
  void* delta = nullptr;              // Real, contiguous [B, H, T_q], written
  Tensor4 grad_query, grad_key, grad_value;
  Tensor4 grad_bias[2];         // Real, zero-filled, broadcast like bias: stride 0 dimensions are summed
  void* grad_sink = nullptr;    // Real, contiguous [H]
  void* grad_center = nullptr;  // Real, contiguous [B, H, T_q]
  int32_t threads = 1;          // torch.get_num_threads(): chooses the schedule, never the result

  // The processor has AVX512_BF16, and bfloat16 operands are to be multiplied with it (KernelTable::native_bf16).
  bool native_bf16 = false;
};

// The dot core: score = scale * query . key.
struct DotAttentionParams : AttentionParams {
  double scale = 1.0;
  bool tf32 = false;  // CUDA only: operands in float32 may be rounded to tf32, for tensor cores
};

// The additive core: score = sum_d weight_d tanh(query_d + key_d + score_bias_d).
struct AdditiveAttentionParams : AttentionParams {
  const void* weight = nullptr;                             // Real, contiguous [H or 1, D]
  const void* score_bias = nullptr;                         // Real, contiguous [H or 1, D]; null: none
  bool weight_by_head = false, score_bias_by_head = false;  // the first dimension is H
  void *grad_weight = nullptr, *grad_score_bias = nullptr;  // Real, laid out as their inputs; null: not wanted
};

// The k best of N slots for each of B queries, score = (scale * query) . key; larger first, equal ones in the order of
// the slots, NaN as the largest. Real is double for float64, float for all others; query and keys may differ in dtype
// within those.
struct TopkParams {
  int64_t queries = 0;                // B
  int64_t slots = 0;                  // N
  int64_t size = 0;                   // D
  int64_t count = 0;                  // k, at most N
  Tensor4 query;                      // [1, 1, B, D]
  Tensor4 keys;                       // [1, 1, N, D], elements of a row next to each other
  Tensor4 mask;                       // boolean [1, 1, B, N], true = may be chosen; without data: all
  const float* key_scales = nullptr;  // [N], for keys in int8: slot n has the key key_scales[n] * keys[n]
  double scale = 1.0;
  // Contiguous [B, k]; written by the forward, Real and int64. A place without a slot holds -inf and -1.
  void* scores = nullptr;
  int64_t* indices = nullptr;
  int32_t threads = 1;  // torch.get_num_threads(): chooses the schedule, never the result
  // The processor has AVX512_BF16 (KernelTable::native_bf16): it may find out with it which scores are of no interest.
  bool native_bf16 = false;
};

}  // namespace attnfast
