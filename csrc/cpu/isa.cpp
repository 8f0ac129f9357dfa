// The table of kernels per ISA variant, and its choice: cpuid once, lowered on request.
#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace attnfast {

#define ATTNFAST_DECLARE(isa)                                                     \
  namespace isa {                                                                 \
  void dot_attention_fwd(const DotAttentionParams&);                              \
  void dot_attention_bwd(const DotAttentionParams&);                              \
  const char* dot_attention_decode_obstacle(const DotAttentionParams&);           \
  void additive_attention_fwd(const AdditiveAttentionParams&);                    \
  void additive_attention_bwd(const AdditiveAttentionParams&);                    \
  const char* additive_attention_decode_obstacle(const AdditiveAttentionParams&); \
  double yardstick_fma(int64_t steps);                                            \
  uint64_t yardstick_read(const void* data, int64_t bytes);                       \
  void topk_scores_fwd(const TopkParams&);                                        \
  void weighted_gather_fwd(const WeightedGatherParams&);                          \
  int64_t weighted_gather_sort(const WeightedGatherParams&);                      \
  void weighted_gather_bwd(const WeightedGatherParams&);                          \
  void product_keys(const ProductKeysParams&);                                    \
  }

ATTNFAST_DECLARE(baseline)
#if ATTNFAST_HAVE_AVX2
ATTNFAST_DECLARE(avx2)
#endif
#if ATTNFAST_HAVE_AVX512
ATTNFAST_DECLARE(avx512)
#endif

namespace {

#define ATTNFAST_TABLE(isa, name, native_bf16) \
  {name,                                       \
   native_bf16,                                \
   isa::dot_attention_fwd,                     \
   isa::dot_attention_bwd,                     \
   isa::dot_attention_decode_obstacle,         \
   isa::additive_attention_fwd,                \
   isa::additive_attention_bwd,                \
   isa::additive_attention_decode_obstacle,    \
   isa::topk_scores_fwd,                       \
   isa::weighted_gather_fwd,                   \
   isa::weighted_gather_sort,                  \
   isa::weighted_gather_bwd,                   \
   isa::product_keys,                          \
   isa::yardstick_fma,                         \
   isa::yardstick_read}

// From the lowest to the best. The last two are the same code, told whether it may multiply in bfloat16.
constexpr KernelTable kTables[] = {
    ATTNFAST_TABLE(baseline, "baseline", false),
#if ATTNFAST_HAVE_AVX2
    ATTNFAST_TABLE(avx2, "avx2", false),
#endif
#if ATTNFAST_HAVE_AVX512
    ATTNFAST_TABLE(avx512, "avx512", false),
    ATTNFAST_TABLE(avx512, "avx512_bf16", true),
#endif
};

// The variants form a ladder: each needs its own features and those of the ones below it, built or not.
constexpr const char* kLadder[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

size_t rung(const std::string& isa) {
  return size_t(std::find(std::begin(kLadder), std::end(kLadder), isa) - std::begin(kLadder));
}

struct Feature {
  const char* name;
  const char* isa;  // the lowest variant that needs it
  bool present;
};

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
const std::vector<Feature>& features() {
#if ATTNFAST_HAVE_AVX2 || ATTNFAST_HAVE_AVX512
#define ATTNFAST_FEATURE(isa, name) {name, isa, __builtin_cpu_supports(name) != 0}
  static const std::vector<Feature> found = [] {
    __builtin_cpu_init();
    return std::vector<Feature>{
        ATTNFAST_FEATURE("avx2", "avx2"),
        ATTNFAST_FEATURE("avx2", "fma"),
        ATTNFAST_FEATURE("avx2", "f16c"),
        ATTNFAST_FEATURE("avx512", "avx512f"),
        ATTNFAST_FEATURE("avx512", "avx512bw"),
        ATTNFAST_FEATURE("avx512", "avx512vl"),
        ATTNFAST_FEATURE("avx512", "avx512dq"),
        // As Linux spells it; the compiler leaves the underscore out.
        {"avx512_bf16", "avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
    };
  }();
#else
  static const std::vector<Feature> found;
#endif
  return found;
}

std::string missing_features(const std::string& isa) {
  std::string missing;
  for (const Feature& feature : features()) {
    if (!feature.present && rung(feature.isa) <= rung(isa)) {
      missing += (missing.empty() ? "" : ", ") + std::string(feature.name);
    }
  }
  return missing;
}

std::string join(const std::vector<std::string>& names) {
  std::string all = "auto";
  for (const std::string& name : names) all += ", " + name;
  return all;
}

const KernelTable* best_table() {
  const KernelTable* best = &kTables[0];
  for (const KernelTable& table : kTables) {
    if (missing_features(table.name).empty()) best = &table;
  }
  return best;
}

const KernelTable* find_table(const std::string& name) {
  if (name == "auto") return best_table();
  const std::string choices = " (available here: " + join(available_isas()) + ")";
  for (const KernelTable& table : kTables) {
    if (name != table.name) continue;
    const std::string missing = missing_features(name);
    if (!missing.empty()) {
      throw std::invalid_argument("ISA '" + name + "' needs CPU features this machine lacks: " + missing + choices);
    }
    return &table;
  }
  if (rung(name) < std::size(kLadder)) {
    throw std::invalid_argument("ISA '" + name + "' is not part of this build" + choices);
  }
  throw std::invalid_argument("unknown ISA '" + name + "'" + choices);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{best_table()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_acquire); }

void select_isa_at_load() {
  const char* name = std::getenv("ATTNFAST_ISA");
  if (name == nullptr || *name == '\0') return;
  try {
    set_isa(name);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("environment variable ATTNFAST_ISA: ") + error.what());
  }
}

std::string set_isa(const std::string& name) {
  return current().exchange(find_table(name), std::memory_order_acq_rel)->name;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : kTables) names.emplace_back(table.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : kTables) {
    if (missing_features(table.name).empty()) names.emplace_back(table.name);
  }
  return names;
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> all;
  for (const Feature& feature : features()) all.emplace_back(feature.name, feature.present);
  return all;
}

}  // namespace attnfast
