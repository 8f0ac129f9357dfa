// The gradients of the dot core of csrc/cuda under the emulator: random calls against their definition in double
// precision (tests/native), on exact-size buffers, under every kind of schedule, each twice with the same bits; and the
// counts that the main tiles must have.
//
//   attnfast_simt_dot_attention_bwd [--cases N] [--first N]
#include <cstdio>

#include "compare.h"
#include "cuda/dot_attention.h"
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
    c.additive = false;
    c.spread = 1;
    c.weights_mode = WeightsMode::kNone;
    c.bounds = -1;
    c.prior_sigma = 0;
    if (c.sequences > 0) continue;
    c.query_tokens = random.pick<int64_t>({0, 1, 5, 33, 64, 65, 80});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 100});
    if (random.chance(60)) c.head_size = random.pick<int64_t>({8, 16, 64, 72, 128, 136, 256});
    if (random.chance(70)) c.value_size = c.head_size;
    if (random.chance(50)) c.dtype = random.pick({DType::kBFloat16, DType::kFloat16});
    if (c.head_size > 256 || c.value_size > 256 || c.batch * c.heads > 4) continue;
    if (c.query_tokens * c.key_tokens * (c.head_size + c.value_size) * c.batch * c.heads < 1'000'000) return c;
  }
}

// Of the terms of each element, see Gradient; the half types round `out`, which the backward reads again, and on tensor
// cores weights and score gradients, which may be subnormal numbers of float16.
struct Tolerance {
  double relative, floor;
};
Tolerance gradient_tolerance(DType dtype) {
  switch (dtype) {
    case DType::kTf32:  // weights and score gradients; operands are rounded in the definition too
      return {1e-3, 1e-12};
    case DType::kFloat64:
      return {3e-12, 1e-15};
    case DType::kFloat32:
      return {2e-5, 1e-12};
    case DType::kBFloat16:
      return {1.2e-2, 1e-12};
    default:
      return {2e-3, 2e-6};
  }
}

template <class Use>
void for_each_element(const HostTensor& tensor, Use use) {
  for (int64_t b = 0; b < tensor.size(0); ++b)
    for (int64_t h = 0; h < tensor.size(1); ++h)
      for (int64_t i = 0; i < tensor.size(2); ++i)
        for (int64_t j = 0; j < tensor.size(3); ++j) use(b, h, i, j);
}

void copy_values(const HostTensor& from, HostTensor& to) {
  for_each_element(from, [&](int64_t b, int64_t h, int64_t i, int64_t j) { to.set(b, h, i, j, from.get(b, h, i, j)); });
}

std::string compare_gradient(const char* what, DType dtype, const HostTensor& got, const Gradient& wanted) {
  const Tolerance limit = gradient_tolerance(dtype);
  std::string where;
  double worst = 1;
  for_each_element(wanted.value, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    const double x = got.get(b, h, i, j), y = wanted.value.get(b, h, i, j);
    if (x == y) return;
    const double error = std::fabs(x - y) / (limit.floor + limit.relative * wanted.magnitude.get(b, h, i, j));
    if (error <= worst) return;  // a NaN goes on
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    char text[200];
    std::snprintf(text, sizeof(text), "%s[%d,%d,%d,%d]: %g for %g, %.3g times the limit", what, int(b), int(h), int(i),
                  int(j), x, y, worst);
    where = text;
  });
  return where;
}

bool g_took_mma = false, g_took_fma = false, g_took_tf32 = false;

// The gradients as the kernels give them, or the emulator's report.
struct Run {
  Results results;
  HostTensor workspace;
  std::string report;

  Run(const Problem& problem, const Expected& expected, bool tf32 = false)
      : results(problem),
        workspace(problem.real(),
                  {3 * problem.config.batch, problem.config.heads, problem.config.query_tokens, int64_t{1}}) {
    const Config& c = problem.config;
    copy_values(expected.out, results.out);
    copy_values(expected.lse, results.lse);
    if (results.delta_shift) copy_values(expected.delta_shift, results.delta_shift);
    workspace.fill_bytes(0xFF);
    // Whatever is not written is NaN; without queries or keys a gradient of a bias stays the caller's zeros.
    for (HostTensor& grad : results.grad_bias) {
      if (grad && c.query_tokens > 0 && c.key_tokens > 0) grad.fill_bytes(0xFF);
    }
    DotAttentionParams params = results.dot_params(problem);
    params.delta = workspace.data();
    params.tf32 = tf32;
    if (const char* missing = cuda::dot_attention_bwd_missing(params)) {
      report = std::string("not supported: ") + missing;
      return;
    }
    const uint64_t before = counters().mma;
    report = reported([&] { cuda::dot_attention_bwd(params, nullptr); });
    if (c.query_tokens > 0) (counters().mma > before ? tf32 ? g_took_tf32 : g_took_mma : g_took_fma) = true;
  }
};

