// Runs the kernels without Python: random calls against their definition, serially and on several threads, on
// exact-size buffers. Built under AddressSanitizer + UBSan and under ThreadSanitizer by tools/native_tests.py.
//
//   attnfast_native_test [--cases N] [--first N] [--isa NAME] [--threads N]
//
// A failure prints the number of the case; `--first THAT --cases 1` repeats it alone.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "gather.h"
#include "oracle.h"
#include "problem.h"
#include "topk.h"

namespace attnfast::native {
namespace {

int g_threads = 4;
thread_local int t_pool_threads = 1;  // of the pool, for calls from this thread

// Threads start and end with every call, the harshest order of events for per-thread scratch.
int thread_pool(int64_t begin, int64_t end, int64_t, void (*callback)(int64_t, int64_t, void*), void* ctx) {
  const int64_t count = std::min<int64_t>(t_pool_threads, end - begin);
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; ++i) threads.emplace_back([=] { callback(begin + i, begin + i + 1, ctx); });
  callback(begin, begin + 1, ctx);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

template <class Use>
void for_each_element(const HostTensor& tensor, Use use) {
  for (int64_t b = 0; b < tensor.size(0); ++b)
    for (int64_t h = 0; h < tensor.size(1); ++h)
      for (int64_t i = 0; i < tensor.size(2); ++i)
        for (int64_t j = 0; j < tensor.size(3); ++j) use(b, h, i, j);
}

struct Tolerance {
  double forward, backward, floor;
};

// Forward: of the largest element of the tensor. Backward: of the terms of each element, see Gradient; the half types
// round `out`, which the backward reads again. The floor is half a unit of float16's subnormal numbers.
Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return {1e-13, 1e-12, 1e-15};
    case DType::kFloat32:
      return {4e-6, 2e-5, 1e-12};
    case DType::kBFloat16:
      return {6e-3, 1e-2, 1e-12};
    default:
      return {8e-4, 1.5e-3, 3e-8};
  }
}

std::string compare(const char* what, const HostTensor& got, const HostTensor& wanted, double relative,
                    const HostTensor* magnitude = nullptr, double floor = 0) {
  double scale = 1, worst = 1;
  std::string where;
  if (magnitude == nullptr) {
    for_each_element(wanted, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const double y = std::fabs(wanted.get(b, h, i, j));
      if (std::isfinite(y)) scale = std::max(scale, y);
    });
  }
  for_each_element(wanted, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    const double x = got.get(b, h, i, j), y = wanted.get(b, h, i, j);
    if (x == y) return;  // infinities too
    const double limit = floor + relative * (magnitude != nullptr ? magnitude->get(b, h, i, j) : scale);
    const double error = std::fabs(x - y) / limit;
    if (error <= worst) return;  // a NaN goes on
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    char text[200];
    std::snprintf(text, sizeof(text), "%s[%d,%d,%d,%d]: %g for %g, %.3g times the limit", what, int(b), int(h), int(i),
                  int(j), x, y, worst);
    where = text;
  });
  return where;
}

void copy_values(const HostTensor& from, HostTensor& to) {
  for_each_element(from, [&](int64_t b, int64_t h, int64_t i, int64_t j) { to.set(b, h, i, j, from.get(b, h, i, j)); });
}

// Calls one of the core's two kernels on the parameters as `change` leaves them.
template <class Change>
void call(const KernelTable& kernels, const Problem& problem, bool backward, int threads, Results& results,
          Change change) {
  t_pool_threads = threads;
  const auto go = [&](auto params, auto kernel) {
    params.threads = threads;
    params.native_bf16 = kernels.native_bf16;
    change(params);
    kernel(params);
  };
  if (problem.config.additive) {
    go(results.additive_params(problem), backward ? kernels.additive_attention_bwd : kernels.additive_attention_fwd);
  } else {
    go(results.dot_params(problem), backward ? kernels.dot_attention_bwd : kernels.dot_attention_fwd);
  }
}

