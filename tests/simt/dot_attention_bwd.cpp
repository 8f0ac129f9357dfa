// The gradients of the dot core of csrc/cuda under the emulator: random calls against their definition in double
// precision (tests/native), on exact-size buffers, under every kind of schedule, each twice with the same bits; and the
// counts that the main tiles must have.
//
//   attnfast_simt_dot_attention_bwd [--cases N] [--first N]
#include <cstdio>
#include <map>
#include <string>
#include <vector>

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

#if defined(__SANITIZE_THREAD__)
constexpr int64_t kMostWork = 500'000;
#else
constexpr int64_t kMostWork = 1'000'000;
#endif

// A call small enough for the emulator.
Config small_config(Random& random) {
  for (;;) {
    Config c = native::random_config(random);
    c.additive = false;
    c.spread = 1;
    c.query_tokens = random.pick<int64_t>({0, 1, 5, 33, 64, 65, 80});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 100});
    if (random.chance(60)) c.head_size = random.pick<int64_t>({8, 16, 64, 72, 128, 136, 256});
    if (random.chance(70)) c.value_size = c.head_size;
    if (random.chance(50)) c.dtype = random.pick({DType::kBFloat16, DType::kFloat16});
    if (random.chance(20)) {  // packed, over several tiles
      c.batch = 1;
      c.sequences = 1 + random.below(5);
      c.query_lengths = c.key_lengths = false;
      c.query_tokens = random.pick<int64_t>({1, 70, 150});
      c.key_tokens = random.pick<int64_t>({1, 90, 170});
      c.head_size = c.value_size = random.pick<int64_t>({5, 8, 16});
      c.mask = random.chance(20) ? static_cast<int>(random.below(16)) : -1;
      for (int& bias : c.bias) bias = random.chance(25) ? static_cast<int>(random.below(16)) : -1;
    } else if (random.chance(6)) {  // features are split
      c.query_tokens = random.pick<int64_t>({1, 9, 20});
      c.key_tokens = random.pick<int64_t>({5, 20});
      c.head_size = random.pick<int64_t>({0, 40, 264, 520});
      c.value_size = random.pick<int64_t>({260, 264, 513});
      if (random.chance(50)) std::swap(c.head_size, c.value_size);
    }
    if (c.batch * c.heads > 4) continue;
    if (c.query_tokens * c.key_tokens * (c.head_size + c.value_size) * c.batch * c.heads < kMostWork) return c;
  }
}

// How many of the cases so far had what, by name.
std::map<std::string, int64_t> g_seen;

