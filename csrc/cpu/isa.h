// Which instruction set runs: the kernels' entry points, one table per ISA variant, chosen once at load.
// Included by the bindings and the native tests, never by kernel files.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/gather_params.h"
#include "core/params.h"

namespace attnfast {

struct KernelTable {
  const char* name;
  bool native_bf16;  // to be handed on as AttentionParams::native_bf16
  void (*dot_attention_fwd)(const DotAttentionParams&);
  void (*dot_attention_bwd)(const DotAttentionParams&);
  const char* (*dot_attention_decode_obstacle)(const DotAttentionParams&);
  void (*additive_attention_fwd)(const AdditiveAttentionParams&);
  void (*additive_attention_bwd)(const AdditiveAttentionParams&);
  const char* (*additive_attention_decode_obstacle)(const AdditiveAttentionParams&);
  void (*topk_scores_fwd)(const TopkParams&);
  void (*weighted_gather_fwd)(const WeightedGatherParams&);
  int64_t (*weighted_gather_sort)(const WeightedGatherParams&);
  void (*weighted_gather_bwd)(const WeightedGatherParams&);
  void (*product_keys)(const ProductKeysParams&);
  double (*yardstick_fma)(int64_t steps);
  uint64_t (*yardstick_read)(const void* data, int64_t bytes);
};

// The table in use. Until select_isa_at_load it is the best one this machine can run.
const KernelTable& kernels();

// Reads the environment variable ATTNFAST_ISA ("" or unset: the best available). Throws std::runtime_error.
void select_isa_at_load();

// Chooses a variant by name, or the best available for "auto". Returns the name of the variant in use before.
// Throws std::invalid_argument for an unknown name, one that was not built, or one this machine cannot run.
// Calls already running finish with the table they started with.
std::string set_isa(const std::string& name);

// From the lowest to the best.
std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();

// What the machine and the operating system offer (a feature whose registers the system does not save is absent),
// for every feature that some variant needs.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace attnfast
