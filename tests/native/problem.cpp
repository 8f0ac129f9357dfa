#include "problem.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

namespace attnfast::native {
namespace {

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7FC0;
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

double from_float16(uint16_t half) {
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  double x;
  if (exponent == 31) {
    x = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    x = std::ldexp(fraction, -24);
  } else {
    x = std::ldexp(1024 + fraction, exponent - 25);
  }
  return (half & 0x8000) != 0 ? -x : x;
}

uint16_t to_float16(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7E00);
  if (x >= 65520) return static_cast<uint16_t>(sign | 0x7C00);
  if (x == 0) return sign;
  int exponent = std::max(std::ilogb(x), -14);
  // In units of the last place; nearbyint rounds half to even. A carry into the next binade comes out right.
  const double units = std::nearbyint(std::ldexp(x, 10 - exponent));
  return static_cast<uint16_t>(sign | (static_cast<int>(units) + ((exponent + 14) << 10)));
}

const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

std::vector<int64_t> random_offsets(Random& random, int64_t sequences, int64_t total) {
  std::vector<int64_t> offsets = {0};
  for (int64_t i = 1; i < sequences; ++i) offsets.push_back(random.below(total + 1));
  offsets.push_back(total);
  for (size_t i = 1; i < offsets.size(); ++i) {  // insertion sort: a handful of values, some equal (empty sequences)
    for (size_t j = i; j > 0 && offsets[j] < offsets[j - 1]; --j) std::swap(offsets[j], offsets[j - 1]);
  }
  return offsets;
}

}  // namespace

HostTensor::HostTensor(DType dtype, std::vector<int64_t> size, Layout layout)
    : present_(true), dtype_(dtype), size_(std::move(size)) {
  const std::vector<int> order =
      layout == Layout::kTokensFirst ? std::vector<int>{3, 1, 2, 0} : std::vector<int>{3, 2, 1, 0};
  int64_t step = layout == Layout::kStridedLast ? 2 : 1, last = 0, count = 1;
  for (int i : order) {
    const int64_t n = size_[static_cast<size_t>(i)];
    stride_[i] = n == 1 ? 0 : step;
    last += (n - 1) * stride_[i];
    step *= n;
    count *= n;
  }
  if (count == 0) return;
  bytes_ = (last + 1) * element_size(dtype);
  data_.reset(std::malloc(static_cast<size_t>(bytes_)));
  fill_bytes(0);
}

double HostTensor::load(int64_t offset) const {
  switch (dtype_) {
    case DType::kFloat64:
      return static_cast<const double*>(data_.get())[offset];
    case DType::kFloat32:
      return static_cast<const float*>(data_.get())[offset];
    case DType::kBFloat16:
      return bits_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data_.get())[offset]) << 16);
    case DType::kFloat16:
      return from_float16(static_cast<const uint16_t*>(data_.get())[offset]);
    case DType::kBool:
      return static_cast<const uint8_t*>(data_.get())[offset];
    default:
      return static_cast<double>(static_cast<const int64_t*>(data_.get())[offset]);
  }
}

void HostTensor::store(int64_t offset, double x) {
  switch (dtype_) {
    case DType::kFloat64:
      static_cast<double*>(data_.get())[offset] = x;
      return;
    case DType::kFloat32:
      static_cast<float*>(data_.get())[offset] = static_cast<float>(x);
      return;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data_.get())[offset] = to_bfloat16(static_cast<float>(x));
      return;
    case DType::kFloat16:
      static_cast<uint16_t*>(data_.get())[offset] = to_float16(x);
      return;
    case DType::kBool:
      static_cast<uint8_t*>(data_.get())[offset] = x != 0;
      return;
    default:
      static_cast<int64_t*>(data_.get())[offset] = static_cast<int64_t>(x);
  }
}

