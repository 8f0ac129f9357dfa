// How far a kernel under the emulator may be from its definition in double precision, and where it is further.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "check.h"
#include "native/oracle.h"
#include "native/problem.h"

namespace attnfast::simt {

using native::HostTensor;

// Of the largest element. The half types round weights before the last product, and the output.
inline double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 3e-13;  // scores are scaled to base 2 first
    case DType::kFloat32:
      return 4e-6;
    case DType::kBFloat16:
      return 8e-3;
    default:
      return 1e-3;
  }
}

// The first element of `got` that is further than `relative` of the largest from `wanted`, or "".
inline std::string compare(const char* what, const HostTensor& got, const HostTensor& wanted, double relative) {
  double scale = 1;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t b = 0; b < wanted.size(0); ++b)
      for (int64_t h = 0; h < wanted.size(1); ++h)
        for (int64_t i = 0; i < wanted.size(2); ++i)
          for (int64_t j = 0; j < wanted.size(3); ++j) {
            const double y = wanted.get(b, h, i, j);
            if (pass == 0 && std::isfinite(y)) scale = std::max(scale, std::fabs(y));
            if (pass == 0) continue;
            const double x = got.get(b, h, i, j);
            if (x == y || std::fabs(x - y) <= relative * scale || (std::isnan(x) && std::isnan(y))) continue;
            char text[160];
            std::snprintf(text, sizeof(text), "%s[%d,%d,%d,%d]: %g for %g", what, int(b), int(h), int(i), int(j), x, y);
            return text;
          }
  }
  return "";
}

// The row maximum's argument is a key that has it.
inline std::string check_row_maximum(const native::Config& c, const native::Results& results,
                                     const native::Expected& expected, double relative) {
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.query_tokens; ++i) {
        const int64_t index = results.weights_index[static_cast<size_t>((b * c.heads + h) * c.query_tokens + i)];
        const double largest = expected.weights.get(b, h, i, 0);
        const std::string at = " at row " + std::to_string(i) + ": " + std::to_string(index);
        if (index < -1 || index >= c.key_tokens) return "weights_index out of range" + at;
        if (index == -1 && largest > 0) return "weights_index is -1 for a visible row" + at;
        if (index >= 0 && expected.row_weights.get(b, h, i, index) < largest - 4 * relative) {
          return "weights_index is not the maximum" + at;
        }
      }
  return "";
}

// Every element of a float32 tensor as tf32, by arithmetic: the nearest multiple of the last of its eleven bits' place,
// ties away from zero.
inline void round_to_tf32(HostTensor& tensor) {
  for (int64_t b = 0; b < tensor.size(0); ++b)
    for (int64_t h = 0; h < tensor.size(1); ++h)
      for (int64_t i = 0; i < tensor.size(2); ++i)
        for (int64_t j = 0; j < tensor.size(3); ++j) {
          const double x = tensor.get(b, h, i, j);
          if (x == 0 || !std::isfinite(x)) continue;
          const int place = std::ilogb(x) - 10;
          tensor.set(b, h, i, j, std::ldexp(std::round(std::ldexp(x, -place)), place));
        }
}

// Whether a float32 call that allows tf32 has its operands rounded: what docs/cuda.md says.
inline bool takes_tf32(const native::Config& c) {
  const auto fits = [](int64_t size) { return size > 0 && size <= 256 && size % 4 == 0; };
  return c.dtype == DType::kFloat32 && fits(c.head_size) && fits(c.value_size) &&
         c.layout != native::Layout::kStridedLast;
}

// A float32 call for the emulator as one that may take tf32, most of them in a shape that does.
inline native::Config with_tf32_sizes(native::Random& random, native::Config c) {
  c.dtype = DType::kFloat32;
  if (random.chance(80)) {
    c.head_size = random.pick<int64_t>({4, 20, 64, 68, 128, 132, 256});
    c.value_size = random.chance(70) ? c.head_size : random.pick<int64_t>({4, 36, 64, 100, 252});
    if (c.sequences > 0) c.head_size = c.value_size = random.pick<int64_t>({4, 20, 36, 68});  // many tokens
  }
  if (random.chance(80) && c.layout == native::Layout::kStridedLast) c.layout = native::Layout::kTokensFirst;
  return c;
}

// Random calls: `draw(random)` is the configuration of one, `check(problem, number)` runs it and says what went wrong.
template <class Draw, class Check>
void run_cases(const Cases& cases, Draw draw, Check check) {
  for (int64_t number = cases.first; number < cases.first + cases.count; ++number) {
    native::Random random(static_cast<uint64_t>(number) * 2 + 1);
    const native::Config config = draw(random);
    const native::Problem problem(config, random.next());
    set_seed(static_cast<uint32_t>(number));
    const std::string error = check(problem, number);
    expect(error.empty(), "case " + std::to_string(number) + ": " + error + "\n  " + config.text());
  }
}

}  // namespace attnfast::simt
