// topk_scores on random calls, see topk.cpp.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace attnfast::native {

// Runs call `number`, serially and on `threads` threads, against its definition; empty, or what went wrong.
// use_threads(n) sets the size of the pool.
std::string check_topk(const KernelTable& kernels, int64_t number, int threads, void (*use_threads)(int threads));

}  // namespace attnfast::native