void HostTensor::fill_normal(Random& random, double deviation) {
  for (int64_t b = 0; b < size_[0]; ++b)
    for (int64_t h = 0; h < size_[1]; ++h)
      for (int64_t i = 0; i < size_[2]; ++i)
        for (int64_t j = 0; j < size_[3]; ++j) set(b, h, i, j, deviation * random.normal());
}

std::string Config::text() const {
  const auto number = [](auto x) { return std::to_string(x); };
  std::string s = std::string(name(dtype)) + " B=" + number(batch) + " H=" + number(heads) + "/" + number(kv_heads) +
                  " T_q=" + number(query_tokens) + " T_k=" + number(key_tokens) + " D=" + number(head_size) +
                  " D_v=" + number(value_size) + " layout=" + number(static_cast<int>(layout));
  if (sequences > 0) s += " packed=" + number(sequences);
  if (mask >= 0) s += " mask=" + number(mask);
  for (int b : bias)
    if (b >= 0) s += " bias=" + number(b);
  if (query_lengths) s += " query_lengths";
  if (key_lengths) s += " key_lengths";
  if (alibi) s += " alibi";
  if (sink) s += " sink";
  if (softcap > 0) s += " softcap=" + number(softcap);
  if (dropout_p > 0) s += " dropout=" + number(dropout_p);
  if (causal != Causal::kNone) s += " causal=" + number(static_cast<int>(causal));
  if (window_left >= 0 || window_right >= 0) s += " window=" + number(window_left) + "," + number(window_right);
  if (weights_mode != WeightsMode::kNone) s += " weights=" + number(static_cast<int>(weights_mode));
  if (additive) s += std::string(" additive") + (vectors_by_head ? "/H" : "") + (score_bias ? "+b" : "");
  if (additive) s += " spread=" + number(spread);
  if (bounds >= 0) s += " bounds=" + number(bounds) + "/" + number(static_cast<int>(bounds_kind));
  if (prior_sigma > 0) s += " prior=" + number(prior_sigma);
  if (poison) s += " poison";
  if (lse_gradient) s += " lse_gradient";
  s += std::string(" wants=") + (want_query ? "q" : "") + (want_key ? "k" : "") + (want_value ? "v" : "");
  return s;
}

