// The additive core of csrc/cuda under the emulator: random calls, forward and backward, against their definition in
// double precision (tests/native), on exact-size buffers, under every kind of schedule.
//
//   attnfast_simt_additive_attention [--cases N] [--first N]
#include <cstdio>
#include <memory>
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

// A call small enough for the emulator and within what the kernels have.
Config small_config(Random& random) {
  for (;;) {
    Config c = native::random_config(random);
    c.additive = true;
    c.scale = 1;
    c.vectors_by_head = random.chance(50);
    c.score_bias = random.chance(60);
    c.spread = random.pick({0.02, 0.2, 1.0, 1.0, 4.0, 15.0, 60.0});
    c.weights_mode = WeightsMode::kNone;
    c.bounds = -1;
    c.prior_sigma = 0;
    if (c.sequences > 0) continue;
    c.query_tokens = random.pick<int64_t>({0, 1, 1, 3, 5, 16, 33, 40});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 130});
    c.head_size = random.pick<int64_t>({0, 1, 3, 8, 16, 33, 64, 70});
    c.value_size = random.pick<int64_t>({1, 8, 33, 64, 70});
    if (random.chance(3)) c.value_size = 260;  // a second block for the columns
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

int g_split = 0, g_narrow = 0, g_wide = 0;

std::string check(const Problem& problem) {
  const Config& c = problem.config;
  Results results(problem);
  const AdditiveAttentionParams params = results.additive_params(problem);
  if (const char* missing = cuda::additive_attention_missing(params)) return std::string("not supported: ") + missing;
  if (c.query_tokens > 0) {
    ++(cuda::additive_attention_is_narrow(params) ? g_narrow : g_wide);
    g_split += cuda::additive_attention_splits(params) > 1;
  }
  const auto forward_space = workspace(c, cuda::additive_attention_fwd_workspace(params));
  std::string error = reported([&] { cuda::additive_attention_fwd(params, forward_space.get(), nullptr); });
  if (!error.empty()) return error;
  Expected expected = native::forward_by_definition(problem);
  // A sum of D terms in float32 has an error of its own; scores beyond the ordinary have it in proportion.
  const double relative = tolerance(c.dtype) * (c.dtype == DType::kFloat32 ? 2 : 1);
  error = compare("out", results.out, expected.out, relative);
  if (error.empty()) error = compare("lse", results.lse, expected.lse, relative);
  if (!error.empty()) return error;

  native::backward_by_definition(problem, {}, expected);
  if (results.delta_shift) copy(expected.delta_shift, results.delta_shift);
  const auto backward_space = workspace(c, cuda::additive_attention_bwd_workspace(params));
  error = reported([&] { cuda::additive_attention_bwd(params, backward_space.get(), nullptr); });
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
  for (int i = 0; i < 2; ++i) gradient("grad_bias", c.bias[i] >= 0, results.grad_bias[i], expected.grad_bias[i]);
  return error;
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
  const Cases cases = cases_of(count, arguments, 200, 30);
  run_cases(cases, small_config, [](const native::Problem& problem, int64_t) { return check(problem); });
  if (cases.count >= 30) expect(g_split > 0 && g_narrow > 0 && g_wide > 0, "every plan was tried");
  return finish("additive_attention", cases.count);
}
