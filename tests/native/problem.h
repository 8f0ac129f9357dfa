// One random call of the dot or the additive core: its shape, its tensors on exact-size heap buffers (so that
// AddressSanitizer sees the first element read or written out of bounds) and the parameters a binding would pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/params.h"

namespace attnfast::native {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() {  // near enough: variance 1, bounded
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum - 6;
  }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }

 private:
  uint64_t state_;
};

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBool:
      return 1;
    default:
      return 2;
  }
}

// How a tensor [B, H, T, D] lies in memory.
enum class Layout { kContiguous, kTokensFirst /* [B, T, H, D] */, kStridedLast /* every second element */ };

// A tensor of four dimensions that owns its memory. A dimension of size 1 has stride 0: it broadcasts.
class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(DType dtype, std::vector<int64_t> size, Layout layout = Layout::kContiguous);

  explicit operator bool() const { return present_; }
  double get(int64_t b, int64_t h, int64_t i, int64_t j) const { return load(offset(b, h, i, j)); }
  void set(int64_t b, int64_t h, int64_t i, int64_t j, double x) { store(offset(b, h, i, j), x); }
  void add(int64_t b, int64_t h, int64_t i, int64_t j, double x) { set(b, h, i, j, get(b, h, i, j) + x); }
  void fill_normal(Random& random, double deviation = 1);
  void fill_bytes(int byte) {
    if (bytes_ > 0) std::memset(data_.get(), byte, static_cast<size_t>(bytes_));
  }
  bool same_bytes(const HostTensor& other) const {
    return bytes_ == other.bytes_ &&
           (bytes_ == 0 || std::memcmp(data_.get(), other.data_.get(), static_cast<size_t>(bytes_)) == 0);
  }

  int64_t size(int i) const { return size_[static_cast<size_t>(i)]; }
  void* data() const { return data_.get(); }
  Tensor4 view() const {
    Tensor4 view;
    view.data = data_.get();
    view.dtype = dtype_;
    for (int i = 0; i < 4; ++i) view.stride[i] = stride_[i];
    return view;
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };

  int64_t offset(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * stride_[0] + h * stride_[1] + i * stride_[2] + j * stride_[3];
  }
  double load(int64_t offset) const;
  void store(int64_t offset, double x);

  bool present_ = false;
  DType dtype_ = DType::kFloat32;
  std::vector<int64_t> size_ = {0, 0, 0, 0};
  int64_t stride_[4] = {0, 0, 0, 0};
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> data_;  // null when there are no elements, as torch has it
};

struct Config {
  DType dtype = DType::kFloat32;
  int64_t batch = 1, heads = 1, kv_heads = 1, query_tokens = 1, key_tokens = 1, head_size = 8, value_size = 8;
  int64_t sequences = 0;  // > 0: packed, and batch is 1
  Layout layout = Layout::kContiguous;
  int mask = -1, bias[2] = {-1, -1};  // -1: none; else bit i set: dimension i is not broadcast
  bool query_lengths = false, key_lengths = false, alibi = false, sink = false;
  double scale = 1, softcap = 0, dropout_p = 0;
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;
  WeightsMode weights_mode = WeightsMode::kNone;
  bool poison = false;  // NaN in every key, value and query that nothing may see
  bool lse_gradient = false;
  bool want_query = true, want_key = true, want_value = true;
  bool additive = false, vectors_by_head = false, score_bias = false;
  double spread = 1;  // of the elements of query, key and score_bias
  int bounds = -1;    // rows bring windows; bits as for a mask, of the first three dimensions
  enum class Bounds { kAlong, kScattered, kAnything } bounds_kind = Bounds::kAlong;
  double prior_sigma = 0;

  std::string text() const;
};

// Draws one configuration; every feature is likely enough to meet every other one.
Config random_config(Random& random);

// Inputs, and where results go.
struct Problem {
  Config config;
  HostTensor query, key, value, mask, bias[2], alibi, sink, grad_out, grad_lse, grad_weights;
  HostTensor bounds, center;      // int64 [B or 1, H or 1, T_q or 1, 2]; [B, H, T_q, 1]
  HostTensor weight, score_bias;  // [1, 1, H or 1, D]; additive only
  std::vector<int64_t> query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k;
  uint64_t seed = 0, offset = 0;

  Problem(const Config& config, uint64_t seed);

  DType real() const { return config.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  int64_t sequences() const { return config.sequences > 0 ? config.sequences : config.batch; }
  int64_t query_begin(int64_t b) const { return config.sequences > 0 ? cu_seqlens_q[b] : 0; }
  int64_t key_begin(int64_t b) const { return config.sequences > 0 ? cu_seqlens_k[b] : 0; }
  int64_t tensor_batch(int64_t b) const { return config.sequences > 0 ? 0 : b; }
  int64_t query_rows(int64_t b) const {
    return config.sequences > 0 ? cu_seqlens_q[b + 1] - cu_seqlens_q[b] : config.query_tokens;
  }
  int64_t key_rows(int64_t b) const {
    return config.sequences > 0 ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : config.key_tokens;
  }
  // May row q of sequence b and head h see key k (both counted within the sequence)?
  bool visible(int64_t b, int64_t h, int64_t q, int64_t k) const;

  std::vector<int64_t> weights_size() const;
  void fill(AttentionParams& params) const;
};

struct Results {
  HostTensor out, lse, weights, delta, delta_shift, grad_query, grad_key, grad_value, grad_bias[2], grad_sink,
      grad_center;
  HostTensor grad_weight, grad_score_bias;
  std::vector<int64_t> weights_index;

  explicit Results(const Problem& problem);
  DotAttentionParams dot_params(const Problem& problem) const;
  AdditiveAttentionParams additive_params(const Problem& problem) const;

 private:
  void fill(const Problem& problem, AttentionParams& params) const;
};

}  // namespace attnfast::native
