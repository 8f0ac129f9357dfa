// The dot core of csrc/cuda under the emulator: random calls against their definition in double precision
// (tests/native), on exact-size buffers, under every kind of schedule; and the counts that the main tiles must have.
//
//   attnfast_simt_dot_attention [--cases N] [--first N]
#include <cstdio>
#include <cstdlib>

#include "compare.h"
#include "cuda/dot_attention.h"
#include "native/oracle.h"
#include "native/problem.h"

namespace attnfast::simt {
namespace {

using native::Config;
using native::Problem;
using native::Random;

// A call small enough for the emulator and within what the kernels have.
Config small_config(Random& random) {
  for (;;) {
    Config c = native::random_config(random);
    c.additive = false;
    c.spread = 1;
    c.weights_mode = WeightsMode::kNone;
    c.want_query = c.want_key = c.want_value = false;
    c.lse_gradient = false;
    c.bounds = -1;
    c.prior_sigma = 0;
    if (c.sequences > 0) continue;
    c.query_tokens = random.pick<int64_t>({0, 1, 5, 33, 64, 65, 80});
    c.key_tokens = random.pick<int64_t>({0, 1, 7, 31, 64, 65, 130});
    if (random.chance(60)) c.head_size = random.pick<int64_t>({8, 16, 64, 72, 128, 136, 256});
    if (random.chance(70)) c.value_size = c.head_size;
    if (random.chance(50)) c.dtype = random.pick({DType::kBFloat16, DType::kFloat16});
    if (c.head_size <= 256 && c.value_size <= 256 && c.batch * c.heads <= 4) return c;
  }
}

bool g_took_mma = false, g_took_fma = false;

std::string check(const Problem& problem) {
  native::Results results(problem);
  const DotAttentionParams params = results.dot_params(problem);
  if (const char* missing = cuda::dot_attention_missing(params)) return std::string("not supported: ") + missing;
  if (params.query_tokens > 0) (cuda::dot_attention_mma_takes(params) ? g_took_mma : g_took_fma) = true;
  const std::string report = reported([&] { cuda::dot_attention_fwd(params, nullptr); });
  if (!report.empty()) return report;
  const native::Expected expected = native::forward_by_definition(problem);
  const double relative = tolerance(problem.config.dtype);
  const std::string error = compare("out", results.out, expected.out, relative);
  return error.empty() ? compare("lse", results.lse, expected.lse, relative) : error;
}

// The main tiles of the tensor-core kernel, whole ones: no bank conflicts, and as many instructions as the products
// need.
void check_counts(DType dtype, int64_t size) {
  Config c;
  c.dtype = dtype;
  c.query_tokens = 64;
  c.key_tokens = 128;
  c.head_size = c.value_size = size;
  c.scale = 0.125;
  const Problem problem(c, 7);
  reset_counters();
  const std::string error = check(problem);
  expect(error.empty(), "the main tiles: " + error);
  const Counters& count = counters();
  // Two products of 64 x 128 x D, 2048 multiply-adds an instruction.
  expect(count.mma == static_cast<uint64_t>(2 * 64 * 128 * size / 2048),
         "mma instructions: " + std::to_string(count.mma));
  expect(count.bank_conflicts == 0, "bank conflicts: " + std::to_string(count.bank_conflicts));
  expect(count.async_copies == static_cast<uint64_t>((64 + 2 * 128) * size / 8),
         "cp.async of 16 bytes: " + std::to_string(count.async_copies));
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
#if defined(__SANITIZE_THREAD__)
  int64_t cases = 60, first = 0;
#else
  int64_t cases = 200, first = 0;
#endif
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string option = arguments[i];
    if (option == "--cases") cases = std::atoll(arguments[i + 1]);
    if (option == "--first") first = std::atoll(arguments[i + 1]);
  }
  for (int64_t number = first; number < first + cases; ++number) {
    native::Random random(static_cast<uint64_t>(number) * 2 + 1);
    const native::Config config = small_config(random);
    const native::Problem problem(config, random.next());
    set_seed(static_cast<uint32_t>(number));
    const std::string error = check(problem);
    expect(error.empty(), "case " + std::to_string(number) + ": " + error + "\n  " + config.text());
  }
  if (cases >= 60) expect(g_took_mma && g_took_fma, "both kernels were tried");
  for (int64_t size : {64, 128, 256}) check_counts(DType::kBFloat16, size);
  check_counts(DType::kFloat16, 64);
  std::printf("simt dot_attention: %lld cases, %d failures\n", static_cast<long long>(cases), g_failures);
  return g_failures == 0 ? 0 : 1;
}
