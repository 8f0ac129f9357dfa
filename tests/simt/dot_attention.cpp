// The dot core of csrc/cuda under the emulator: random calls against their definition in double precision
// (tests/native), on exact-size buffers, under every kind of schedule; and the counts that the main tiles must have.
//
//   attnfast_simt_dot_attention [--cases N] [--first N]
#include <cstdint>
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
using native::Problem;
using native::Random;

// A call small enough for the emulator.
Config small_config(Random& random) {
  for (;;) {
    Config c = native::random_config(random);
    c.additive = false;
    c.spread = 1;
    c.want_query = c.want_key = c.want_value = false;
    c.lse_gradient = false;
    if (random.chance(20)) c.weights_mode = WeightsMode::kFull;
    c.query_tokens = random.pick<int64_t>({0, 1, 5, 33, 64, 65, 80});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 130});
    if (random.chance(60)) c.head_size = random.pick<int64_t>({8, 16, 64, 72, 128, 136, 256});
    if (random.chance(70)) c.value_size = c.head_size;
    if (random.chance(50)) c.dtype = random.pick({DType::kBFloat16, DType::kFloat16});
    if (random.chance(15)) {  // keys are split
      c.sequences = 0;
      c.query_tokens = random.pick<int64_t>({1, 1, 3});
      c.key_tokens = random.pick<int64_t>({512, 600, 800});
      c.head_size = c.value_size = random.pick<int64_t>({8, 16, 24});
      if (random.chance(50)) {
        c.batch = c.kv_heads = c.query_tokens = 1;
        c.heads = random.pick<int64_t>({2, 4});
      }
    } else if (random.chance(8)) {  // features are split
      c.query_tokens = random.pick<int64_t>({1, 9});
      c.key_tokens = random.pick<int64_t>({5, 40});
      c.head_size = random.pick<int64_t>({0, 40, 264, 520});
      c.value_size = random.pick<int64_t>({260, 264, 513});
    }
    if (c.batch * c.heads <= 4) return c;
  }
}

// How many of the cases so far had what, by name.
std::map<std::string, int64_t> g_seen;

void remember(const Config& c, const DotAttentionParams& params) {
  if (c.query_tokens == 0 || c.key_tokens == 0) return;
  const bool split = cuda::dot_attention_workspace(params) > 0;
  g_seen["tensor cores"] += cuda::dot_attention_mma_takes(params);
  g_seen["multiply-adds"] += !cuda::dot_attention_mma_takes(params);
  g_seen["packed"] += c.sequences > 0;
  g_seen["split keys"] += split;
  g_seen["split keys, grouped heads"] += split && c.query_tokens == 1 && c.heads > c.kv_heads;
  g_seen["large heads"] += c.head_size > 256;
  g_seen["bounds"] += c.bounds >= 0;
  g_seen["prior"] += c.prior_sigma > 0;
  g_seen["full weights"] += c.weights_mode == WeightsMode::kFull;
  g_seen["column sums"] += c.weights_mode == WeightsMode::kColumnSum;
  g_seen["row maxima"] += c.weights_mode == WeightsMode::kRowMax;
}

// Runs the kernels on a workspace of the exact size, NaN at first; what the emulator reports, or "".
std::string run(const DotAttentionParams& params, DType real) {
  const size_t bytes = static_cast<size_t>(cuda::dot_attention_workspace(params) * native::element_size(real));
  std::vector<unsigned char> workspace(bytes, 0xFF);
  return reported([&] { cuda::dot_attention_fwd(params, bytes > 0 ? workspace.data() : nullptr, nullptr); });
}

std::string check(const Problem& problem) {
  native::Results results(problem);
  const DotAttentionParams params = results.dot_params(problem);
  remember(problem.config, params);
  const std::string report = run(params, problem.real());
  if (!report.empty()) return report;
  const native::Expected expected = native::forward_by_definition(problem);
  const double relative = tolerance(problem.config.dtype);
  std::string error = compare("out", results.out, expected.out, relative);
  if (error.empty()) error = compare("lse", results.lse, expected.lse, relative);
  if (error.empty() && results.weights) error = compare("weights", results.weights, expected.weights, relative);
  if (error.empty() && !results.weights_index.empty()) {
    error = check_row_maximum(problem.config, results, expected, relative);
  }
  return error;
}

