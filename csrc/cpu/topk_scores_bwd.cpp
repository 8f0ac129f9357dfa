// The gradient of topk_scores, the choice of slots held fixed: a sum of key rows for each query, and of query rows for
// each chosen slot. Whoever writes a row adds it up alone: a task has some queries, or the slots that begin in its part
// of the list of picks sorted by slot. So each sum has one order, and there are no atomics.
#include "topk_scores.h"

#include "parallel.h"
#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kGradientQueries = 16;     // a task
constexpr int64_t kGradientPositions = 256;  // a task

// sum += factor * row
template <class R, class T>
static void add_row(const T* row, int64_t size, R factor, R* sum) {
  int64_t d = 0;
  for (; d + kLanes<R> <= size; d += kLanes<R>) store(sum + d, load(sum + d) + load_lanes<R>(row + d) * factor);
  for (; d < size; d++) sum[d] += load_one<R>(row + d) * factor;
}

template <class R>
static R* cleared_row(int64_t size) {
  R* sum = static_cast<R*>(scratch(0, size_t(padded<R>(size)) * sizeof(R)));
  for (int64_t d = 0; d < size; d += kLanes<R>) store(sum + d, Vec<R>{});
  return sum;
}

template <class R>
static void query_gradient(const TopkGradientParams& p, int64_t task) {
  visit_dtype<R>(p.keys.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* keys = static_cast<const T*>(p.keys.data);
    const int64_t first = task * kGradientQueries;
    for (int64_t b = first; b < first + kGradientQueries && b < p.queries; b++) {
      R* sum = cleared_row<R>(p.size);
      for (int64_t at = b * p.count; at < (b + 1) * p.count; at++)
        if (p.indices[at] >= 0)
          add_row<R>(keys + p.indices[at] * p.keys.stride[2], p.size, static_cast<const R*>(p.grad_scores)[at], sum);
      store_row<R>(p.grad_query, b * p.grad_query.stride[2], p.size, sum, R(p.scale));
    }
  });
}

// The task owns the slots whose first position in the sorted list is one of its own.
template <class R>
static void key_gradient(const TopkGradientParams& p, int64_t task) {
  visit_dtype<R>(p.query.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* query = static_cast<const T*>(p.query.data);
    const int64_t total = p.queries * p.count, first = task * kGradientPositions;
    const int64_t end = total - first < kGradientPositions ? total : first + kGradientPositions;
    for (int64_t i = first; i < end;) {
      const int64_t slot = p.indices[p.order[i]];
      const bool begun = i > 0 && p.indices[p.order[i - 1]] == slot;
      R* sum = slot < 0 || begun ? nullptr : cleared_row<R>(p.size);
      for (; i < (sum ? total : end) && p.indices[p.order[i]] == slot; i++)
        if (sum)
          add_row<R>(query + p.order[i] / p.count * p.query.stride[2], p.size,
                     static_cast<const R*>(p.grad_scores)[p.order[i]], sum);
      if (sum) store_row<R>(p.grad_keys, slot * p.grad_keys.stride[2], p.size, sum, R(p.scale));
    }
  });
}

template <class R>
static void differentiate(const TopkGradientParams& p) {
  const bool serial = double(p.queries) * double(p.count) * double(p.size) < kSerialProducts / 4;
  auto run = [&](int64_t tasks, void (*task)(void*, int64_t)) {
    parallel_tasks(tasks, serial, task, const_cast<TopkGradientParams*>(&p));
  };
  if (p.grad_query.data)
    run((p.queries + kGradientQueries - 1) / kGradientQueries,
        [](void* context, int64_t task) { query_gradient<R>(*static_cast<const TopkGradientParams*>(context), task); });
  if (p.grad_keys.data)
    run((p.queries * p.count + kGradientPositions - 1) / kGradientPositions,
        [](void* context, int64_t task) { key_gradient<R>(*static_cast<const TopkGradientParams*>(context), task); });
}

}  // namespace

void topk_scores_bwd(const TopkGradientParams& p) {
  if (p.keys.dtype == DType::kFloat64)
    differentiate<double>(p);
  else
    differentiate<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
