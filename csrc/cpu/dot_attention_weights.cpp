// Attention weights of the dot core; the pass itself is weights_pass.h.
#include "dot_attention.h"
#include "dot_tile.h"
#include "weights_pass.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

template <class Value>
struct DotWeights {
  using Real = Value;
  using R = Value;
  using Params = DotAttentionParams;
  R *rows, *packed, *minus_lse, *minus_log, *keys, *P;
  QueryPanel<R> panel;

  static int64_t size(const Params& p) {
    int64_t W = kPanel<R>, depth = padded<R>(p.head_size);
    return 2 * W * depth + 2 * W + kKeyTile * depth + kKeyTile * W;
  }
  DotWeights(const Params& p, R* base) {
    int64_t W = kPanel<R>, depth = padded<R>(p.head_size);
    rows = base;
    packed = rows + W * depth;
    minus_lse = packed + W * depth;
    minus_log = minus_lse + W;
    keys = minus_log + W;
    P = keys + kKeyTile * depth;
  }
  void load_panel(const HeadContext& c, int64_t q0, int nq, ScoreScratch<R>& scratch) {
    const Params& p = dot_params(c);
    Rows<R> q = get_rows<R>(p.query, c.query_offset(p.query, q0), nq, p.head_size, true, rows);
    pack_transposed<R>(q, nq, p.head_size, packed, R(score_scale(p.scale).query));
    load_panel_lse<R>(c, q0, nq, minus_lse);
    bool split = split_huge_lse<R>(c, q0, nq, packed, minus_lse, minus_log, keys, P, scratch);
    panel = {q0, nq, packed, minus_lse, split ? minus_log : nullptr};
  }
  void probabilities(const HeadContext& c, const ScoreTile<R>& tile, R* out) {
    const Params& p = dot_params(c);
    Rows<R> k = get_rows<R>(p.key, c.key_offset(p.key, tile.k0), tile.nk, p.head_size, false, keys);
    probability_tile<R>(c, tile, k, panel, out, nullptr);
  }
};

}  // namespace

void dot_attention_weights(const DotAttentionParams& p) {
  double cost = double(p.head_size + 16);
  if (p.query.dtype == DType::kFloat64)
    weights_pass<DotWeights<double>>(p, cost, kSerialWork);
  else
    weights_pass<DotWeights<float>>(p, cost, kSerialWork);
}

}  // namespace attnfast::ATTNFAST_ISA