void run(const KernelTable& kernels, const Problem& problem, const Expected* shift, int threads, Results& results) {
  if (shift != nullptr && results.delta_shift) copy_values(shift->delta_shift, results.delta_shift);
  call(kernels, problem, shift != nullptr, threads, results, [](AttentionParams&) {});
}

// Inference: nobody asks for lse, which lets the forward take the decode kernel.
void infer(const KernelTable& kernels, const Problem& problem, int threads, Results& results) {
  call(kernels, problem, false, threads, results, [](AttentionParams& params) {
    params.lse = nullptr;
    params.weights_mode = WeightsMode::kNone;
    params.weights = {};
    params.weights_index = nullptr;
  });
}

bool needs_no_lse(const Config& c) {
  return !c.additive && c.key_tokens <= kWholeRowKeys && c.sequences == 0 && !c.sink && c.bias[0] < 0 &&
         c.bias[1] < 0 && !c.lse_gradient && c.weights_mode == WeightsMode::kNone && c.softcap == 0 &&
         c.dropout_p == 0 && c.prior_sigma == 0;
}

// A backward from the operands alone.
void differentiate_without_lse(const KernelTable& kernels, const Problem& problem, int threads, Results& results) {
  call(kernels, problem, true, threads, results, [](AttentionParams& params) {
    params.lse = params.delta = nullptr;
    params.out = {};
  });
}

std::string check_row_maximum(const Problem& problem, const Results& results, const Expected& expected,
                              double relative) {
  const Config& c = problem.config;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.query_tokens; ++i) {
        const int64_t index = results.weights_index[(b * c.heads + h) * c.query_tokens + i];
        const double largest = expected.weights.get(b, h, i, 0);
        const std::string at = " at row " + std::to_string(i) + ": " + std::to_string(index);
        if (index < -1 || index >= c.key_tokens) return "weights_index out of range" + at;
        if (index == -1 && largest > 0) return "weights_index is -1 for a visible row" + at;
        // Near ties may go either way; what is named must be the maximum but for rounding.
        if (index >= 0 && expected.row_weights.get(b, h, i, index) < largest - 4 * relative) {
          return "weights_index is not the maximum" + at;
        }
      }
  return "";
}