Config random_config(Random& random) {
  constexpr int64_t kMostWork = 3'000'000;
  Config c;
  c.dtype = random.pick({DType::kFloat64, DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  do {
    c.batch = random.pick({1, 1, 2, 3});
    c.kv_heads = random.pick({1, 1, 2, 3});
    c.heads = c.kv_heads * random.pick({1, 1, 2, 4});
    c.query_tokens = random.pick({0, 1, 1, 2, 5, 17, 32, 63, 64, 65, 100, 129, 257, 300});
    c.key_tokens = random.pick({0, 1, 3, 7, 16, 63, 64, 65, 100, 128, 200, 300, 513, 1100, 2100});
    c.head_size = random.pick({0, 1, 2, 3, 8, 16, 17, 32, 40, 64, 64, 65, 96, 128, 129, 200});
    c.value_size = random.chance(60) ? c.head_size : random.pick({0, 1, 3, 8, 16, 33, 64, 80, 128, 130});
    if (random.chance(12)) {  // what the decode kernel wants
      c.heads = c.kv_heads;
      c.query_tokens = 1;
      c.head_size = random.pick({16, 32, 64, 128});
      c.value_size = random.pick({16, 48, 64});
    }
    c.sequences = 0;
  } while (c.batch * c.heads * c.query_tokens * c.key_tokens * (c.head_size + c.value_size + 4) > kMostWork);
  c.layout = random.pick({Layout::kContiguous, Layout::kTokensFirst, Layout::kStridedLast});
  if (random.chance(15)) {
    c.batch = 1;
    c.sequences = 1 + random.below(5);
  } else {
    if (random.chance(25)) c.mask = static_cast<int>(random.below(16));
    for (int& bias : c.bias)
      if (random.chance(20)) bias = static_cast<int>(random.below(16));
    c.query_lengths = random.chance(15);
    c.key_lengths = random.chance(25);
  }
  c.alibi = random.chance(15);
  c.sink = random.chance(20);
  c.scale = random.chance(80) ? 1 / std::sqrt(static_cast<double>(std::max<int64_t>(c.head_size, 1)))
                              : random.pick({0.0, -0.1, 0.3});
  if (random.chance(15)) c.softcap = 2.5;
  if (random.chance(20)) c.dropout_p = random.pick({0.1, 0.5, 0.9, 1.0});
  if (random.chance(35)) c.causal = random.pick({Causal::kTopLeft, Causal::kBottomRight});
  if (random.chance(20)) {
    c.window_left = random.below(80) - 1;
    c.window_right = random.below(80) - 1;
  }
  if (random.chance(35)) {
    c.weights_mode = random.pick({WeightsMode::kFull, WeightsMode::kColumnSum, WeightsMode::kRowMax});
  }
  c.poison = random.chance(50);
  c.lse_gradient = random.chance(30);
  if (random.chance(30)) {
    c.want_query = random.chance(50);
    c.want_key = random.chance(50);
    c.want_value = random.chance(50);
  }
  c.additive = random.chance(45);
  if (c.additive) {
    c.vectors_by_head = random.chance(50);
    c.score_bias = random.chance(60);
    c.spread = random.pick({0.02, 1.0, 1.0, 4.0, 15.0});
  }
  if (random.chance(30)) {
    c.bounds = static_cast<int>(random.below(8));
    c.bounds_kind = random.pick({Config::Bounds::kAlong, Config::Bounds::kScattered, Config::Bounds::kAnything});
  }
  if (random.chance(25)) c.prior_sigma = random.pick({0.5, 3.0, 40.0});
  return c;
}

Problem::Problem(const Config& given, uint64_t problem_seed) : config(given) {
  Random random(problem_seed);
  const Config& c = config;
  query = HostTensor(c.dtype, {c.batch, c.heads, c.query_tokens, c.head_size}, c.layout);
  key = HostTensor(c.dtype, {c.batch, c.kv_heads, c.key_tokens, c.head_size}, c.layout);
  value = HostTensor(c.dtype, {c.batch, c.kv_heads, c.key_tokens, c.value_size}, c.layout);
  grad_out = HostTensor(c.dtype, {c.batch, c.heads, c.query_tokens, c.value_size}, c.layout);
  for (HostTensor* tensor : {&query, &key}) tensor->fill_normal(random, c.spread);
  for (HostTensor* tensor : {&value, &grad_out}) tensor->fill_normal(random);
  if (c.additive) {
    const std::vector<int64_t> size = {1, 1, c.vectors_by_head ? c.heads : 1, c.head_size};
    weight = HostTensor(real(), size);
    weight.fill_normal(random, 2 / std::sqrt(static_cast<double>(std::max<int64_t>(c.head_size, 1))));
    if (c.score_bias) {
      score_bias = HostTensor(real(), size);
      score_bias.fill_normal(random, c.spread);
    }
  }
  if (c.lse_gradient) {
    grad_lse = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, 1});
    grad_lse.fill_normal(random);
  }
  if (c.weights_mode != WeightsMode::kNone) {
    grad_weights = HostTensor(c.weights_mode == WeightsMode::kFull ? c.dtype : real(), weights_size(), c.layout);
    grad_weights.fill_normal(random);
  }
  if (c.sequences > 0) {
    cu_seqlens_q = random_offsets(random, c.sequences, c.query_tokens);
    cu_seqlens_k = random_offsets(random, c.sequences, c.key_tokens);
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    if (c.query_lengths) query_lengths.push_back(random.below(c.query_tokens + 1));
    if (c.key_lengths) key_lengths.push_back(random.below(c.key_tokens + 1));
  }
  const auto scores_size = [&](int bits) {
    return std::vector<int64_t>{(bits & 1) != 0 ? c.batch : 1, (bits & 2) != 0 ? c.heads : 1,
                                (bits & 4) != 0 ? c.query_tokens : 1, (bits & 8) != 0 ? c.key_tokens : 1};
  };
  const auto hide_some = [&](HostTensor& tensor, double hidden) {
    for (int64_t b = 0; b < tensor.size(0); ++b)
      for (int64_t h = 0; h < tensor.size(1); ++h)
        for (int64_t i = 0; i < tensor.size(2); ++i)
          for (int64_t j = 0; j < tensor.size(3); ++j)
            if (random.chance(30)) tensor.set(b, h, i, j, hidden);
  };
  if (c.mask >= 0) {
    mask = HostTensor(DType::kBool, scores_size(c.mask));
    mask.fill_bytes(1);
    hide_some(mask, 0);
  }
  for (int i = 0; i < 2; ++i) {
    if (c.bias[i] < 0) continue;
    bias[i] = HostTensor(random.pick({c.dtype, DType::kFloat32, DType::kFloat64}), scores_size(c.bias[i]));
    bias[i].fill_normal(random);
    if (random.chance(40)) hide_some(bias[i], -std::numeric_limits<double>::infinity());
  }
  if (c.alibi) {
    alibi = HostTensor(real(), {1, 1, sequences(), c.heads});
    // Scores stay moderate: in float32 a score of some hundreds has no digits left for the rest.
    alibi.fill_normal(random, 5.0 / static_cast<double>(std::max<int64_t>(c.key_tokens, 100)));
  }
  if (c.sink) {
    sink = HostTensor(real(), {1, 1, 1, c.heads});
    sink.fill_normal(random);
  }
  if (c.bounds >= 0) {
    bounds = HostTensor(DType::kInt64, {(c.bounds & 1) != 0 ? c.batch : 1, (c.bounds & 2) != 0 ? c.heads : 1,
                                        (c.bounds & 4) != 0 ? c.query_tokens : 1, 2});
    for (int64_t b = 0; b < bounds.size(0); ++b)
      for (int64_t h = 0; h < bounds.size(1); ++h)
        for (int64_t q = 0; q < bounds.size(2); ++q) {
          const double along = static_cast<double>(q) / static_cast<double>(bounds.size(2));
          const double place = c.bounds_kind == Config::Bounds::kAlong ? along : random.uniform();
          double begin = std::floor(place * static_cast<double>(c.key_tokens)) - 5;
          double end = begin + static_cast<double>(random.below(40));
          if (c.bounds_kind == Config::Bounds::kAnything && random.chance(20))
            std::tie(begin, end) = random.chance(50) ? std::pair(-0x1p62, 0x1p62) : std::pair(0x1p62, -0x1p62);
          bounds.set(b, h, q, 0, begin);
          bounds.set(b, h, q, 1, end);
        }
  }
  if (c.prior_sigma > 0) {
    center = HostTensor(real(), {c.batch, c.heads, c.query_tokens, 1});
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t q = 0; q < c.query_tokens; ++q)
          center.set(b, h, q, 0, random.uniform() * static_cast<double>(c.key_tokens));
  }
  seed = random.next();
  offset = random.next() >> 1;
  if (!c.poison) return;
  // What nothing may see must reach no result.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t group = c.heads / c.kv_heads;
  for (int64_t b = 0; b < sequences(); ++b) {
    std::vector<char> key_seen(static_cast<size_t>(key_rows(b) * c.kv_heads));
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t q = 0; q < query_rows(b); ++q) {
        bool seen = false;
        for (int64_t k = 0; k < key_rows(b); ++k) {
          if (!visible(b, h, q, k)) continue;
          seen = true;
          key_seen[static_cast<size_t>(h / group * key_rows(b) + k)] = 1;
        }
        if (seen) continue;
        for (int64_t d = 0; d < c.head_size; ++d) query.set(tensor_batch(b), h, query_begin(b) + q, d, nan);
      }
    }
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      for (int64_t k = 0; k < key_rows(b); ++k) {
        if (key_seen[static_cast<size_t>(h * key_rows(b) + k)]) continue;
        for (int64_t d = 0; d < c.head_size; ++d) key.set(tensor_batch(b), h, key_begin(b) + k, d, nan);
        for (int64_t d = 0; d < c.value_size; ++d) value.set(tensor_batch(b), h, key_begin(b) + k, d, nan);
      }
    }
  }
}

