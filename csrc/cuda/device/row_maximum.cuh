// The largest weight of a row and its key, as the threads that share the row see it: NaN is the largest, among equals
// the lowest key wins, and what is hidden takes no part.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

template <class R>
struct RowMaximum {
  R weight = R(0);
  int64_t key = -1;  // none

  // Keys come in ascending order.
  ATTNFAST_DEVICE void take(R x, int64_t k) {
    if (is_hidden(x)) return;
    if (key < 0 || x > weight || (x != x && weight == weight)) {
      weight = x;
      key = k;
    }
  }
  // With those of `lanes` neighbours. Every lane of a warp comes here together.
  ATTNFAST_DEVICE void join(int lanes) {
    for (int step = 1; step < lanes; step *= 2) {
      const R x = __shfl_xor_sync(0xFFFFFFFFu, weight, step);
      const int64_t k = __shfl_xor_sync(0xFFFFFFFFu, key, step);
      const bool nan = x != x, equal = x == weight || (nan && weight != weight);
      const bool better = equal ? k < key : x > weight || nan;
      if (k >= 0 && (key < 0 || better)) {
        weight = x;
        key = k;
      }
    }
  }
};

}  // namespace attnfast::cuda
