// Entry points of the weighted gather and of the merge of product keys, one set per instruction set.
#pragma once

#include "../core/gather_params.h"

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

namespace attnfast::ATTNFAST_ISA {

void weighted_gather_fwd(const WeightedGatherParams& p);
// Sorts (slot, position) into `sorted` and counts what `chunk_starts` says; the number of different slots that occur.
int64_t weighted_gather_sort(const WeightedGatherParams& p);
// Needs the sort if gradients of the values are wanted.
void weighted_gather_bwd(const WeightedGatherParams& p);
void product_keys(const ProductKeysParams& p);

}  // namespace attnfast::ATTNFAST_ISA
