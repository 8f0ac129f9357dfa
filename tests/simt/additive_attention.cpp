// The additive core of csrc/cuda under the emulator: random calls, forward and backward, against their definition in
// double precision (tests/native), on exact-size buffers, under every kind of schedule.
//
//   attnfast_simt_additive_attention [--cases N] [--first N]
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "compare.h"
#include "cuda/additive_attention.h"
#include "native/oracle.h"
#include "native/problem.h"

namespace attnfast::simt {
namespace {

using native::Config;
using native::Expected;
using native::Gradient;
using native::Problem;
using native::Random;
using native::Results;

// A call small enough for the emulator.
Config small_config(Random& random) {
  for (;;) {
    Config c = native::random_config(random);
    c.additive = true;
    c.scale = 1;
    c.vectors_by_head = random.chance(50);
    c.score_bias = random.chance(60);
    c.spread = random.pick({0.02, 0.2, 1.0, 1.0, 4.0, 15.0, 60.0});
    if (random.chance(10)) c.weights_mode = WeightsMode::kFull;
    c.query_tokens = random.pick<int64_t>({0, 1, 1, 3, 5, 16, 33, 40});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 130});
    c.head_size = random.pick<int64_t>({0, 1, 3, 8, 16, 33, 64, 70});
    c.value_size = random.pick<int64_t>({1, 8, 33, 64, 70});
    if (random.chance(3)) c.value_size = 260;  // a second block for the columns
    if (c.sequences > 0) {
      c.mask = random.chance(20) ? static_cast<int>(random.below(16)) : -1;
      for (int& bias : c.bias) bias = random.chance(30) ? static_cast<int>(random.below(16)) : -1;
    }
    if (c.batch * c.heads <= 4 && c.query_tokens * c.key_tokens * c.batch * c.heads <= 6000) return c;
  }
}

// Of a gradient, by the sum of the magnitudes of its terms.
struct BackwardLimits {
  double relative, floor;
};
BackwardLimits backward_limits(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return {2e-12, 1e-12};
    case DType::kFloat32:
      return {3e-5, 2e-6};
    case DType::kBFloat16:  // out, from which delta comes, is rounded too
      return {2e-2, 2e-3};
    default:
      return {3e-3, 3e-4};
  }
}

// The first element that is further off than its terms' rounding explains, or "".
std::string compare_gradient(const char* what, const HostTensor& got, const Gradient& wanted, BackwardLimits limits) {
  const HostTensor& value = wanted.value;
  for (int64_t b = 0; b < value.size(0); ++b)
    for (int64_t h = 0; h < value.size(1); ++h)
      for (int64_t i = 0; i < value.size(2); ++i)
        for (int64_t j = 0; j < value.size(3); ++j) {
          const double x = got.get(b, h, i, j), y = value.get(b, h, i, j);
          if (std::fabs(x - y) <= limits.floor + limits.relative * wanted.magnitude.get(b, h, i, j)) continue;
          char text[200];
          std::snprintf(text, sizeof(text), "%s[%d,%d,%d,%d]: %g for %g, magnitude %g", what, int(b), int(h), int(i),
                        int(j), x, y, wanted.magnitude.get(b, h, i, j));
          return text;
        }
  return "";
}

// Of exactly the size that was asked for, so that AddressSanitizer sees its end; NaN, so that what nobody wrote shows.
std::unique_ptr<unsigned char[]> workspace(const Config& c, int64_t elements) {
  const size_t bytes = static_cast<size_t>(elements) * (c.dtype == DType::kFloat64 ? 8 : 4);
  std::unique_ptr<unsigned char[]> buffer(new unsigned char[bytes]);
  std::memset(buffer.get(), 0xFF, bytes);
  return buffer;
}

void copy(const HostTensor& from, HostTensor& to) {
  for (int64_t b = 0; b < to.size(0); ++b)
    for (int64_t h = 0; h < to.size(1); ++h)
      for (int64_t i = 0; i < to.size(2); ++i) to.set(b, h, i, 0, from.get(b, h, i, 0));
}