std::string check(const KernelTable& kernels, const Problem& problem) {
  const Config& c = problem.config;
  const Tolerance limits = tolerance(c.dtype);
  Results serial(problem), threaded(problem), inferred(problem), inferred_threaded(problem);
  run(kernels, problem, nullptr, 1, serial);
  infer(kernels, problem, 1, inferred);
  infer(kernels, problem, g_threads, inferred_threaded);
  Expected expected = forward_by_definition(problem);
  std::vector<std::string> errors = {compare("out", serial.out, expected.out, limits.forward),
                                     compare("lse", serial.lse, expected.lse, limits.forward),
                                     compare("out without lse", inferred.out, expected.out, limits.forward)};
  if (serial.weights) errors.push_back(compare("weights", serial.weights, expected.weights, limits.forward));
  if (!serial.weights_index.empty()) errors.push_back(check_row_maximum(problem, serial, expected, limits.forward));
  backward_by_definition(problem, serial.weights_index, expected);
  run(kernels, problem, &expected, 1, serial);
  // A prior makes rows of `out` as small as it likes: the backward reads them as subnormal numbers.
  const double floor = c.prior_sigma > 0 ? 30 * limits.floor : limits.floor;
  const auto check_gradient = [&](const char* what, bool wanted, const HostTensor& got, const Gradient& gradient) {
    if (wanted) errors.push_back(compare(what, got, gradient.value, limits.backward, &gradient.magnitude, floor));
  };
  check_gradient("grad_query", c.want_query, serial.grad_query, expected.grad_query);
  check_gradient("grad_key", c.want_key, serial.grad_key, expected.grad_key);
  check_gradient("grad_value", c.want_value, serial.grad_value, expected.grad_value);
  for (int i = 0; i < 2; ++i) {
    check_gradient("grad_bias", c.bias[i] >= 0, serial.grad_bias[i], expected.grad_bias[i]);
  }
  check_gradient("grad_sink", c.sink, serial.grad_sink, expected.grad_sink);
  check_gradient("grad_center", c.prior_sigma > 0, serial.grad_center, expected.grad_center);
  check_gradient("grad_weight", c.additive, serial.grad_weight, expected.grad_weight);
  check_gradient("grad_score_bias", c.additive && c.score_bias, serial.grad_score_bias, expected.grad_score_bias);
  if (needs_no_lse(c)) {
    differentiate_without_lse(kernels, problem, 1, inferred);
    differentiate_without_lse(kernels, problem, g_threads, inferred_threaded);
    check_gradient("grad_query without lse", c.want_query, inferred.grad_query, expected.grad_query);
    check_gradient("grad_key without lse", c.want_key, inferred.grad_key, expected.grad_key);
    check_gradient("grad_value without lse", c.want_value, inferred.grad_value, expected.grad_value);
  }
  for (const std::string& error : errors)
    if (!error.empty()) return error;

  // The number of threads chooses the schedule, never a bit of the result.
  run(kernels, problem, nullptr, g_threads, threaded);
  run(kernels, problem, &expected, g_threads, threaded);
  const auto equal = [&](const char* what, const HostTensor& a, const HostTensor& b) {
    if (!a.same_bytes(b) && errors.front().empty()) errors.front() = std::string(what) + " depends on the threads";
  };
  equal("out", serial.out, threaded.out);
  equal("out without lse", inferred.out, inferred_threaded.out);
  equal("grad_query without lse", inferred.grad_query, inferred_threaded.grad_query);
  equal("grad_key without lse", inferred.grad_key, inferred_threaded.grad_key);
  equal("grad_value without lse", inferred.grad_value, inferred_threaded.grad_value);
  equal("lse", serial.lse, threaded.lse);
  equal("weights", serial.weights, threaded.weights);
  equal("grad_query", serial.grad_query, threaded.grad_query);
  equal("grad_key", serial.grad_key, threaded.grad_key);
  equal("grad_value", serial.grad_value, threaded.grad_value);
  for (int i = 0; i < 2; ++i) equal("grad_bias", serial.grad_bias[i], threaded.grad_bias[i]);
  equal("grad_sink", serial.grad_sink, threaded.grad_sink);
  equal("grad_center", serial.grad_center, threaded.grad_center);
  equal("grad_weight", serial.grad_weight, threaded.grad_weight);
  equal("grad_score_bias", serial.grad_score_bias, threaded.grad_score_bias);
  if (serial.weights_index != threaded.weights_index) errors.front() = "weights_index depends on the threads";
  return errors.front();
}

Problem make_problem(int64_t number) {
  Random random(static_cast<uint64_t>(number) * 2 + 1);
  const Config config = random_config(random);
  return Problem(config, random.next());
}

// One query per head, where kernels read rows that fill no whole vector; masks and biases differ from key to key.
std::vector<Config> one_query_configs() {
  std::vector<Config> configs;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (bool additive : {false, true})
      for (int64_t keys : {3, 77, 1101})
        for (int mask : {8, 11, -1}) {
          Config c;
          c.dtype = dtype;
          c.additive = additive;
          c.batch = c.heads = c.kv_heads = 2;
          c.key_tokens = keys;
          c.head_size = 37;
          c.value_size = 21;
          c.scale = 0.2;
          c.mask = mask;
          if (mask < 0) c.bias[0] = 8;
          c.key_lengths = mask == 11;
          c.score_bias = mask == 8;
          c.poison = true;
          configs.push_back(c);
          c.bias[0] = -1;  // whose gradient is another kernel's work
          c.sink = true;
          configs.push_back(c);
        }
  return configs;
}

int run_one_query(const KernelTable& kernels) {
  int failures = 0;
  uint64_t seed = 1;
  for (const Config& config : one_query_configs()) {
    const Problem problem(config, ++seed);
    const std::string error = check(kernels, problem);
    if (error.empty()) continue;
    std::printf("FAILED %s one query: %s\n  %s\n", kernels.name, error.c_str(), config.text().c_str());
    ++failures;
  }
  return failures;
}

