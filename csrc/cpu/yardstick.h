// What this machine can do at most, for the benchmark to set its figures beside.
#pragma once

#include <cstdint>

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

namespace attnfast::ATTNFAST_ISA {

// Runs about `steps` rounds of independent float32 multiply-adds on registers, on all threads; the floating-point
// operations done.
double yardstick_fma(int64_t steps);
// Reads `bytes` of memory once, on all threads; a checksum, so that nothing can be left out.
uint64_t yardstick_read(const void* data, int64_t bytes);

}  // namespace attnfast::ATTNFAST_ISA