bool Problem::visible(int64_t b, int64_t h, int64_t q, int64_t k) const {
  const int64_t queries = query_lengths.empty() ? query_rows(b) : query_lengths[static_cast<size_t>(b)];
  const int64_t keys = key_lengths.empty() ? key_rows(b) : key_lengths[static_cast<size_t>(b)];
  if (q >= queries || k >= keys) return false;
  const int64_t position = q + (config.causal == Causal::kBottomRight ? keys - queries : 0);
  if (config.causal != Causal::kNone && k > position) return false;
  if (config.window_left >= 0 && k < position - config.window_left) return false;
  if (config.window_right >= 0 && k > position + config.window_right) return false;
  const int64_t t = tensor_batch(b), i = query_begin(b) + q, j = key_begin(b) + k;
  if (bounds) {
    const double place = static_cast<double>(k);
    if (place < bounds.get(t, h, i, 0) || place >= bounds.get(t, h, i, 1)) return false;
  }
  if (mask && mask.get(t, h, i, j) == 0) return false;
  for (const HostTensor& x : bias)
    if (x && x.get(t, h, i, j) == -std::numeric_limits<double>::infinity()) return false;
  return true;
}

std::vector<int64_t> Problem::weights_size() const {
  const bool no_rows = config.weights_mode == WeightsMode::kColumnSum,
             no_columns = config.weights_mode == WeightsMode::kRowMax;
  return {config.batch, config.heads, no_rows ? 1 : config.query_tokens, no_columns ? 1 : config.key_tokens};
}