// Calls that allow tf32: the definition has the operands rounded, so that nothing but the rounding of weights before
// they meet the values is left, of 2^-11 each; log-sum-exp and weights are float32's.
std::string check_tf32(const Config& config, uint64_t seed, double relative) {
  const Problem problem(config, seed);
  Problem rounded(config, seed);
  const bool takes = takes_tf32(config);
  if (takes) {
    for (HostTensor* x : {&rounded.query, &rounded.key, &rounded.value}) round_to_tf32(*x);
  }
  native::Results results(problem);
  DotAttentionParams params = results.dot_params(problem);
  params.tf32 = true;
  const uint64_t before = counters().mma;
  const std::string report = run(params, problem.real());
  if (!report.empty()) return report;
  const bool launched = config.batch * config.heads * config.query_tokens > 0 && config.key_tokens > 0;
  if (!takes && counters().mma != before) return "mma in a call that is not made for it";
  if (takes && launched && std::string(cuda::dot_attention_kernel_name(params)) != "dot_attention_mma") {
    return "named " + std::string(cuda::dot_attention_kernel_name(params));
  }
  g_seen["tf32"] += takes && counters().mma > before;
  g_seen["tf32, split keys"] += takes && cuda::dot_attention_workspace(params) > 0;
  g_seen["tf32, weights"] += takes && config.weights_mode != WeightsMode::kNone;
  g_seen["tf32 allowed, not taken"] += !takes && launched;
  const native::Expected expected = native::forward_by_definition(rounded);
  const double exact = tolerance(DType::kFloat32);
  std::string error = compare("out", results.out, expected.out, takes ? relative : exact);
  if (error.empty()) error = compare("lse", results.lse, expected.lse, exact);
  // Formed by other additions than the log-sum-exp.
  if (error.empty() && results.weights) error = compare("weights", results.weights, expected.weights, 4 * exact);
  if (error.empty() && !results.weights_index.empty()) error = check_row_maximum(config, results, expected, exact);
  return error;
}

void check_tf32_calls(int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    const Config config = with_tf32_sizes(random, small_config(random));
    set_seed(static_cast<uint32_t>(number));
    const std::string error = check_tf32(config, random.next(), 1.2e-3);
    expect(error.empty(), "tf32 case " + std::to_string(number) + ": " + error + "\n  " + config.text());
  }
  // Scores of nothing but zeros: all weights are 1 before they are normalised, and nothing is rounded but the values.
  for (int64_t size : {64, 128, 256}) {
    Config c;
    c.query_tokens = 5;
    c.key_tokens = 70;
    c.head_size = c.value_size = size;
    c.scale = 0;
    const std::string error = check_tf32(c, 5, tolerance(DType::kFloat32));
    expect(error.empty(), "tf32 mean of values: " + error);
  }
}

#if !defined(__SANITIZE_THREAD__)  // nonsense may give a row to two blocks: a race, but within the tensors
// Offsets that nobody has looked at: whatever they hold, nothing outside of the tensors is touched.
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
    if (random.chance(50)) c.prior_sigma = 2;
    if (random.chance(50)) c.bounds = 7;
    Problem problem(c, random.next());
    for (std::vector<int64_t>* offsets : {&problem.cu_seqlens_q, &problem.cu_seqlens_k})
      for (int64_t& offset : *offsets) {
        offset = random.chance(30) ? random.pick({INT64_MIN, INT64_MAX, int64_t{-1}}) : random.below(150) - 40;
      }
    native::Results results(problem);
    set_seed(static_cast<uint32_t>(number));
    DotAttentionParams params = results.dot_params(problem);
    params.tf32 = number % 2 == 0;
    const std::string report = run(params, problem.real());
    expect(report.empty(), "offsets " + std::to_string(number) + ": " + report + "\n  " + c.text());
  }
}
#endif

// The main tiles of the tensor-core kernel, whole ones: no bank conflicts, and as many instructions as the products
// need.
void check_counts(DType dtype, int64_t size, bool tf32 = false) {
  Config c;
  c.dtype = dtype;
  c.query_tokens = 64;
  c.key_tokens = 128;
  c.head_size = c.value_size = size;
  c.scale = 0.125;
  reset_counters();
  const std::string error = tf32 ? check_tf32(c, 7, 1.2e-3) : check(Problem(c, 7));
  expect(error.empty(), "the main tiles: " + error);
  const Counters& count = counters();
  // Two products of 64 x 128 x D, 2048 multiply-adds an instruction, 1024 in tf32.
  expect(count.mma == static_cast<uint64_t>(2 * 64 * 128 * size / (tf32 ? 1024 : 2048)),
         "mma instructions: " + std::to_string(count.mma));
  expect(count.bank_conflicts == 0, "bank conflicts: " + std::to_string(count.bank_conflicts));
  expect(count.async_copies == static_cast<uint64_t>((64 + 2 * 128) * size / (tf32 ? 4 : 8)),
         "cp.async of 16 bytes: " + std::to_string(count.async_copies));
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
  const Cases cases = cases_of(count, arguments, 200, 40);
  run_cases(cases, small_config, [](const native::Problem& problem, int64_t) { return check(problem); });
  check_tf32_calls(cases.count * 2 / 5);
  if (cases.count >= 60) {
    for (const auto& [name, count] : g_seen) expect(count > 0, name + " was never tried");
  }
#if !defined(__SANITIZE_THREAD__)
  check_offsets(cases.count / 4);
#endif
  {  // a kernel that random calls seldom reach
    Config c;
    c.dtype = DType::kFloat64;
    c.query_tokens = 5;
    c.key_tokens = 40;
    c.weights_mode = WeightsMode::kColumnSum;
    const std::string error = check(Problem(c, 11));
    expect(error.empty(), "column sums in float64: " + error);
  }
  for (int64_t size : {64, 128, 256}) check_counts(DType::kBFloat16, size);
  for (int64_t size : {64, 128, 256}) check_counts(DType::kFloat32, size, true);
  check_counts(DType::kFloat16, 64);
  return finish("dot_attention", cases.count);
}
