// Entry points of topk_scores, one set per instruction set.
#pragma once

#include "../core/params.h"

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

namespace attnfast::ATTNFAST_ISA {

// Below this many multiplications a call runs on the calling thread: waking others costs more.
constexpr double kSerialProducts = 1 << 18;

void topk_scores_fwd(const TopkParams& p);

}  // namespace attnfast::ATTNFAST_ISA