void remember(const Config& c, const DotAttentionParams& params) {
  if (c.query_tokens == 0 || c.key_tokens == 0) return;
  const DotAttentionParams taken = cuda::with_rounded_operands(params);
  const bool mma = cuda::dot_attention_mma_bwd_takes(taken), tf32 = taken.query.dtype == DType::kTf32;
  const bool bias = c.bias[0] >= 0 || c.bias[1] >= 0;
  g_seen["bias"] += bias;
  g_seen["large heads"] += c.head_size > 256 || c.value_size > 256;
  for (const std::string name : {mma ? tf32 ? "tf32" : "tensor cores" : "multiply-adds"}) {
    g_seen[name] += 1;
    g_seen[name + ", packed"] += c.sequences > 0;
    g_seen[name + ", bounds"] += c.bounds >= 0;
    g_seen[name + ", prior"] += c.prior_sigma > 0;
    g_seen[name + ", weights"] += c.weights_mode != WeightsMode::kNone;
  }
  g_seen["full weights"] += c.weights_mode == WeightsMode::kFull;
  g_seen["column sums"] += c.weights_mode == WeightsMode::kColumnSum;
  g_seen["row maxima"] += c.weights_mode == WeightsMode::kRowMax;
  g_seen["packed with a bias"] += c.sequences > 0 && bias;
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

// The argument of each row's maximum, -1 where a row sees nothing.
std::vector<int64_t> row_maxima(const Problem& problem, const Expected& expected) {
  const Config& c = problem.config;
  std::vector<int64_t> index(static_cast<size_t>(c.batch * c.heads * c.query_tokens), -1);
  for (int64_t b = 0; b < problem.sequences(); ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t q = 0; q < problem.query_rows(b); ++q) {
        const int64_t t = problem.tensor_batch(b), i = problem.query_begin(b) + q;
        int64_t& best = index[static_cast<size_t>((t * c.heads + h) * c.query_tokens + i)];
        for (int64_t k = 0; k < problem.key_rows(b); ++k) {
          if (!problem.visible(b, h, q, k)) continue;
          const int64_t j = problem.key_begin(b) + k;
          if (best < 0 || expected.row_weights.get(t, h, i, j) > expected.row_weights.get(t, h, i, best)) best = j;
        }
      }
  return index;
}

// The gradients as the kernels give them, or the emulator's report.
struct Run {
  Results results;
  HostTensor workspace;
  std::string report;

  Run(const Problem& problem, const Expected& expected, const std::vector<int64_t>& weights_index, bool tf32 = false)
      : results(problem),
        workspace(problem.real(),
                  {3 * problem.config.batch, problem.config.heads, problem.config.query_tokens, int64_t{1}}) {
    const Config& c = problem.config;
    copy_values(expected.out, results.out);
    copy_values(expected.lse, results.lse);
    if (results.delta_shift) copy_values(expected.delta_shift, results.delta_shift);
    if (!results.weights_index.empty()) results.weights_index = weights_index;
    workspace.fill_bytes(0xFF);
    // Whatever is not written is NaN; without queries or keys a gradient of a bias stays the caller's zeros.
    for (HostTensor& grad : results.grad_bias) {
      if (grad && c.query_tokens > 0 && c.key_tokens > 0) grad.fill_bytes(0xFF);
    }
    DotAttentionParams params = results.dot_params(problem);
    params.delta = workspace.data();
    params.tf32 = tf32;
    remember(c, params);
    report = reported([&] { cuda::dot_attention_bwd(params, nullptr); });
  }
};

// `defined` is the call by whose definition the gradients are judged, to the last places of `dtype`.
std::string check(const Problem& problem, uint32_t other_seed, const Problem& defined, DType dtype, bool tf32) {
  const Config& c = problem.config;
  Expected expected = native::forward_by_definition(defined);
  const std::vector<int64_t> weights_index = row_maxima(defined, expected);
  native::backward_by_definition(defined, weights_index, expected);
  const Run run(problem, expected, weights_index, tf32);
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
  check_one("grad_center", c.prior_sigma > 0, r.grad_center, expected.grad_center);
  if (!error.empty()) return error;
  set_seed(other_seed);
  const Run again(problem, expected, weights_index, tf32);
  if (!again.report.empty()) return again.report;
  const Results& s = again.results;
  const HostTensor* const first[] = {&r.grad_query,   &r.grad_key,  &r.grad_value, &r.grad_bias[0],
                                     &r.grad_bias[1], &r.grad_sink, &r.grad_center};
  const HostTensor* const second[] = {&s.grad_query,   &s.grad_key,  &s.grad_value, &s.grad_bias[0],
                                      &s.grad_bias[1], &s.grad_sink, &s.grad_center};
  for (size_t i = 0; i < std::size(first); ++i)
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

#if !defined(__SANITIZE_THREAD__)  // nonsense may give a row to two blocks: a race, but within the tensors
// Offsets and indices that nobody has looked at: whatever they hold, nothing outside of the tensors is touched.
void check_offsets(int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    Config c;
    c.dtype = random.pick({DType::kFloat32, DType::kBFloat16});
    c.query_tokens = random.pick<int64_t>({1, 40, 70});
    c.key_tokens = random.pick<int64_t>({1, 40, 70});
    c.sequences = random.pick<int64_t>({1, 2, 5});
    c.weights_mode = random.pick({WeightsMode::kFull, WeightsMode::kColumnSum, WeightsMode::kRowMax});
    c.causal = random.pick({Causal::kNone, Causal::kBottomRight});
    c.bias[0] = static_cast<int>(random.below(16));
    c.sink = true;
    if (random.chance(50)) c.prior_sigma = 2;
    if (random.chance(50)) c.bounds = 7;
    Problem problem(c, random.next());
    std::vector<int64_t> weights_index(static_cast<size_t>(c.query_tokens));
    for (std::vector<int64_t>* values : {&problem.cu_seqlens_q, &problem.cu_seqlens_k, &weights_index})
      for (int64_t& value : *values) {
        value = random.chance(30) ? random.pick({INT64_MIN, INT64_MAX, int64_t{-1}}) : random.below(150) - 40;
      }
    set_seed(static_cast<uint32_t>(number));
    Expected given;
    given.out = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, c.value_size});
    given.lse = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, 1});
    given.delta_shift = HostTensor(DType::kFloat64, {c.batch, c.heads, c.query_tokens, 1});
    given.lse.fill_normal(random, random.chance(50) ? 1 : 0x1p30);  // then rows go along their keys
    const Run run(problem, given, weights_index, number % 2 == 0);
    expect(run.report.empty(), "offsets " + std::to_string(number) + ": " + run.report + "\n  " + c.text());
  }
}
#endif

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
  const Run run(problem, expected, {}, tf32);
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
  const Cases cases = cases_of(count, arguments, 150, 10);
  run_cases(cases, small_config, [](const native::Problem& problem, int64_t number) {
    return check(problem, static_cast<uint32_t>(number + 1));
  });
  check_tf32_calls(cases.count * 2 / 5);
  if (cases.count >= 100) {
    for (const auto& [name, count] : g_seen) expect(count > 0, name + " was never tried");
  }
#if !defined(__SANITIZE_THREAD__)
  check_offsets(cases.count / 4);
#endif
  for (int64_t size : {72, 136, 260}) {  // kernels that random calls seldom reach
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
