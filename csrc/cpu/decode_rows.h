// What kernels of one query per head share: rows of keys and values are read where they lie, dimensions in lanes, half
// types widened in registers; biases and masks become one addend per key.
#pragma once

#include "score_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// Keys, then their values: long runs of one stream. The processor's own prefetcher follows them; prefetching by hand
// cost up to a third of the speed.
constexpr int64_t kDecodeChunk = 512;

// Calls f(R{}, T{}) with the stored type T of a floating dtype and the type R of its arithmetic; false for the others.
template <class F>
bool visit_arithmetic(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      f(double{}, double{});
      return true;
    case DType::kFloat32:
      f(float{}, float{});
      return true;
    case DType::kBFloat16:
      f(float{}, BFloat16{});
      return true;
    case DType::kFloat16:
      f(float{}, Float16{});
      return true;
    default:
      return false;
  }
}

// Base-2 addends of n <= kDecodeChunk keys of the query at position 0, -inf where masked; false if the call has none.
// Both arrays hold whole vectors; what is added past the last key is 0. Each addend is rounded before it is added, as
// in tiles.
template <class R>
bool load_addends(const HeadContext& c, int64_t k0, int n, R* row, R* add) {
  const AttentionParams& p = *c.p;
  if (!has_addend(p) && !p.mask.data) return false;
  constexpr R kLowest = std::is_same_v<R, double> ? R(-__DBL_MAX__) : R(-__FLT_MAX__);
  R slope =
      p.alibi_slopes
          ? static_cast<const R*>(p.alibi_slopes)[c.s.batch * p.alibi_stride[0] + c.h * p.alibi_stride[1]] * R(kLog2e)
          : R(0);
  for (int i = 0; i < n; i++) {
    int64_t distance = c.band.offset - (k0 + i);
    add[i] = -slope * R(distance < 0 ? -distance : distance);
  }
  for (int64_t i = n; i < padded<R>(n); i++) add[i] = R(0);
  for (const Tensor4& bias : p.bias)
    if (bias.data) {
      load_rows<R>(bias, offset4(bias, c.s.tensor_batch, c.h, 0, k0), 1, n, row, kDecodeChunk);
      for (int i = 0; i < n; i += kLanes<R>) {
        Vec<R> x = load(row + i), before = load(add + i), sum = before + rounded<R>(x * R(kLog2e));
        // A finite bias stays finite (finfo.min is a number); -inf masks.
        Vec<R> finite = sum < kLowest ? splat(kLowest) : sum;
        store(add + i, x == -infinity<R>() ? x : before == -infinity<R>() ? before : finite);
      }
    }
  if (p.mask.data) {
    load_rows<R>(p.mask, offset4(p.mask, c.s.tensor_batch, c.h, 0, k0), 1, n, row, kDecodeChunk);
    for (int i = 0; i < n; i++)
      if (row[i] == R(0)) add[i] = -infinity<R>();
  }
  return true;
}

// Rows of n elements in whole vectors and a rest.
template <class R>
struct Extent {
  int64_t whole;
  int rest;
  explicit Extent(int64_t n) : whole(n / kLanes<R> * kLanes<R>), rest(int(n - whole)) {}
};

template <class R, class T>
ATTNFAST_INLINE Vec<R> partial_dot(const T* k, const R* query, Extent<R> depth) {
  Vec<R> a{};
  for (int64_t d = 0; d < depth.whole; d += kLanes<R>) a += load_as<R>(k + d) * load(query + d);
  if (depth.rest) a += load_partial<R>(k + depth.whole, depth.rest) * load(query + depth.whole);
  return a;
}

// out += weight * v
template <class R, class T>
ATTNFAST_INLINE void add_scaled(const T* v, R weight, R* out, Extent<R> width) {
  for (int64_t x = 0; x < width.whole; x += kLanes<R>) store(out + x, load(out + x) + load_as<R>(v + x) * weight);
  if (width.rest) {
    R* last = out + width.whole;
    store(last, load(last) + load_partial<R>(v + width.whole, width.rest) * weight);
  }
}

// out += sum of weight[i] * row i of v, but for the rows whose addend is -inf, which may hold NaN. add: null if no row
// is masked.
template <class R, class T>
ATTNFAST_INLINE void add_weighted_rows(const T* v, int64_t stride, int n, const R* weight, const R* add,
                                       Extent<R> width, R* out) {
  constexpr int N = kLanes<R>;
  int i = 0;
  if (!add)
    for (; i + 4 <= n; i += 4) {
      const T *a = v + i * stride, *b = a + stride, *d = b + stride, *e = d + stride;
      for (int64_t x = 0; x < width.whole; x += N) {
        Vec<R> left = load_as<R>(a + x) * weight[i] + load_as<R>(b + x) * weight[i + 1];
        Vec<R> right = load_as<R>(d + x) * weight[i + 2] + load_as<R>(e + x) * weight[i + 3];
        store(out + x, load(out + x) + (left + right));
      }
      if (width.rest) {
        int64_t x = width.whole;
        Vec<R> left =
            load_partial<R>(a + x, width.rest) * weight[i] + load_partial<R>(b + x, width.rest) * weight[i + 1];
        Vec<R> right =
            load_partial<R>(d + x, width.rest) * weight[i + 2] + load_partial<R>(e + x, width.rest) * weight[i + 3];
        store(out + x, load(out + x) + (left + right));
      }
    }
  for (; i < n; i++) {
    if (add && add[i] == -infinity<R>()) continue;
    add_scaled<R>(v + i * stride, weight[i], out, width);
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