void Problem::fill(AttentionParams& p) const {
  p.batch = sequences();
  p.heads = config.heads;
  p.kv_heads = config.kv_heads;
  p.query_tokens = config.query_tokens;
  p.key_tokens = config.key_tokens;
  p.head_size = config.head_size;
  p.value_size = config.value_size;
  p.query = query.view();
  p.key = key.view();
  p.value = value.view();
  if (mask) p.mask = mask.view();
  for (int i = 0; i < 2; ++i)
    if (bias[i]) p.bias[i] = bias[i].view();
  if (config.query_lengths) p.query_lengths = query_lengths.data();
  if (config.key_lengths) p.key_lengths = key_lengths.data();
  if (config.sequences > 0) {
    p.cu_seqlens_q = cu_seqlens_q.data();
    p.cu_seqlens_k = cu_seqlens_k.data();
  }
  if (alibi) {
    p.alibi_slopes = alibi.data();
    p.alibi_stride[0] = alibi.view().stride[2];
    p.alibi_stride[1] = alibi.view().stride[3];
  }
  if (sink) p.sink = sink.data();
  if (bounds) {
    p.window_bounds = static_cast<const int64_t*>(bounds.data());
    for (int i = 0; i < 3; ++i) p.window_bounds_stride[i] = bounds.view().stride[i];
  }
  if (config.prior_sigma > 0) {
    p.prior_sigma = config.prior_sigma;
    p.prior_center = center.data();
  }
  p.softcap = config.softcap;
  p.causal = config.causal;
  p.window_left = config.window_left;
  p.window_right = config.window_right;
  p.dropout_p = config.dropout_p;
  p.seed = seed;
  p.offset = offset;
  p.weights_mode = config.weights_mode;
}

