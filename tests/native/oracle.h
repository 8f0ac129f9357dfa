// The same call by its definition: plain loops in double precision, no tiling, no online softmax.
#pragma once

#include "problem.h"

namespace attnfast::native {

// A gradient, and the sum of the magnitudes of the terms it is made of: where they cancel, their rounding remains.
struct Gradient {
  HostTensor value, magnitude;

  void allocate(std::vector<int64_t> size) {
    value = HostTensor(DType::kFloat64, size);
    magnitude = HostTensor(DType::kFloat64, size);
  }
  void add(int64_t b, int64_t h, int64_t i, int64_t j, double term, double size) {
    value.add(b, h, i, j, term);
    magnitude.add(b, h, i, j, std::fabs(size));
  }
};

struct Expected {
  HostTensor out, lse, weights, row_weights;  // row_weights: the applied weights in full, whatever was asked for
  HostTensor delta_shift;
  Gradient grad_query, grad_key, grad_value, grad_bias[2], grad_sink, grad_center, grad_weight, grad_score_bias;
};

Expected forward_by_definition(const Problem& problem);

// Adds the gradients. `weights_index` is the forward's (the argument of a row maximum, -1: none).
void backward_by_definition(const Problem& problem, const std::vector<int64_t>& weights_index, Expected& expected);

}  // namespace attnfast::native
