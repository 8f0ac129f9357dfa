// Entry points of the additive core, one set per instruction set.
#pragma once

#include "../core/params.h"

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

namespace attnfast::ATTNFAST_ISA {

// Below this many (query, key, dimension) triples a call runs on the calling thread: waking others costs more.
constexpr double kSerialTriples = 1 << 17;

void additive_attention_fwd(const AdditiveAttentionParams& p);
void additive_attention_bwd(const AdditiveAttentionParams& p);
// The second pass that writes attention weights, or only their column sums or row maxima.
void additive_attention_weights(const AdditiveAttentionParams& p);

}  // namespace attnfast::ATTNFAST_ISA
