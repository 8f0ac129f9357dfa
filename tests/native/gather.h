// Reads by index on random calls, see gather.cpp.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace attnfast::native {

// Runs calls `number` of the weighted gather and of the product keys, serially and on `threads` threads, against their
// definitions; empty, or what went wrong. use_threads(n) sets the size of the pool.
std::string check_gather(const KernelTable& kernels, int64_t number, int threads, void (*use_threads)(int threads));
// The same of kernels that do not report an index that is neither a slot nor -1, but take it as -1: those on a GPU.
std::string check_gather_unreported(const KernelTable& kernels, int64_t number, int threads,
                                    void (*use_threads)(int threads));

}  // namespace attnfast::native
