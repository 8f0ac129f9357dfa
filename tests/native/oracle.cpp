#include "oracle.h"

#include <limits>

namespace attnfast::native {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Philox 4x32, seven rounds: word (column % 4) of the block with counter (column / 4, row, offset).
uint32_t philox_word(uint64_t seed, uint64_t offset, uint64_t row, uint64_t column) {
  uint32_t counter[4] = {static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row),
                         static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(offset)};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t mixed[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::memcpy(counter, mixed, sizeof(counter));
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter[column % 4];
}

struct Row {
  std::vector<char> visible;
  std::vector<double> capped;       // softcap * tanh(s / softcap), or s
  std::vector<double> probability;  // before prior and dropout
  std::vector<double> keep;         // the prior, times 0 or 1 / (1 - p)
  double sink_probability = 0;
  double lse = -kInfinity;  // natural
};

// tanh(query + score_bias + key) of one dimension.
double additive_term(const Problem& problem, int64_t b, int64_t h, int64_t q, int64_t k, int64_t d) {
  const int64_t t = problem.tensor_batch(b), kv = h / (problem.config.heads / problem.config.kv_heads);
  double x =
      problem.query.get(t, h, problem.query_begin(b) + q, d) + problem.key.get(t, kv, problem.key_begin(b) + k, d);
  if (problem.score_bias) x += problem.score_bias.get(0, 0, problem.config.vectors_by_head ? h : 0, d);
  return std::tanh(x);
}

// (k - center) / sigma
double prior_distance(const Problem& problem, int64_t b, int64_t h, int64_t q, int64_t k) {
  const double center = problem.center.get(problem.tensor_batch(b), h, problem.query_begin(b) + q, 0);
  return (static_cast<double>(k) - center) / problem.config.prior_sigma;
}

Row softmax_row(const Problem& problem, int64_t b, int64_t h, int64_t q) {
  const Config& c = problem.config;
  const int64_t keys = problem.key_rows(b), t = problem.tensor_batch(b), kv = h / (c.heads / c.kv_heads);
  const int64_t valid_q = problem.query_lengths.empty() ? problem.query_rows(b) : problem.query_lengths[b];
  const int64_t valid_k = problem.key_lengths.empty() ? keys : problem.key_lengths[b];
  const int64_t shift = c.causal == Causal::kBottomRight ? valid_k - valid_q : 0;
  Row row;
  row.visible.resize(keys);
  row.capped.resize(keys);
  row.probability.resize(keys);
  row.keep.assign(keys, 1);
  std::vector<double> score(keys, -kInfinity);
  double maximum = c.sink ? problem.sink.get(0, 0, 0, h) : -kInfinity;
  bool any = false;
  for (int64_t k = 0; k < keys; ++k) {
    row.visible[k] = problem.visible(b, h, q, k);
    if (!row.visible[k]) continue;
    any = true;
    double s = 0;
    for (int64_t d = 0; d < c.head_size; ++d) {
      s += c.additive ? problem.weight.get(0, 0, c.vectors_by_head ? h : 0, d) * additive_term(problem, b, h, q, k, d)
                      : c.scale * problem.query.get(t, h, problem.query_begin(b) + q, d) *
                            problem.key.get(t, kv, problem.key_begin(b) + k, d);
    }
    if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
    row.capped[k] = s;
    if (problem.alibi) s -= problem.alibi.get(0, 0, b, h) * std::fabs(static_cast<double>(q + shift - k));
    for (const HostTensor& bias : problem.bias)
      if (bias) s += bias.get(t, h, problem.query_begin(b) + q, problem.key_begin(b) + k);
    score[k] = s;
    maximum = std::max(maximum, s);
  }
  if (!any && !c.sink) return row;
  double sum = c.sink ? std::exp(problem.sink.get(0, 0, 0, h) - maximum) : 0;
  for (int64_t k = 0; k < keys; ++k)
    if (row.visible[k]) sum += std::exp(score[k] - maximum);
  row.lse = maximum + std::log(sum);
  // Not from lse, which has no digits left for the sum where scores are huge.
  if (c.sink) row.sink_probability = std::exp(problem.sink.get(0, 0, 0, h) - maximum) / sum;
  for (int64_t k = 0; k < keys; ++k)
    if (row.visible[k]) row.probability[k] = std::exp(score[k] - maximum) / sum;
  if (c.dropout_p > 0) {
    const uint64_t index = static_cast<uint64_t>((t * c.heads + h) * c.query_tokens + problem.query_begin(b) + q);
    const double threshold = std::ceil(c.dropout_p * 4294967296.0);
    for (int64_t k = 0; k < keys; ++k) {
      const bool kept = philox_word(problem.seed, problem.offset, index, static_cast<uint64_t>(k)) >= threshold;
      row.keep[k] = kept ? 1 / (1 - c.dropout_p) : 0;
    }
  }
  if (c.prior_sigma > 0)
    for (int64_t k = 0; k < keys; ++k) {
      const double distance = prior_distance(problem, b, h, q, k);
      row.keep[k] *= std::exp(-0.5 * distance * distance);
    }
  return row;
}

template <class Use>
void for_each_row(const Problem& problem, Use use) {
  for (int64_t b = 0; b < problem.sequences(); ++b)
    for (int64_t h = 0; h < problem.config.heads; ++h)
      for (int64_t q = 0; q < problem.query_rows(b); ++q) use(b, h, q, softmax_row(problem, b, h, q));
}

}  // namespace