// How many of the cases so far had what, by name.
std::map<std::string, int64_t> g_seen;

void remember(const Config& c, const AdditiveAttentionParams& params) {
  if (c.query_tokens == 0 || c.key_tokens == 0) return;
  const bool narrow = cuda::additive_attention_is_narrow(params), split = cuda::additive_attention_splits(params) > 1;
  const auto count = [](const char* name, bool seen) { g_seen[name] += seen; };
  count("narrow tiles", narrow);
  count("wide tiles", !narrow);
  count("split keys", split);
  count("packed", c.sequences > 0 && !narrow);
  count("packed, narrow tiles", c.sequences > 0 && narrow);
  count("packed, with a bias", c.sequences > 0 && (c.bias[0] >= 0 || c.bias[1] >= 0));
  count("bounds", c.bounds >= 0);
  count("bounds, narrow tiles", c.bounds >= 0 && narrow);
  count("prior", c.prior_sigma > 0 && !narrow);
  count("prior, narrow tiles", c.prior_sigma > 0 && narrow);
  count("full weights", c.weights_mode == WeightsMode::kFull);
  count("column sums", c.weights_mode == WeightsMode::kColumnSum);
  count("row maxima", c.weights_mode == WeightsMode::kRowMax);
}

std::string forward(const Config& c, const AdditiveAttentionParams& params) {
  const auto space = workspace(c, cuda::additive_attention_fwd_workspace(params));
  return reported([&] { cuda::additive_attention_fwd(params, space.get(), nullptr); });
}
std::string backward(const Config& c, const AdditiveAttentionParams& params) {
  const auto space = workspace(c, cuda::additive_attention_bwd_workspace(params));
  return reported([&] { cuda::additive_attention_bwd(params, space.get(), nullptr); });
}

std::string check(const Problem& problem) {
  const Config& c = problem.config;
  Results results(problem);
  const AdditiveAttentionParams params = results.additive_params(problem);
  remember(c, params);
  std::string error = forward(c, params);
  if (!error.empty()) return error;
  Expected expected = native::forward_by_definition(problem);
  // A sum of D terms in float32 has an error of its own; scores beyond the ordinary have it in proportion.
  const double relative = tolerance(c.dtype) * (c.dtype == DType::kFloat32 ? 2 : 1);
  error = compare("out", results.out, expected.out, relative);
  if (error.empty()) error = compare("lse", results.lse, expected.lse, relative);
  if (error.empty() && results.weights) error = compare("weights", results.weights, expected.weights, relative);
  if (error.empty() && !results.weights_index.empty()) error = check_row_maximum(c, results, expected, relative);
  if (!error.empty()) return error;

  native::backward_by_definition(problem, results.weights_index, expected);
  if (results.delta_shift) copy(expected.delta_shift, results.delta_shift);
  error = backward(c, params);
  if (!error.empty()) return error;
  const BackwardLimits limits = backward_limits(c.dtype);
  const auto gradient = [&](const char* what, bool wanted, const HostTensor& got, const Gradient& from) {
    if (wanted && error.empty()) error = compare_gradient(what, got, from, limits);
  };
  gradient("grad_query", c.want_query, results.grad_query, expected.grad_query);
  gradient("grad_key", c.want_key, results.grad_key, expected.grad_key);
  gradient("grad_value", c.want_value, results.grad_value, expected.grad_value);
  gradient("grad_weight", true, results.grad_weight, expected.grad_weight);
  gradient("grad_score_bias", c.score_bias, results.grad_score_bias, expected.grad_score_bias);
  gradient("grad_sink", c.sink, results.grad_sink, expected.grad_sink);
  gradient("grad_center", c.prior_sigma > 0, results.grad_center, expected.grad_center);
  for (int i = 0; i < 2; ++i) gradient("grad_bias", c.bias[i] >= 0, results.grad_bias[i], expected.grad_bias[i]);
  return error;
}

