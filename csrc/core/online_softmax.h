// The running state of a softmax row in base 2, and how two states merge.
// sum == 0 means "nothing visible yet"; the maximum then carries no information.
#pragma once

#include "host_device.h"

namespace attnfast {

constexpr double kLog2e = 1.4426950408889634074;

// scale * log2(e) in two factors: a power of two that queries are multiplied with when they are packed, which rounds
// nothing and keeps products in range, and the rest, applied to finished scores in the one rounding of an FMA.
struct ScoreScale {
  double query, score;
};
ATTNFAST_HD ScoreScale score_scale(double scale) {
  double base2 = scale * kLog2e, size = base2 < 0 ? -base2 : base2;
  if (!(size >= 0x1p-120 && size <= 0x1p120)) return {1.0, base2};
  double power = 1.0;
  while (power > size) power *= 0.5;
  while (power * 2.0 <= size) power *= 2.0;
  return {power, base2 / power};
}

ATTNFAST_HD float exp2_real(float x) { return __builtin_exp2f(x); }
ATTNFAST_HD double exp2_real(double x) { return __builtin_exp2(x); }
ATTNFAST_HD float log2_real(float x) { return __builtin_log2f(x); }
ATTNFAST_HD double log2_real(double x) { return __builtin_log2(x); }
// maximum + log2(sum): the terms often cancel, so they are added in double and rounded once.
template <class R>
ATTNFAST_HD R lse_of(R maximum, R sum) {
  return R(double(maximum) + __builtin_log2(double(sum)));
}

template <class R>
struct SoftmaxState {
  R maximum, sum;
};

// Result of closing a row: what its accumulated output is multiplied by, and its log2-sum-exp2.
template <class R>
struct SoftmaxResult {
  R output_scale, lse;
};

// The sink is one more logit (base 2) without a value: it only enlarges the denominator.
template <class R>
ATTNFAST_HD SoftmaxResult<R> close_row(SoftmaxState<R> s, bool has_sink, R sink) {
  if (s.sum == R(0)) return {R(0), has_sink ? sink : -R(__builtin_inf())};
  if (!has_sink || sink == -R(__builtin_inf())) return {R(1) / s.sum, lse_of(s.maximum, s.sum)};
  R m = sink > s.maximum ? sink : s.maximum;
  R scale = exp2_real(s.maximum - m);
  R total = s.sum * scale + exp2_real(sink - m);
  return {scale / total, lse_of(m, total)};
}

}  // namespace attnfast