Expected forward_by_definition(const Problem& problem) {
  const Config& c = problem.config;
  Expected e;
  e.out = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, c.value_size});
  e.lse = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, 1});
  e.row_weights = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, c.key_tokens});
  if (c.weights_mode != WeightsMode::kNone) e.weights = HostTensor(DType::kFloat64, problem.weights_size());
  for_each_row(problem, [&](int64_t b, int64_t h, int64_t q, const Row& row) {
    const int64_t t = problem.tensor_batch(b), kv = h / (c.heads / c.kv_heads), i = problem.query_begin(b) + q;
    e.lse.set(t, h, i, 0, row.lse / std::log(2.0));
    double largest = 0;
    for (int64_t k = 0; k < problem.key_rows(b); ++k) {
      if (!row.visible[k]) continue;
      const int64_t j = problem.key_begin(b) + k;
      const double weight = row.probability[k] * row.keep[k];
      e.row_weights.set(t, h, i, j, weight);
      largest = std::max(largest, weight);
      if (c.weights_mode == WeightsMode::kFull) e.weights.set(t, h, i, j, weight);
      if (c.weights_mode == WeightsMode::kColumnSum) e.weights.add(t, h, 0, j, weight);
      for (int64_t d = 0; d < c.value_size; ++d) e.out.add(t, h, i, d, weight * problem.value.get(t, kv, j, d));
    }
    if (c.weights_mode == WeightsMode::kRowMax) e.weights.set(t, h, i, 0, largest);
  });
  return e;
}