// Rows whose log-sum-exp has no digits left for the logarithm of the sum: all scores are one huge bias. Their weights
// are those of a row of zeros.
void check_huge(int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    Config c;
    c.additive = true;
    c.dtype = random.pick({DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat64});
    c.batch = 1 + number % 2;
    c.heads = 2;
    c.query_tokens = number % 3 == 0 ? 3 : 35;
    c.key_tokens = random.pick<int64_t>({9, 70});
    c.bias[0] = 7;
    c.mask = random.chance(50) ? 15 : -1;
    c.sink = random.chance(40);
    c.causal = random.chance(40) ? Causal::kBottomRight : Causal::kNone;
    if (random.chance(40)) c.prior_sigma = 3;
    if (random.chance(40)) c.dropout_p = 0.5;
    c.weights_mode = random.pick({WeightsMode::kFull, WeightsMode::kColumnSum, WeightsMode::kRowMax});
    Problem problem(c, random.next());
    problem.weight.fill_bytes(0);
    if (c.sink) problem.sink.set(0, 0, 0, 0, random.pick({-1e9, 1e9, 0x1p21}));  // as large as a row, or larger
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.query_tokens; ++i) {
          problem.bias[0].set(b, h, i, 0, random.pick({0.0, 1e9, -1e9, 0x1p21, -0x1p21}));
        }
    set_seed(static_cast<uint32_t>(number));
    const std::string error = check(problem);
    expect(error.empty(), "huge " + std::to_string(number) + ": " + error + "\n  " + c.text());
  }
}

#if !defined(__SANITIZE_THREAD__)  // nonsense may give a row to two blocks: a race, but within the tensors
// Offsets and lengths that nobody has looked at: whatever they hold, nothing outside of the tensors is touched.
void check_offsets(int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    Config c;
    c.additive = true;
    c.query_tokens = random.pick<int64_t>({1, 40, 70});
    c.key_tokens = random.pick<int64_t>({1, 40, 70});
    c.sequences = random.pick<int64_t>({0, 1, 2, 5});
    c.query_lengths = c.key_lengths = c.sequences == 0;
    c.weights_mode = random.pick({WeightsMode::kFull, WeightsMode::kColumnSum, WeightsMode::kRowMax});
    c.causal = random.pick({Causal::kNone, Causal::kBottomRight});
    c.bias[0] = static_cast<int>(random.below(16));
    if (random.chance(50)) c.prior_sigma = 2;
    if (random.chance(50)) c.bounds = 7;
    Problem problem(c, random.next());
    for (std::vector<int64_t>* numbers :
         {&problem.cu_seqlens_q, &problem.cu_seqlens_k, &problem.query_lengths, &problem.key_lengths})
      for (int64_t& x : *numbers) {
        x = random.chance(30) ? random.pick({INT64_MIN, INT64_MAX, int64_t{-1}}) : random.below(150) - 40;
      }
    Results results(problem);
    const AdditiveAttentionParams params = results.additive_params(problem);
    set_seed(static_cast<uint32_t>(number));
    std::string report = forward(c, params);
    if (report.empty()) report = backward(c, params);
    expect(report.empty(), "offsets " + std::to_string(number) + ": " + report + "\n  " + c.text());
  }
}
#endif

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
  const Cases cases = cases_of(count, arguments, 150, 24);
  run_cases(cases, small_config, [](const native::Problem& problem, int64_t) { return check(problem); });
  if (cases.count >= 24) {
    for (const auto& [name, seen] : g_seen) expect(seen > 0, name + " was never tried");
  }
  {  // which random calls seldom reach
    Config c;
    c.additive = true;
    c.query_tokens = 2;
    c.key_tokens = 140;
    c.weights_mode = WeightsMode::kFull;
    const std::string error = check(Problem(c, 11));
    expect(error.empty(), "full weights by splits of the keys: " + error);
  }
  check_huge(cases.count / 12);
#if !defined(__SANITIZE_THREAD__)
  check_offsets(cases.count / 12);
#endif
  return finish("additive_attention", cases.count);
}
