// Attention weights of the additive core; the pass itself is weights_pass.h.
#include "additive_attention.h"
#include "additive_tile.h"
#include "weights_pass.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

template <class Value>
struct AdditiveProbabilities {
  using Real = Value;
  using R = Value;
  using Params = AdditiveAttentionParams;
  AdditivePanel<R> panel;
  R *minus_lse, *minus_log, *P;
  bool split = false;

  static int64_t size(const Params& p) {
    return AdditivePanel<R>::floats(padded<R>(p.head_size)) + 2 * kPanel<R> + kKeyTile * kPanel<R>;
  }
  AdditiveProbabilities(const Params& p, R* base) : panel(base, padded<R>(p.head_size)) {
    minus_lse = base + AdditivePanel<R>::floats(padded<R>(p.head_size));
    minus_log = minus_lse + kPanel<R>;
    P = minus_log + kPanel<R>;
  }
  void load_panel(const HeadContext& c, int64_t q0, int nq, ScoreScratch<R>& scratch) {
    panel.load_head(c);
    panel.load_queries(c, q0, nq);
    load_panel_lse<R>(c, q0, nq, minus_lse);
    split = panel.split_lse(c, q0, nq, minus_lse, minus_log, P, scratch);
  }
  void probabilities(const HeadContext& c, const ScoreTile<R>& tile, R* out) {
    panel.load_keys(c, tile.k0, tile.nk);
    panel.scores(tile, out);
    finish_probabilities<R>(c, tile, kLog2e, minus_lse, split ? minus_log : nullptr, out, nullptr);
  }
};

}  // namespace

void additive_attention_weights(const AdditiveAttentionParams& p) {
  double cost = double(p.head_size + 4);
  if (p.query.dtype == DType::kFloat64)
    weights_pass<AdditiveProbabilities<double>>(p, cost, kSerialTriples);
  else
    weights_pass<AdditiveProbabilities<float>>(p, cost, kSerialTriples);
}

}  // namespace attnfast::ATTNFAST_ISA
