// Attention weights of the dot core; the pass itself is weights_pass.h.
#include "dot_attention.h"
#include "dot_tile.h"
#include "weights_pass.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

template <class R, class T>
struct DotWeights {
  using Real = R;
  using Params = DotAttentionParams;
  R* rows;
  Packed<T>* packed;
  R *minus_lse, *minus_log, *keys, *P;
  QueryPanel<R, T> panel;

  static int64_t size(const Params& p) {
    int64_t W = kPanel<R>, depth = padded<R>(p.head_size);
    return 2 * W * depth + 2 * W + kKeyTile * depth + kKeyTile * W;
  }
  DotWeights(const Params& p, R* base) {
    int64_t W = kPanel<R>, depth = padded<R>(p.head_size);
    rows = base;
    packed = reinterpret_cast<Packed<T>*>(rows + W * depth);
    minus_lse = rows + 2 * W * depth;
    minus_log = minus_lse + W;
    keys = minus_log + W;
    P = keys + kKeyTile * depth;
  }
  void load_panel(const HeadContext& c, int64_t q0, int nq, ScoreScratch<R>& scratch) {
    const Params& p = dot_params(c);
    pack_panel<T, R>(p.query, c.query_offset(p.query, q0), nq, p.head_size, packed, R(score_scale(p.scale).query),
                     rows);
    load_panel_lse<R>(c, q0, nq, minus_lse);
    bool split = split_huge_lse<R, T>(c, q0, nq, packed, minus_lse, minus_log, keys, P, scratch);
    panel = {q0, nq, packed, minus_lse, split ? minus_log : nullptr};
  }
  void probabilities(const HeadContext& c, const ScoreTile<R>& tile, R* out) {
    const Params& p = dot_params(c);
    Rows<T> k = operand_rows<T>(p.key, c.key_offset(p.key, tile.k0), tile.nk, p.head_size, keys);
    probability_tile<R, T>(c, tile, k, panel, out, nullptr);
  }
};

}  // namespace

void dot_attention_weights(const DotAttentionParams& p) {
  double cost = double(p.head_size + 16);
  visit_operands(p, [&](auto real, auto operand) {
    weights_pass<DotWeights<decltype(real), decltype(operand)>>(p, cost, kSerialWork);
  });
}

}  // namespace attnfast::ATTNFAST_ISA
