// The memory kernels of csrc/cuda under the emulator: the random calls of tests/native (topk.cpp, gather.cpp) against
// their definitions, bit for bit, on exact-size buffers and under every kind of schedule. What Python does around the
// kernels on a GPU, allocation and the sort of the picks, is done here by hand.
//
//   attnfast_simt_memory [--cases N] [--first N]
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "check.h"
#include "cuda/product_keys.h"
#include "cuda/topk_scores.h"
#include "cuda/weighted_gather.h"
#include "native/gather.h"
#include "native/problem.h"
#include "native/topk.h"

namespace attnfast::simt {
namespace {

int64_t g_number = 0;

// Each call runs twice, under two schedules.
void use_schedule(int which) { set_seed(static_cast<uint32_t>(g_number + which)); }

// Memory of exactly so many bytes, all of them NaN, aligned as torch's is.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    if (bytes == 0) return;
    if (posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0) std::abort();
    std::memset(data_, 0xFF, static_cast<size_t>(bytes));
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

void topk_scores(const TopkParams& p) {
  const Memory workspace(cuda::topk_scores_workspace(p));
  cuda::topk_scores_fwd(p, workspace.as<void>(), nullptr);
}

int64_t gather_sort(const WeightedGatherParams& p) {
  const int64_t count = p.outputs * p.picks;
  const int bits = gather_position_bits(p);
  std::vector<uint64_t> words(static_cast<size_t>(count));
  int64_t different = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = p.indices[i];
    words[static_cast<size_t>(i)] = static_cast<uint64_t>(slot < 0 ? p.slots : slot) << bits | static_cast<uint64_t>(i);
  }
  std::sort(words.begin(), words.end());
  uint64_t previous = ~uint64_t(0);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t slot = words[static_cast<size_t>(i)] >> bits;
    different += slot != previous && slot < static_cast<uint64_t>(p.slots);
    previous = slot;
    p.sorted[i] = words[static_cast<size_t>(i)];
  }
  return different;
}

template <class R>
void sum_segments(WeightedGatherParams p, const std::vector<int64_t>& slots, const std::vector<int64_t>& order,
                  const std::vector<int64_t>* ranks) {
  cuda::GatherSegments segments;
  segments.entries = p.outputs * p.picks;
  segments.slots = slots.data();
  segments.order = order.data();
  segments.ranks = ranks ? ranks->data() : nullptr;
  const Memory partial(2 * cuda::segment_chunks(segments.entries) * p.value_size * static_cast<int64_t>(sizeof(R)));
  p.partial_sums = partial.as<void>();
  cuda::weighted_gather_sums(p, segments, nullptr);
}

void gather_bwd(const WeightedGatherParams& p) {
  if (p.grad_weights) cuda::weighted_gather_dots(p, nullptr);
  if (!p.grad_values && !p.grad_rows) return;
  const auto count = static_cast<size_t>(p.outputs * p.picks);
  const int bits = gather_position_bits(p);
  std::vector<int64_t> slots(count), order(count), ranks(count);
  int64_t different = 0;
  for (size_t i = 0; i < count; ++i) {
    slots[i] = static_cast<int64_t>(p.sorted[i] >> bits);
    order[i] = static_cast<int64_t>(p.sorted[i] & ((uint64_t(1) << bits) - 1));
    const bool begins = slots[i] < p.slots && (i == 0 || slots[i - 1] != slots[i]);
    if (begins && p.grad_rows) p.grad_rows[different] = slots[i];
    different += begins;
    ranks[i] = different - 1;
  }
  const auto* numbers = p.grad_rows ? &ranks : nullptr;
  if (p.values_dtype == DType::kFloat64)
    sum_segments<double>(p, slots, order, numbers);
  else
    sum_segments<float>(p, slots, order, numbers);
}

