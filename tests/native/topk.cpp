// Random calls of topk_scores. Operands are small integers, whose products and sums are exact in every type, and have
// many ties: results are compared bit for bit. Some keys hold NaN or infinity.
#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "problem.h"

namespace attnfast::native {
namespace {

struct Shape {
  int64_t queries, slots, size, count;
};

Shape random_shape(Random& random) {
  Shape s;
  s.queries = random.chance(30)   ? 1 + random.below(4)
              : random.chance(70) ? 5 + random.below(30)
                                  : 35 + random.below(110);
  s.slots = 1 + random.below(random.chance(50) ? 100 : 1500);
  s.size = random.chance(10) ? 100 + random.below(200) : random.below(40);
  if (random.chance(4)) {  // several ranges of slots
    s.queries = 1 + random.below(12);
    s.slots = 33000 + random.below(3000);
    s.size = 1 + random.below(4);
  }
  s.count = 1 + random.below(std::min<int64_t>(s.slots, random.chance(75) ? 64 : 700));
  return s;
}

void fill_integers(HostTensor& x, Random& random, int64_t bound) {
  for (int64_t h = 0; h < x.size(1); ++h)
    for (int64_t i = 0; i < x.size(2); ++i)
      for (int64_t j = 0; j < x.size(3); ++j) x.set(0, h, i, j, double(random.below(2 * bound + 1) - bound));
}

// NaN is the largest score.
bool before(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
  return a > b;
}
bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b; }

// [i][j] of the first head.
std::vector<double> values(const HostTensor& x) {
  std::vector<double> all;
  for (int64_t i = 0; i < x.size(2); ++i)
    for (int64_t j = 0; j < x.size(3); ++j) all.push_back(x.get(0, 0, i, j));
  return all;
}

}  // namespace

std::string check_topk(const KernelTable& kernels, int64_t number, int threads, void (*use_threads)(int threads)) {
  Random random(static_cast<uint64_t>(number) * 2 + 1001);
  const Shape s = random_shape(random);
  const DType dtype =
      random.pick({DType::kFloat64, DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  const DType real = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const DType query_dtype = real == dtype || random.chance(50) ? dtype : DType::kFloat32;
  const Layout layout = random.pick({Layout::kContiguous, Layout::kTokensFirst, Layout::kStridedLast});
  // Tokens first with two heads: rows that lie apart.
  HostTensor query(query_dtype, {1, 1, s.queries, s.size}, layout);
  HostTensor keys(dtype, {1, random.chance(30) ? 2 : 1, s.slots, s.size}, Layout::kTokensFirst);
  fill_integers(query, random, 3);
  fill_integers(keys, random, 3);
  if (random.chance(20) && s.size > 0)
    for (int64_t i = 0; i < 4; ++i)
      keys.set(0, 0, random.below(s.slots), random.below(s.size), random.chance(50) ? NAN : INFINITY);
  HostTensor mask;
  const int masking = static_cast<int>(random.below(4));  // none, none, one for all queries, one each
  if (masking > 1) {
    mask = HostTensor(DType::kBool, {1, 1, masking == 2 ? 1 : s.queries, s.slots});
    const int share = random.pick({1, 40, 97});
    for (int64_t b = 0; b < mask.size(2); ++b)
      for (int64_t n = 0; n < s.slots; ++n) mask.set(0, 0, b, n, random.chance(share) ? 1 : 0);
  }
  const double scale = random.pick({1.0, -0.5, 2.0});

  const int64_t total = s.queries * s.count;
  HostTensor expected(real, {1, 1, s.queries, s.count});
  std::vector<int64_t> expected_indices(static_cast<size_t>(total), -1);
  const std::vector<double> queries = values(query), rows = values(keys);
  for (int64_t b = 0; b < s.queries; ++b) {
    std::vector<double> scores(static_cast<size_t>(s.slots));
    std::vector<int64_t> order;
    for (int64_t n = 0; n < s.slots; ++n) {
      double sum = 0;
      const double *x = queries.data() + b * s.size, *y = rows.data() + n * s.size;
      for (int64_t d = 0; d < s.size; ++d) sum += scale * x[d] * y[d];
      scores[static_cast<size_t>(n)] = sum;
      if (!mask || mask.get(0, 0, mask.size(2) == 1 ? 0 : b, n) != 0) order.push_back(n);
    }
    const auto score = [&](int64_t n) { return scores[static_cast<size_t>(n)]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return before(score(x), score(y)); });
    for (int64_t i = 0; i < s.count; ++i) {
      const bool there = i < static_cast<int64_t>(order.size());
      expected.set(0, 0, b, i, there ? score(order[static_cast<size_t>(i)]) : -INFINITY);
      if (there) expected_indices[static_cast<size_t>(b * s.count + i)] = order[static_cast<size_t>(i)];
    }
  }

  const std::string about = "topk B=" + std::to_string(s.queries) + " N=" + std::to_string(s.slots) +
                            " D=" + std::to_string(s.size) + " k=" + std::to_string(s.count) +
                            " dtype=" + std::to_string(static_cast<int>(dtype)) + " mask=" + std::to_string(masking);
  TopkParams p;
  p.queries = s.queries;
  p.slots = s.slots;
  p.size = s.size;
  p.count = s.count;
  p.query = query.view();
  p.keys = keys.view();
  if (mask) p.mask = mask.view();
  p.scale = scale;
  p.native_bf16 = kernels.native_bf16;
  for (int n : {1, threads}) {
    HostTensor found(real, {1, 1, s.queries, s.count});
    const std::unique_ptr<int64_t[]> indices(new int64_t[static_cast<size_t>(total)]);
    p.scores = found.data();
    p.indices = indices.get();
    p.threads = n;
    use_threads(n);
    kernels.topk_scores_fwd(p);
    for (int64_t i = 0; i < total; ++i) {
      const double x = found.get(0, 0, i / s.count, i % s.count), y = expected.get(0, 0, i / s.count, i % s.count);
      if (!same(x, y) || indices[static_cast<size_t>(i)] != expected_indices[static_cast<size_t>(i)])
        return about + ": place " + std::to_string(i) + " holds " + std::to_string(x) + " of slot " +
               std::to_string(indices[static_cast<size_t>(i)]) + ", not " + std::to_string(y) + " of " +
               std::to_string(expected_indices[static_cast<size_t>(i)]) + " (" + std::to_string(n) + " threads)";
    }
  }
  return "";
}

}  // namespace attnfast::native