// `defined` is the call by whose definition the gradients are judged, to the last places of `dtype`.
std::string check(const Problem& problem, uint32_t other_seed, const Problem& defined, DType dtype, bool tf32) {
  const Config& c = problem.config;
  Expected expected = native::forward_by_definition(defined);
  native::backward_by_definition(defined, {}, expected);
  const Run run(problem, expected, tf32);
  if (!run.report.empty()) return run.report;
  const Results& r = run.results;
  std::string error;
  const auto check_one = [&](const char* what, bool wanted, const HostTensor& got, const Gradient& gradient) {
    if (wanted && error.empty()) error = compare_gradient(what, dtype, got, gradient);
  };
  check_one("grad_query", c.want_query, r.grad_query, expected.grad_query);
  check_one("grad_key", c.want_key, r.grad_key, expected.grad_key);
  check_one("grad_value", c.want_value, r.grad_value, expected.grad_value);
  for (int i = 0; i < 2; ++i) check_one("grad_bias", c.bias[i] >= 0, r.grad_bias[i], expected.grad_bias[i]);
  check_one("grad_sink", c.sink, r.grad_sink, expected.grad_sink);
  if (!error.empty()) return error;
  set_seed(other_seed);
  const Run again(problem, expected, tf32);
  if (!again.report.empty()) return again.report;
  const Results& s = again.results;
  const HostTensor* const first[] = {&r.grad_query,   &r.grad_key,     &r.grad_value,
                                     &r.grad_bias[0], &r.grad_bias[1], &r.grad_sink};
  const HostTensor* const second[] = {&s.grad_query,   &s.grad_key,     &s.grad_value,
                                      &s.grad_bias[0], &s.grad_bias[1], &s.grad_sink};
  for (size_t i = 0; i < 6; ++i)
    if (!first[i]->same_bytes(*second[i])) return "another schedule gives other bits";
  return "";
}

std::string check(const Problem& problem, uint32_t other_seed) {
  return check(problem, other_seed, problem, problem.config.dtype, false);
}

// A call that allows tf32, by the definition with rounded operands.
std::string check_tf32(const Config& config, uint64_t seed, uint32_t other_seed, DType dtype = DType::kTf32) {
  const Problem problem(config, seed);
  Problem rounded(config, seed);
  const bool takes = takes_tf32(config);
  if (takes) {
    for (HostTensor* x : {&rounded.query, &rounded.key, &rounded.value, &rounded.grad_out}) round_to_tf32(*x);
  }
  return check(problem, other_seed, rounded, takes ? dtype : config.dtype, true);
}

void check_tf32_calls(int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    const Config config = with_tf32_sizes(random, small_config(random));
    set_seed(static_cast<uint32_t>(number));
    const std::string error = check_tf32(config, random.next(), static_cast<uint32_t>(number + 1));
    expect(error.empty(), "tf32 case " + std::to_string(number) + ": " + error + "\n  " + config.text());
  }
  // 64 equal scores: all weights are 1/64, and nothing of a value's gradient is rounded but what arrives.
  for (int64_t size : {64, 128, 256}) {
    Config c;
    c.query_tokens = 20;
    c.key_tokens = 64;
    c.head_size = c.value_size = size;
    c.scale = 0;
    c.want_query = c.want_key = false;
    const std::string error = check_tf32(c, 5, 1, DType::kFloat32);
    expect(error.empty(), "tf32 gradient of values: " + error);
  }
}

// The main tiles of the tensor-core kernel, whole ones: no bank conflicts, and as many instructions as the products
// need.
void check_counts(DType dtype, int64_t size, bool tf32 = false) {
  Config c;
  c.dtype = dtype;
  c.query_tokens = c.key_tokens = 128;
  c.head_size = c.value_size = size;
  c.scale = 0.125;
  const Problem problem(c, 7);
  const Expected expected = native::forward_by_definition(problem);
  reset_counters();
  const Run run(problem, expected, tf32);
  expect(run.report.empty(), "the main tiles: " + run.report);
  const Counters& count = counters();
  // Products of 128 x 128 x D, 2048 multiply-adds an instruction (1024 in tf32): three for dQ, four for dK and dV, or
  // three and two where each has a pass.
  const bool apart = size > 128;
  expect(count.mma == static_cast<uint64_t>((apart ? 8 : 7) * 128 * 128 * size / (tf32 ? 1024 : 2048)),
         "mma instructions: " + std::to_string(count.mma));
  expect(count.bank_conflicts == 0, "bank conflicts: " + std::to_string(count.bank_conflicts));
  // Blocks of 64 rows, 32 in tf32 where D > 128, each with its rows of two tensors and all 128 of the two others; by
  // keys also three numbers for each query.
  const int64_t by_keys = apart ? 2 : 1, rows = tf32 && apart ? 32 : 64, chunk = tf32 ? 4 : 8;
  expect(count.async_copies ==
             static_cast<uint64_t>(128 / rows * ((1 + by_keys) * 2 * (rows + 128) * size / chunk + by_keys * 3 * 128)),
         "cp.async: " + std::to_string(count.async_copies));
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
  const Cases cases = cases_of(count, arguments, 150, 15);
  run_cases(cases, small_config, [](const native::Problem& problem, int64_t number) {
    return check(problem, static_cast<uint32_t>(number + 1));
  });
  check_tf32_calls(cases.count * 2 / 5);
  if (cases.count >= 15) expect(g_took_mma && g_took_fma && g_took_tf32, "all kernels were tried");
  for (int64_t size : {72, 136}) {  // kernels that random calls seldom reach
    Config c;
    c.dtype = DType::kFloat64;
    c.query_tokens = 5;
    c.key_tokens = 7;
    c.head_size = c.value_size = size;
    c.bias[0] = 15;
    const std::string error = check(Problem(c, 11), 1);
    expect(error.empty(), "bias in float64: " + error);
  }
  for (int64_t size : {64, 128, 256}) check_counts(DType::kBFloat16, size);
  for (int64_t size : {64, 128, 256}) check_counts(DType::kFloat32, size, true);
  check_counts(DType::kFloat16, 64);
  return finish("dot_attention_bwd", cases.count);
}