// One slot is used all the time, most others once: chunks that one slot fills, and one that begins and ends in many.
std::string check_skewed_use(int64_t uses) {
  native::Random random(static_cast<uint64_t>(uses));
  const int64_t N = 50, D = 6;
  WeightedGatherParams p;
  p.outputs = uses;
  p.picks = 1;
  p.slots = N;
  p.value_size = D;
  std::vector<int64_t> indices(static_cast<size_t>(uses));
  std::vector<float> weights(static_cast<size_t>(uses)), grad(static_cast<size_t>(uses * D)), found, other;
  std::vector<float> wanted(static_cast<size_t>(N * D));
  for (int64_t i = 0; i < uses; ++i) {
    const int64_t slot = random.chance(80) ? 17 : random.below(N + 1) - 1;
    indices[static_cast<size_t>(i)] = slot;
    weights[static_cast<size_t>(i)] = static_cast<float>(random.below(3) - 1);
    for (int64_t d = 0; d < D; ++d) {
      const auto g = static_cast<float>(random.below(9) - 4);
      grad[static_cast<size_t>(i * D + d)] = g;
      if (slot >= 0) wanted[static_cast<size_t>(slot * D + d)] += weights[static_cast<size_t>(i)] * g;
    }
  }
  p.indices = indices.data();
  p.weights = weights.data();
  p.grad_out = grad.data();
  std::vector<uint64_t> sorted(static_cast<size_t>(uses));
  p.sorted = sorted.data();
  gather_sort(p);
  found.assign(static_cast<size_t>(N * D), 0);
  p.grad_values = found.data();
  gather_bwd(p);
  return found == wanted ? "" : "sums of " + std::to_string(uses) + " uses, most of one slot";
}

// A table in int8, whose rows are aligned to 16 bytes or not; all numbers are exact.
std::string check_int8(int64_t size) {
  constexpr int64_t B = 3, K = 4, N = 9;
  native::Random random(static_cast<uint64_t>(size));
  alignas(16) int8_t values[N * 32];
  float scales[N], weights[B * K], grad[B * 32], out[B * 32], dots[B * K];
  int64_t indices[B * K];
  for (int8_t& x : values) x = static_cast<int8_t>(random.below(11) - 5);
  for (float& x : scales) x = random.chance(50) ? 0.5f : 2.0f;
  for (float& x : weights) x = static_cast<float>(random.below(5) - 2);
  for (float& x : grad) x = static_cast<float>(random.below(5) - 2);
  for (int64_t& x : indices) x = random.below(N + 1) - 1;
  WeightedGatherParams p;
  p.outputs = B;
  p.picks = K;
  p.slots = N;
  p.value_size = size;
  p.indices = indices;
  p.weights = weights;
  p.values = values;
  p.values_stride[0] = size;
  p.values_stride[1] = 1;
  p.values_dtype = DType::kInt8;
  p.scales = scales;
  p.out = out;
  cuda::weighted_gather_fwd(p, nullptr);
  p.grad_out = grad;
  p.grad_weights = dots;
  cuda::weighted_gather_dots(p, nullptr);
  for (int64_t b = 0; b < B; ++b) {
    float sums[32] = {};
    for (int64_t k = 0; k < K; ++k) {
      const int64_t slot = indices[b * K + k];
      float dot = 0;
      for (int64_t d = 0; slot >= 0 && d < size; ++d) {
        const float x = scales[slot] * values[slot * size + d];
        sums[d] += weights[b * K + k] * x;
        dot += grad[b * size + d] * x;
      }
      if (dots[b * K + k] != dot) return "int8, gradient of a weight";
    }
    for (int64_t d = 0; d < size; ++d)
      if (out[b * size + d] != sums[d]) return "int8, sum of rows of " + std::to_string(size);
  }
  return "";
}

// A number as `dtype` holds it.
void store(void* data, DType dtype, int64_t at, int value) {
  const auto x = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[at] = value;
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[at] = x;
      return;
    case DType::kInt8:
      static_cast<int8_t*>(data)[at] = static_cast<int8_t>(value);
      return;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[at] = to_bfloat16(x);
      return;
    default:
      static_cast<uint16_t*>(data)[at] = to_float16(x);
  }
}