void backward_by_definition(const Problem& problem, const std::vector<int64_t>& weights_index, Expected& e) {
  const Config& c = problem.config;
  e.delta_shift = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, 1});
  e.grad_query.allocate({c.batch, c.heads, c.query_tokens, c.head_size});
  e.grad_key.allocate({c.batch, c.kv_heads, c.key_tokens, c.head_size});
  e.grad_value.allocate({c.batch, c.kv_heads, c.key_tokens, c.value_size});
  if (c.sink) e.grad_sink.allocate({1, 1, 1, c.heads});
  if (c.prior_sigma > 0) e.grad_center.allocate({c.batch, c.heads, c.query_tokens, 1});
  if (c.additive)
    for (Gradient* gradient : {&e.grad_weight, &e.grad_score_bias})
      gradient->allocate({1, 1, c.vectors_by_head ? c.heads : 1, c.head_size});
  for (int i = 0; i < 2; ++i) {
    const HostTensor& bias = problem.bias[i];
    if (bias) e.grad_bias[i].allocate({bias.size(0), bias.size(1), bias.size(2), bias.size(3)});
  }
  for_each_row(problem, [&](int64_t b, int64_t h, int64_t q, const Row& row) {
    const int64_t t = problem.tensor_batch(b), kv = h / (c.heads / c.kv_heads), i = problem.query_begin(b) + q;
    const int64_t keys = problem.key_rows(b);
    const double grad_lse = c.lse_gradient ? problem.grad_lse.get(t, h, i, 0) : 0;
    // Gradient of the applied weights, from the output and from the weights that were returned.
    std::vector<double> grad_probability(keys), size(keys);
    double mean = 0, mean_size = 0, shift = -grad_lse;
    for (int64_t k = 0; k < keys; ++k) {
      if (!row.visible[k]) continue;
      const int64_t j = problem.key_begin(b) + k;
      double from_weights = 0;
      if (c.weights_mode == WeightsMode::kFull) from_weights = problem.grad_weights.get(t, h, i, j);
      if (c.weights_mode == WeightsMode::kColumnSum) from_weights = problem.grad_weights.get(t, h, 0, j);
      if (c.weights_mode == WeightsMode::kRowMax && weights_index[(t * c.heads + h) * c.query_tokens + i] == j) {
        from_weights = problem.grad_weights.get(t, h, i, 0);
      }
      double grad = from_weights, grad_size = std::fabs(from_weights);
      for (int64_t d = 0; d < c.value_size; ++d) {
        const double grad_out = problem.grad_out.get(t, h, i, d);
        const double term = grad_out * problem.value.get(t, kv, j, d), weight = row.probability[k] * row.keep[k];
        grad += term;
        grad_size += std::fabs(term);
        e.grad_value.add(t, kv, j, d, weight * grad_out, weight * grad_out);
      }
      if (c.prior_sigma > 0) {
        const double slope = row.probability[k] * row.keep[k] * prior_distance(problem, b, h, q, k) / c.prior_sigma;
        e.grad_center.add(t, h, i, 0, grad * slope, grad_size * slope);
      }
      grad_probability[k] = grad * row.keep[k];
      size[k] = grad_size * row.keep[k];
      mean += row.probability[k] * grad_probability[k];
      mean_size += row.probability[k] * size[k];
      shift += row.probability[k] * row.keep[k] * from_weights;
    }
    mean_size += std::fabs(grad_lse);
    e.delta_shift.set(t, h, i, 0, shift);
    if (c.sink) {
      e.grad_sink.add(0, 0, 0, h, row.sink_probability * (grad_lse - mean), row.sink_probability * mean_size);
    }
    for (int64_t k = 0; k < keys; ++k) {
      if (!row.visible[k]) continue;
      const int64_t j = problem.key_begin(b) + k;
      double grad = row.probability[k] * (grad_probability[k] - mean + grad_lse);
      double grad_size = row.probability[k] * (size[k] + mean_size);
      for (int x = 0; x < 2; ++x)
        if (problem.bias[x]) e.grad_bias[x].add(t, h, i, j, grad, grad_size);
      double slope = c.additive ? 1 : c.scale;
      if (c.softcap > 0) slope *= 1 - row.capped[k] / c.softcap * (row.capped[k] / c.softcap);
      grad *= slope;
      grad_size *= slope;
      for (int64_t d = 0; c.additive && d < c.head_size; ++d) {
        const int64_t at = c.vectors_by_head ? h : 0;
        const double tanh = additive_term(problem, b, h, q, k, d), weight = problem.weight.get(0, 0, at, d);
        const double term = grad * weight * (1 - tanh * tanh), term_size = grad_size * weight;
        e.grad_query.add(t, h, i, d, term, term_size);
        e.grad_key.add(t, kv, j, d, term, term_size);
        e.grad_score_bias.add(0, 0, at, d, term, term_size);
        e.grad_weight.add(0, 0, at, d, grad * tanh, grad_size);
      }
      for (int64_t d = 0; !c.additive && d < c.head_size; ++d) {
        const double key = problem.key.get(t, kv, j, d), query = problem.query.get(t, h, i, d);
        e.grad_query.add(t, h, i, d, grad * key, grad_size * key);
        e.grad_key.add(t, kv, j, d, grad * query, grad_size * query);
      }
    }
  });
}

}  // namespace attnfast::native