int run_cases(const KernelTable& kernels, int64_t first, int64_t cases, const char* note) {
  int failures = 0;
  for (int64_t number = first; number < first + cases; ++number) {
    for (const auto check_memory : {check_topk, check_gather}) {
      const std::string wrong = check_memory(kernels, number, g_threads, [](int threads) { t_pool_threads = threads; });
      if (wrong.empty()) continue;
      std::printf("FAILED %s case %lld%s: %s\n", kernels.name, static_cast<long long>(number), note, wrong.c_str());
      ++failures;
    }
    const Problem problem = make_problem(number);
    const std::string error = check(kernels, problem);
    if (error.empty()) continue;
    std::printf("FAILED %s case %lld%s: %s\n  %s\n", kernels.name, static_cast<long long>(number), note, error.c_str(),
                problem.config.text().c_str());
    ++failures;
  }
  return failures;
}

void check_that(bool good, const char* what, int& failures) {
  if (good) return;
  std::printf("FAILED %s\n", what);
  ++failures;
}

// The scheduler itself: every index once, and the first exception comes back when all threads have ended.
int check_parallel() {
  int failures = 0;
  t_pool_threads = g_threads;
  std::vector<std::atomic<int>> seen(5000);
  parallel_tasks(
      5000, false, [](void* ctx, int64_t i) { (*static_cast<std::vector<std::atomic<int>>*>(ctx))[i].fetch_add(1); },
      &seen);
  bool once = true;
  for (const std::atomic<int>& count : seen) once = once && count == 1;
  check_that(once, "parallel_tasks runs every index once", failures);

  std::atomic<int> begun{0};
  std::string caught;
  try {
    parallel_tasks(
        5000, false,
        [](void* ctx, int64_t i) {
          static_cast<std::atomic<int>*>(ctx)->fetch_add(1);
          if (i == 17) throw std::runtime_error("task 17");
          std::this_thread::sleep_for(std::chrono::microseconds(50));  // the others must still be busy
        },
        &begun);
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  check_that(caught == "task 17", "an exception of a task reaches the caller", failures);
  check_that(begun < 5000, "tasks after an exception are skipped", failures);

  char* small = static_cast<char*>(scratch(0, 100));
  check_that(reinterpret_cast<uintptr_t>(small) % 64 == 0, "scratch is aligned", failures);
  small[99] = 1;
  char* large = static_cast<char*>(scratch(0, size_t{20} << 20));
  large[(size_t{20} << 20) - 1] = 1;
  check_that(scratch(1, 64) != scratch(0, 64), "scratch slots differ", failures);
  bool refused = false;
  try {
    scratch(2, ~size_t{0} / 2);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  check_that(refused, "scratch throws bad_alloc", failures);
  return failures;
}

}  // namespace
}  // namespace attnfast::native

int main(int argc, char** argv) {
  using namespace attnfast;
  int64_t cases = 200, first = 0;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--cases") cases = std::atoll(argv[i + 1]);
    if (option == "--first") first = std::atoll(argv[i + 1]);
    if (option == "--isa") only = argv[i + 1];
    if (option == "--threads") native::g_threads = std::atoi(argv[i + 1]);
  }
  set_parallel_for(native::thread_pool);
  int failures = native::check_parallel();
  for (const std::string& isa : available_isas()) {
    if (!only.empty() && isa != only) continue;
    set_isa(isa);
    const KernelTable& table = kernels();
    failures += native::run_one_query(table);
    failures += native::run_cases(table, first, cases, "");
    // Several callers at once, each with the pool.
    std::atomic<int> concurrent{0};
    std::vector<std::thread> callers;
    for (int64_t caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&, caller] {
        concurrent += native::run_cases(table, first + caller * cases / 8, cases / 8, " (concurrent)");
      });
    }
    for (std::thread& caller : callers) caller.join();
    failures += concurrent;
    std::printf("%s: %lld cases, %d failures so far\n", isa.c_str(), static_cast<long long>(cases), failures);
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