// One kernel of topk_scores for each pair of types, plan and kind of rows. Numbers are small integers, so all is exact.
std::string check_topk_kernel(DType queries, DType keys, int64_t B, int64_t k, bool aligned) {
  const int64_t N = k + 90, D = 23, stride = aligned ? 32 : 25;
  native::Random random(static_cast<uint64_t>(B * 1000 + k));
  const Memory query(B * D * 8), table(N * stride * 8), scores(B * k * 8), indices(B * k * 8);
  std::vector<float> scales(static_cast<size_t>(N));
  std::vector<int> x(static_cast<size_t>(B * D)), y(static_cast<size_t>(N * D));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<int>(random.below(7)) - 3;
    store(query.as<void>(), queries, static_cast<int64_t>(i), x[i]);
  }
  for (int64_t n = 0; n < N; ++n) {
    scales[static_cast<size_t>(n)] = random.chance(50) ? -0.5f : 2.0f;  // so that both zeros occur
    for (int64_t d = 0; d < D; ++d) {
      const int value = static_cast<int>(random.below(7)) - 3;
      y[static_cast<size_t>(n * D + d)] = value;
      store(table.as<void>(), keys, n * stride + d, value);
    }
  }
  TopkParams p;
  p.queries = B;
  p.slots = N;
  p.size = D;
  p.count = k;
  p.query.data = query.as<void>();
  p.query.dtype = queries;
  p.query.stride[2] = D;
  p.query.stride[3] = 1;
  p.keys.data = table.as<void>();
  p.keys.dtype = keys;
  p.keys.stride[2] = stride;
  p.keys.stride[3] = 1;
  if (keys == DType::kInt8) p.key_scales = scales.data();
  p.scores = scores.as<void>();
  p.indices = indices.as<int64_t>();
  topk_scores(p);
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> wanted(static_cast<size_t>(N));
    std::vector<int64_t> order(static_cast<size_t>(N));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t n = 0; n < N; ++n) {
      int64_t sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += x[static_cast<size_t>(b * D + d)] * y[static_cast<size_t>(n * D + d)];
      wanted[static_cast<size_t>(n)] =
          static_cast<double>(sum) * (keys == DType::kInt8 ? scales[static_cast<size_t>(n)] : 1.0);
    }
    const auto score = [&](int64_t n) { return wanted[static_cast<size_t>(n)]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return score(i) > score(j); });
    for (int64_t i = 0; i < k; ++i) {
      const int64_t best = order[static_cast<size_t>(i)], at = b * k + i;
      const double found = keys == DType::kFloat64 ? scores.as<double>()[at] : scores.as<float>()[at];
      if (p.indices[at] != best || found != score(best)) {
        return "topk of types " + std::to_string(static_cast<int>(queries)) + " and " +
               std::to_string(static_cast<int>(keys)) + ", B=" + std::to_string(B) + ", k=" + std::to_string(k) +
               ": place " + std::to_string(i) + " of query " + std::to_string(b);
      }
    }
  }
  return "";
}

// The merge of two halves in double precision, against all pairs.
std::string check_product_keys() {
  constexpr int64_t C = 4, K = 7, kSide = 10;
  const double scores[2][C] = {{5, 3, 3, -1}, {4, 2, 1, 1}};
  const int64_t indices[2][C] = {{8, 2, 6, 0}, {1, 9, 3, 4}};
  int64_t slots[K], ranks[2][K];
  ProductKeysParams p;
  p.rows = 1;
  p.candidates = C;
  p.picks = K;
  p.side = kSide;
  p.dtype = DType::kFloat64;
  p.slots = slots;
  for (int i = 0; i < 2; ++i) {
    p.scores[i] = scores[i];
    p.indices[i] = indices[i];
    p.ranks[i] = ranks[i];
  }
  cuda::product_keys(p, nullptr);
  struct Pair {
    double score;
    int64_t slot, row, column;
  };
  std::vector<Pair> pairs;
  for (int64_t i = 0; i < C; ++i)
    for (int64_t j = 0; j < C; ++j)
      pairs.push_back({scores[0][i] + scores[1][j], indices[0][i] * kSide + indices[1][j], i, j});
  std::sort(pairs.begin(), pairs.end(),
            [](const Pair& a, const Pair& b) { return a.score != b.score ? a.score > b.score : a.slot < b.slot; });
  for (size_t k = 0; k < K; ++k)
    if (slots[k] != pairs[k].slot || ranks[0][k] != pairs[k].row || ranks[1][k] != pairs[k].column)
      return "product keys in double, pick " + std::to_string(k);
  return "";
}

