// Entry points of the dot core, one set per instruction set.
#pragma once

#include "../core/params.h"

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

namespace attnfast::ATTNFAST_ISA {

// Below this many multiply-adds a call runs on the calling thread: waking others costs more.
constexpr double kSerialWork = 1 << 19;

void dot_attention_fwd(const DotAttentionParams& p);
void dot_attention_bwd(const DotAttentionParams& p);
// One query per head, streaming keys and values once; false if the call does not qualify.
bool dot_attention_decode(const DotAttentionParams& p);
// Why it does not qualify, as a clause; null if it does.
const char* dot_attention_decode_obstacle(const DotAttentionParams& p);
// The second pass that writes attention weights, or only their column sums or row maxima.
void dot_attention_weights(const DotAttentionParams& p);

}  // namespace attnfast::ATTNFAST_ISA