Results::Results(const Problem& problem) {
  const Config& c = problem.config;
  const std::vector<int64_t> rows = {c.batch, c.heads, c.query_tokens, 1};
  out = HostTensor(c.dtype, {c.batch, c.heads, c.query_tokens, c.value_size}, c.layout);
  lse = HostTensor(problem.real(), rows);
  delta = HostTensor(problem.real(), rows);
  grad_query = HostTensor(c.dtype, {c.batch, c.heads, c.query_tokens, c.head_size}, c.layout);
  grad_key = HostTensor(c.dtype, {c.batch, c.kv_heads, c.key_tokens, c.head_size}, c.layout);
  grad_value = HostTensor(c.dtype, {c.batch, c.kv_heads, c.key_tokens, c.value_size}, c.layout);
  if (c.sink) grad_sink = HostTensor(problem.real(), {1, 1, 1, c.heads});
  if (c.prior_sigma > 0) grad_center = HostTensor(problem.real(), rows);
  if (c.weights_mode != WeightsMode::kNone) {
    weights =
        HostTensor(c.weights_mode == WeightsMode::kFull ? c.dtype : problem.real(), problem.weights_size(), c.layout);
    if (c.weights_mode == WeightsMode::kRowMax)
      weights_index.assign(static_cast<size_t>(c.batch * c.heads * c.query_tokens), -7);
  }
  if (c.additive) {
    const std::vector<int64_t> size = {1, 1, c.vectors_by_head ? c.heads : 1, c.head_size};
    grad_weight = HostTensor(problem.real(), size);
    if (c.score_bias) grad_score_bias = HostTensor(problem.real(), size);
  }
  // Whatever a kernel fails to write is NaN.
  for (HostTensor* tensor : {&out, &lse, &delta, &grad_query, &grad_key, &grad_value, &grad_sink, &grad_center,
                             &weights, &grad_weight, &grad_score_bias}) {
    tensor->fill_bytes(0xFF);
  }
  if (c.lse_gradient || c.weights_mode != WeightsMode::kNone) delta_shift = HostTensor(problem.real(), rows);
  for (int i = 0; i < 2; ++i) {
    const HostTensor& bias = problem.bias[i];
    if (bias) grad_bias[i] = HostTensor(problem.real(), {bias.size(0), bias.size(1), bias.size(2), bias.size(3)});
  }
}

DotAttentionParams Results::dot_params(const Problem& problem) const {
  DotAttentionParams p;
  fill(problem, p);
  p.scale = problem.config.scale;
  return p;
}

AdditiveAttentionParams Results::additive_params(const Problem& problem) const {
  AdditiveAttentionParams p;
  fill(problem, p);
  p.weight = problem.weight.data();
  p.weight_by_head = problem.config.vectors_by_head;
  p.grad_weight = grad_weight.data();
  if (problem.score_bias) {
    p.score_bias = problem.score_bias.data();
    p.score_bias_by_head = problem.config.vectors_by_head;
    p.grad_score_bias = grad_score_bias.data();
  }
  return p;
}

void Results::fill(const Problem& problem, AttentionParams& p) const {
  problem.fill(p);
  p.out = out.view();
  p.lse = lse.data();
  if (weights) p.weights = weights.view();
  p.weights_index = weights_index.empty() ? nullptr : const_cast<int64_t*>(weights_index.data());
  p.grad_out = problem.grad_out.view();
  if (problem.grad_weights) p.grad_weights = problem.grad_weights.view();
  if (delta_shift) p.delta_shift = delta_shift.data();
  p.delta = delta.data();
  if (problem.config.want_query) p.grad_query = grad_query.view();
  if (problem.config.want_key) p.grad_key = grad_key.view();
  if (problem.config.want_value) p.grad_value = grad_value.view();
  for (int i = 0; i < 2; ++i)
    if (grad_bias[i]) p.grad_bias[i] = grad_bias[i].view();
  if (grad_sink) p.grad_sink = grad_sink.data();
  if (grad_center) p.grad_center = grad_center.data();
}

}  // namespace attnfast::native