// ThreadSanitizer makes a fiber in a millisecond. These have each plan of topk_scores with lists that fill up, its
// merge, outputs that several teams share, and slots over several chunks.
bool worth_its_time([[maybe_unused]] int64_t number) {
#if defined(__SANITIZE_THREAD__)
  for (const int64_t chosen : {2, 4, 16, 19, 129, 700})
    if (number == chosen) return true;
  return false;
#else
  return true;
#endif
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast;
  using namespace attnfast::simt;
#if defined(__SANITIZE_ADDRESS__)
  const Cases cases = cases_of(count, arguments, 30, 30);
#else
  const Cases cases = cases_of(count, arguments, 100, 30);
#endif
  int64_t ran = 0;
  KernelTable kernels{};
  kernels.name = "simt";
  kernels.topk_scores_fwd = topk_scores;
  kernels.weighted_gather_fwd = [](const WeightedGatherParams& p) { cuda::weighted_gather_fwd(p, nullptr); };
  kernels.weighted_gather_sort = gather_sort;
  kernels.weighted_gather_bwd = gather_bwd;
  kernels.product_keys = [](const ProductKeysParams& p) { cuda::product_keys(p, nullptr); };
  std::vector<int64_t> numbers(static_cast<size_t>(cases.count));
  std::iota(numbers.begin(), numbers.end(), cases.first);
  // Kernels that the first hundred do not reach.
  if (count == 1) numbers.insert(numbers.end(), {120, 189, 210, 244, 253});
  for (const int64_t number : numbers) {
    if (count == 1 && !worth_its_time(number)) continue;
    ++ran;
    g_number = number;
    for (const auto check : {native::check_topk, native::check_gather_unreported}) {
      std::string error;
      const std::string report = reported([&] { error = check(kernels, number, 2, use_schedule); });
      expect(error.empty() && report.empty(), "case " + std::to_string(number) + ": " + error + report);
    }
  }
  for (const int64_t uses : {1, 63, 64, 65, 128, 129, 700, 3000}) {
    if (count == 1 && !worth_its_time(uses)) continue;
    g_number = uses;
    use_schedule(0);
    std::string error;
    const std::string report = reported([&] { error = check_skewed_use(uses); });
    expect(error.empty() && report.empty(), error + report);
  }
  use_schedule(1);
  for (const int64_t size : {5, 32}) {
    std::string error;
    const std::string report = reported([&] { error = check_int8(size); });
    expect(error.empty() && report.empty(), error + report);
  }
  constexpr DType kTypes[][2] = {
      {DType::kFloat64, DType::kFloat64},  {DType::kFloat32, DType::kFloat32}, {DType::kBFloat16, DType::kBFloat16},
      {DType::kFloat16, DType::kFloat16},  {DType::kFloat32, DType::kInt8},    {DType::kFloat32, DType::kBFloat16},
      {DType::kBFloat16, DType::kFloat16},
  };
  for (const auto& [queries, keys] : kTypes)
    for (const bool aligned : {true, false})
      for (const auto& [B, k] : {std::pair<int64_t, int64_t>{2, 3}, {5, 70}, {33, 60}}) {
        ++g_number;
        use_schedule(0);
        std::string error;
        const std::string report = reported([&] { error = check_topk_kernel(queries, keys, B, k, aligned); });
        expect(error.empty() && report.empty(), error + report);
      }
  std::string error;
  const std::string report = reported([&] { error = check_product_keys(); });
  expect(error.empty() && report.empty(), error + report);
  return finish("memory", ran);
}
