// Random calls of the weighted gather, its backward, and the merge of product keys. Operands are small integers, whose
// products and sums are exact in every type that holds them: results are compared bit for bit.
#include "gather.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "problem.h"

namespace attnfast::native {
namespace {

std::string check_rows(const KernelTable& kernels, Random& random, int threads, void (*use_threads)(int threads),
                       bool reports) {
  const DType dtype =
      random.pick({DType::kFloat64, DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  const DType real = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const int64_t B = random.below(random.chance(30) ? 700 : 40), K = random.below(random.chance(80) ? 20 : 300);
  const int64_t N = 1 + random.below(random.chance(50) ? 4 : 3000), D = random.below(random.chance(70) ? 40 : 300);
  const Layout layout = random.pick({Layout::kContiguous, Layout::kStridedLast});
  HostTensor values(dtype, {1, 1, N, D}, layout), weights(real, {1, 1, B, K}), grad(real, {1, 1, B, D});
  const auto fill = [&](HostTensor& x, int64_t bound) {
    for (int64_t i = 0; i < x.size(2); ++i)
      for (int64_t j = 0; j < x.size(3); ++j) x.set(0, 0, i, j, double(random.below(2 * bound + 1) - bound));
  };
  fill(values, 2);
  fill(weights, 1);
  fill(grad, 2);
  const int64_t count = B * K;
  const std::unique_ptr<int64_t[]> indices(new int64_t[size_t(count)]);
  for (int64_t i = 0; i < count; ++i) indices[size_t(i)] = random.below(N + 1) - (random.chance(90) ? 0 : 1);
  for (int64_t i = 0; i < count; ++i)
    if (indices[size_t(i)] == N) indices[size_t(i)] = -1;
  // Half types hold the integers of a sum up to 256 exactly; larger sums only have to be the same on all threads.
  std::vector<double> out(static_cast<size_t>(B * D)), by_weight(static_cast<size_t>(count)),
      by_value(static_cast<size_t>(N * D));
  std::vector<char> occurs(static_cast<size_t>(N));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = i / K, n = indices[size_t(i)];
    if (n < 0) continue;
    occurs[size_t(n)] = 1;
    for (int64_t d = 0; d < D; ++d) {
      const double w = weights.get(0, 0, b, i % K), v = values.get(0, 0, n, d), g = grad.get(0, 0, b, d);
      out[size_t(b * D + d)] += w * v;
      by_weight[size_t(i)] += v * g;
      by_value[size_t(n * D + d)] += w * g;
    }
  }
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < N; ++n)
    if (occurs[size_t(n)]) rows.push_back(n);
  const std::string about = "gather B=" + std::to_string(B) + " K=" + std::to_string(K) + " N=" + std::to_string(N) +
                            " D=" + std::to_string(D) + " dtype=" + std::to_string(static_cast<int>(dtype)) + ": ";
  const auto same = [&](DType type, double got, double want) {
    return got == want || (type != real && (want > 256 || want < -256));
  };

  WeightedGatherParams p;
  int64_t bad = std::numeric_limits<int64_t>::max();
  p.outputs = B;
  p.picks = K;
  p.slots = N;
  p.value_size = D;
  p.indices = indices.get();
  p.weights = weights.view().data;
  p.values = values.view().data;
  p.values_dtype = dtype;
  p.values_stride[0] = values.view().stride[2];
  p.values_stride[1] = values.view().stride[3];
  p.bad_position = &bad;
  p.grad_out = grad.view().data;
  const int64_t chunks = (count + kGatherChunk - 1) / kGatherChunk;
  for (int used : {1, threads}) {
    use_threads(used);
    HostTensor result(random.chance(50) ? real : DType::kFloat32 == real ? DType::kBFloat16 : real, {1, 1, B, D});
    p.out = result.data();
    p.out_dtype = result.view().dtype;
    kernels.weighted_gather_fwd(p);
    for (int64_t i = 0; i < B * D; ++i)
      if (!same(p.out_dtype, result.get(0, 0, i / D, i % D), out[size_t(i)])) return about + "out";

    const std::unique_ptr<uint64_t[]> sorted(new uint64_t[size_t(2 * count)]);
    const std::unique_ptr<int64_t[]> starts(new int64_t[size_t(chunks + 1)]);
    const std::unique_ptr<double[]> partial(new double[size_t(2 * chunks * D)]);
    p.sorted = sorted.get();
    p.chunk_starts = starts.get();
    p.partial_sums = partial.get();
    const int64_t different = kernels.weighted_gather_sort(p);
    if (different != static_cast<int64_t>(rows.size())) return about + "number of slots";
    if (bad != std::numeric_limits<int64_t>::max()) return about + "an index was called bad";
    for (int form = 0; form < 3; ++form) {  // sparse, dense, weights alone
      HostTensor sums(dtype, {1, 1, form == 0 ? different : N, D}), grad_weights(real, {1, 1, B, K});
      const std::unique_ptr<int64_t[]> numbers(new int64_t[size_t(different)]);
      for (int64_t n = 0; n < sums.size(2); ++n)
        for (int64_t d = 0; d < D; ++d) sums.set(0, 0, n, d, 0);
      p.grad_values = form == 2 ? nullptr : sums.data();
      p.grad_rows = form == 0 ? numbers.get() : nullptr;
      p.grad_weights = form == 1 ? nullptr : grad_weights.data();
      kernels.weighted_gather_bwd(p);
      for (int64_t i = 0; i < count && form != 1; ++i)
        if (grad_weights.get(0, 0, i / K, i % K) != by_weight[size_t(i)]) return about + "gradient of the weights";
      for (int64_t at = 0; at < sums.size(2) && form != 2; ++at) {
        const int64_t n = form == 0 ? rows[size_t(at)] : at;
        if (form == 0 && D > 0 && numbers[size_t(at)] != n) return about + "slot numbers";
        for (int64_t d = 0; d < D; ++d)
          if (!same(dtype, sums.get(0, 0, at, d), by_value[size_t(n * D + d)])) return about + "gradient of the values";
      }
    }
  }
  if (count > 0) {
    const int64_t wrong = random.below(count), right = indices[size_t(wrong)];
    indices[size_t(wrong)] = random.pick<int64_t>({N, -2, std::numeric_limits<int64_t>::min()});
    HostTensor result(real, {1, 1, B, D});
    p.out = result.data();
    p.out_dtype = real;
    kernels.weighted_gather_fwd(p);
    if (reports && bad != wrong && D > 0) return about + "a wrong index was not found";
    for (int64_t d = 0; d < D && !reports; ++d) {
      const int64_t b = wrong / K;
      double want = out[size_t(b * D + d)];
      if (right >= 0) want -= weights.get(0, 0, b, wrong % K) * values.get(0, 0, right, d);
      if (result.get(0, 0, b, d) != want) return about + "a wrong index took part";
    }
  }
  return "";
}

std::string check_pairs(const KernelTable& kernels, Random& random, int threads, void (*use_threads)(int threads)) {
  const int64_t rows = random.below(200), side = 1 + random.below(40), candidates = 1 + random.below(side);
  const int64_t picks = random.below(std::min<int64_t>(candidates, candidates * candidates) + 1);
  const int64_t total = rows * candidates;
  const std::unique_ptr<float[]> scores[2] = {std::unique_ptr<float[]>(new float[size_t(total)]),
                                              std::unique_ptr<float[]>(new float[size_t(total)])};
  const std::unique_ptr<int64_t[]> indices[2] = {std::unique_ptr<int64_t[]>(new int64_t[size_t(total)]),
                                                 std::unique_ptr<int64_t[]>(new int64_t[size_t(total)])};
  for (int half = 0; half < 2; ++half)
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<std::pair<int64_t, int64_t>> all;  // falling score, rising index
      for (int64_t i = 0; i < side; ++i) all.emplace_back(-random.below(4), i);
      std::sort(all.begin(), all.end());
      for (int64_t i = 0; i < candidates; ++i) {
        scores[half][size_t(row * candidates + i)] = float(-all[size_t(i)].first);
        indices[half][size_t(row * candidates + i)] = all[size_t(i)].second;
      }
    }
  ProductKeysParams p;
  p.rows = rows;
  p.candidates = candidates;
  p.picks = picks;
  p.side = side;
  for (int half = 0; half < 2; ++half) {
    p.scores[half] = scores[half].get();
    p.indices[half] = indices[half].get();
  }
  for (int used : {1, threads}) {
    use_threads(used);
    const std::unique_ptr<int64_t[]> slots(new int64_t[size_t(rows * picks)]);
    const std::unique_ptr<int64_t[]> first(new int64_t[size_t(rows * picks)]);
    const std::unique_ptr<int64_t[]> second(new int64_t[size_t(rows * picks)]);
    p.slots = slots.get();
    p.ranks[0] = first.get();
    p.ranks[1] = second.get();
    kernels.product_keys(p);
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<std::pair<float, int64_t>> all;
      for (int64_t i = 0; i < candidates; ++i)
        for (int64_t j = 0; j < candidates; ++j) {
          const size_t a = size_t(row * candidates + i), b = size_t(row * candidates + j);
          all.emplace_back(-(scores[0][a] + scores[1][b]), indices[0][a] * side + indices[1][b]);
        }
      std::sort(all.begin(), all.end());
      for (int64_t i = 0; i < picks; ++i)
        if (slots[size_t(row * picks + i)] != all[size_t(i)].second)
          return "product keys n=" + std::to_string(side) + " candidates=" + std::to_string(candidates) +
                 " k=" + std::to_string(picks) + ": pick " + std::to_string(i) + " of row " + std::to_string(row);
    }
  }
  return "";
}

}  // namespace

std::string check_gather(const KernelTable& kernels, int64_t number, int threads, void (*use_threads)(int threads)) {
  Random random(static_cast<uint64_t>(number) * 2 + 5001);
  const std::string wrong = check_rows(kernels, random, threads, use_threads, true);
  return wrong.empty() ? check_pairs(kernels, random, threads, use_threads) : wrong;
}

std::string check_gather_unreported(const KernelTable& kernels, int64_t number, int threads,
                                    void (*use_threads)(int threads)) {
  Random random(static_cast<uint64_t>(number) * 2 + 5001);
  const std::string wrong = check_rows(kernels, random, threads, use_threads, false);
  return wrong.empty() ? check_pairs(kernels, random, threads, use_threads) : wrong;
}

}  // namespace attnfast::native
