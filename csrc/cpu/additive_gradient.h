// The parts of dQ, dw and d score_bias that tasks of the additive backward leave, and their sums in order.
#pragma once

#include "../core/masks.h"
#include "parallel.h"
#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// What all tasks share. A task takes one of `splits` ranges of the keys of a head.
template <class R>
struct GradientParts {
  const AdditiveAttentionParams* p;
  int64_t depth_pad, value_pad, splits, rows_total;
  R* partial_query;   // [splits][rows][D], only if splits > 1
  R* partial_weight;  // [B][H][splits][2][D]: dw and d score_bias

  R* query_part(int64_t split, int64_t row) const { return partial_query + (split * rows_total + row) * depth_pad; }
  R* weight_part(int64_t b, int64_t h, int64_t split) const {
    return partial_weight + ((b * p->heads + h) * splits + split) * 2 * depth_pad;
  }
};

template <class R>
void place_parts(GradientParts<R>& f) {
  int64_t query_floats = f.splits > 1 ? f.splits * f.rows_total * f.depth_pad : 0;
  int64_t weight_floats = f.p->batch * f.p->heads * f.splits * 2 * f.depth_pad;
  f.partial_query = static_cast<R*>(scratch(1, size_t(query_floats + weight_floats) * sizeof(R)));
  f.partial_weight = f.partial_query + query_floats;
}

template <class R>
void merge_query_row(const GradientParts<R>& f, int64_t row) {
  const AdditiveAttentionParams& p = *f.p;
  int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  R* sum = static_cast<R*>(scratch(0, size_t(f.depth_pad) * sizeof(R)));
  for (int64_t d = 0; d < f.depth_pad; d += kLanes<R>) {
    Vec<R> x{};
    for (int64_t i = 0; i < f.splits; i++) x += load(f.query_part(i, row) + d);
    store(sum + d, x);
  }
  store_row<R>(p.grad_query, offset4(p.grad_query, b, h, q, 0), p.head_size, sum, R(1));
}

// dw (part 0) or d score_bias (part 1), times `factor`.
template <class R>
void merge_weights(const GradientParts<R>& f, int part, bool by_head, R factor, R* out) {
  const AdditiveAttentionParams& p = *f.p;
  double* sum = static_cast<double*>(scratch(0, size_t(f.depth_pad) * sizeof(double)));
  for (int64_t row = 0; row < (by_head ? p.heads : 1); row++) {
    for (int64_t d = 0; d < p.head_size; d++) sum[d] = 0;
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t h = by_head ? row : 0; h < (by_head ? row + 1 : p.heads); h++)
        for (int64_t i = 0; i < f.splits; i++) {
          const R* x = f.weight_part(b, h, i) + part * f.depth_pad;
          for (int64_t d = 0; d < p.head_size; d++) sum[d] += double(x[d]);
        }
    for (int64_t d = 0; d < p.head_size; d++) out[row * p.head_size + d] = R(sum[d]) * factor;
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
