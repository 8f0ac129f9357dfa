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
// One query per head: keys and values are read once; false if the call does not qualify.
bool additive_attention_decode(const AdditiveAttentionParams& p);
bool additive_attention_decode_bwd(const AdditiveAttentionParams& p);
// Why a forward does not qualify, as a clause; null if it does. A backward also needs a key head for each query head,
// and no gradient that arrives at weights or that a bias wants.
const char* additive_attention_decode_obstacle(const AdditiveAttentionParams& p);
// The second pass that writes attention weights, or only their column sums or row maxima.
void additive_attention_weights(const AdditiveAttentionParams& p);

}  // namespace attnfast::ATTNFAST_ISA
