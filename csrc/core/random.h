// Counter-based random numbers for dropout: Philox 4x32 with seven rounds (Salmon, Moraes, Dror, Shaw 2011).
// A draw depends on (seed, offset, row, column) alone, so forward and backward agree whatever the tiling or the
// threads.
#pragma once

#include "host_device.h"

namespace attnfast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

struct Philox4 {
  uint32_t word[4];
};

// The four words that decide columns 4 * group .. 4 * group + 3 of `row`.
ATTNFAST_HD Philox4 philox(uint64_t seed, uint64_t offset, uint64_t row, uint32_t group) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = group, c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = uint32_t(offset);
  for (int i = 0; i < kPhiloxRounds; i++) {
    uint64_t a = uint64_t(kPhiloxM0) * c0, b = uint64_t(kPhiloxM1) * c2;
    uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// A word below the threshold drops its element.
ATTNFAST_HD uint64_t dropout_threshold(double p) {
  double t = p * 4294967296.0;
  uint64_t floor_t = uint64_t(t);
  uint64_t up = double(floor_t) < t ? floor_t + 1 : floor_t;
  return up > (uint64_t(1) << 32) ? uint64_t(1) << 32 : up;
}
ATTNFAST_HD double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace attnfast
