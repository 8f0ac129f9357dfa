// Boolean masks as bits: one word of queries for each key of a tile. A tile of bytes would be loaded, widened and
// transposed to floats 16 KB at a time; as bits the transpose is a few hundred scalar operations.
#pragma once

#include "../core/params.h"
#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

static_assert(kKeyTile == 64 && kPanel<float> <= 64,
              "one word holds the keys of a tile, and one the queries of a panel");

// Bit i is set where element i of `count` <= 64 is true: not zero, since a view of other bytes as booleans may hold
// anything.
static inline uint64_t pack_bits(const uint8_t* p, int64_t stride, int count) {
  if (stride == 1 && count == 64) return nonzero_byte_bits(p);
  uint64_t bits = 0;
  for (int i = 0; i < count; i++) bits |= uint64_t(p[i * stride] != 0) << i;
  return bits;
}

// Transposes a 64 by 64 matrix of bits in place: bit c of row r changes places with bit r of row c.
static inline void transpose_bits(uint64_t* rows) {
  uint64_t mask = 0x00000000ffffffff;
  for (int step = 32; step != 0; step >>= 1, mask ^= mask << step)
    for (int first = 0; first < 64; first += 2 * step)
      for (int r = first; r < first + step; r++) {
        uint64_t swap = ((rows[r] >> step) ^ rows[r + step]) & mask;
        rows[r] ^= swap << step;
        rows[r + step] ^= swap;
      }
}

// bits[k], bit q: t[offset + q][k] is true; 0 for q >= nq.
static inline void load_mask_bits(const Tensor4& t, int64_t offset, int nq, int nk, uint64_t* bits) {
  const uint8_t* base = static_cast<const uint8_t*>(t.data) + offset;
  uint64_t all = nq < 64 ? (uint64_t(1) << nq) - 1 : ~uint64_t(0);
  if (t.stride[2] == 0) {  // one row serves every query
    uint64_t row = pack_bits(base, t.stride[3], nk);
    for (int k = 0; k < nk; k++) bits[k] = row >> k & 1 ? all : 0;
  } else if (t.stride[3] == 0) {  // one column serves every key
    uint64_t column = pack_bits(base, t.stride[2], nq);
    for (int k = 0; k < nk; k++) bits[k] = column;
  } else {
    for (int q = 0; q < 64; q++) bits[q] = q < nq ? pack_bits(base + q * t.stride[2], t.stride[3], nk) : 0;
    transpose_bits(bits);
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
