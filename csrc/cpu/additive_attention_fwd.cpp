// Forward of the additive core: blocks of up to four query panels pass over the keys once, with an online softmax in
// base 2. When there are few blocks the keys are split as well and the partial states merged in order; how the work is
// cut depends on shapes alone, so results do not depend on the number of threads.
#include "additive_attention.h"
#include "additive_tile.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kMinTasks = 16;  // blocks shrink, then keys are split, until there are this many tasks
constexpr int64_t kMinSplitKeys = 256;

// What all tasks of a call share.
template <class R>
struct Forward : RowPartials<R> {
  const AdditiveAttentionParams* p;
  int64_t blocks, depth_pad;
  int panels;  // per block
};

template <class R>
struct ForwardScratch {
  R *panels, *keys, *weights, *out, *P, *keep, *values, *clean, *score;
  static int64_t size(const Forward<R>& f) {
    int64_t W = kPanel<R>;
    return f.panels * AdditiveRows<R>::floats(W, f.depth_pad) + AdditiveRows<R>::floats(kKeyTile, f.depth_pad) +
           AdditiveWeights<R>::floats(f.depth_pad) + f.panels * W * f.value_pad + 2 * kKeyTile * W +
           2 * kKeyTile * f.value_pad + ScoreScratch<R>::size();
  }
  ForwardScratch(const Forward<R>& f, R* base) {
    int64_t W = kPanel<R>;
    panels = base;
    keys = panels + f.panels * AdditiveRows<R>::floats(W, f.depth_pad);
    weights = keys + AdditiveRows<R>::floats(kKeyTile, f.depth_pad);
    out = weights + AdditiveWeights<R>::floats(f.depth_pad);
    P = out + f.panels * W * f.value_pad;
    keep = P + kKeyTile * W;
    values = keep + kKeyTile * W;
    clean = values + kKeyTile * f.value_pad;
    score = clean + kKeyTile * f.value_pad;
  }
};

template <class R>
void forward_task(const Forward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>;
  const AdditiveAttentionParams& p = *f.p;
  int64_t split = task % f.splits, block = task / f.splits % f.blocks, head = task / f.splits / f.blocks;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  // The longest causal rows first: the last tasks to finish are then short ones.
  int64_t q0 = (f.blocks - 1 - block) * f.panels * W;
  int64_t rows = c.s.query_rows - q0 < f.panels * W ? c.s.query_rows - q0 : f.panels * W;
  if (rows <= 0) return;
  int64_t valid = c.s.queries - q0 < rows ? c.s.queries - q0 : rows;
  int panels = int((rows + W - 1) / W);

  ForwardScratch<R> s(f, static_cast<R*>(scratch(0, ForwardScratch<R>::size(f) * sizeof(R))));
  ScoreScratch<R> score_scratch(s.score);
  AdditiveWeights<R> weights;
  AdditiveRows<R> queries[kPanelsPerBlock], keys;
  PanelState<R> state[kPanelsPerBlock];
  bool started[kPanelsPerBlock] = {};
  weights.place(s.weights, f.depth_pad);
  keys.place(s.keys, kKeyTile, f.depth_pad);
  for (int i = 0; i < panels; i++) {
    queries[i].place(s.panels + i * AdditiveRows<R>::floats(W, f.depth_pad), W, f.depth_pad);
    for (int q = 0; q < W; q++) state[i].minus_max[q] = state[i].sum[q] = R(0);
  }
  if (valid > 0) {
    auto [begin, end] = seen_by_rows(c, q0, valid);
    int64_t tiles = (c.s.keys + kKeyTile - 1) / kKeyTile, share = (tiles + f.splits - 1) / f.splits * kKeyTile;
    int64_t low = split * share, high = low + share;
    begin = begin > low ? begin / kKeyTile * kKeyTile : low;
    end = end < high ? end : high;
    bool packed = false;
    for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
      int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
      bool loaded = false;
      Rows<R> values{};
      for (int i = 0; i < panels; i++) {
        int64_t first = q0 + i * W;
        int nq = int(q0 + valid - first < W ? q0 + valid - first : W);
        ScoreTile<R> tile;
        if (nq <= 0 || !prepare_tile<R>(c, first, nq, k0, nk, score_scratch, tile)) continue;
        if (!packed) {
          load_additive_weights<R>(p, c.h, weights);
          for (int j = 0; j < panels && j * W < valid; j++)
            load_additive_rows<R>(p.query, c.query_offset(p.query, q0 + j * W),
                                  int(valid - j * W < W ? valid - j * W : W), p.head_size,
                                  weights.has_bias ? weights.bias : nullptr, queries[j]);
          packed = true;
        }
        if (!loaded) {
          load_additive_rows<R>(p.key, c.key_offset(p.key, k0), nk, p.head_size, nullptr, keys);
          values = get_rows<R>(p.value, c.key_offset(p.value, k0), nk, p.value_size, true, s.values);
          loaded = true;
        }
        R* out = s.out + i * W * f.value_pad;
        additive_scores<R>(weights, queries[i], keys, f.depth_pad, tile, tile.skip, false, s.P);
        softmax_step<R>(c, tile, kLog2e, s.P, out, f.value_pad, state[i]);
        if (has_factor(p)) {
          factor_tile<R>(c, tile, s.keep);
          multiply_tile<R>(tile, s.P, s.keep);
        }
        accumulate_by_query<R>(c, tile, s.P, values.from(tile.skip), p.value_size, out, f.value_pad, !started[i],
                               s.clean);
        started[i] = true;
      }
    }
  }
  for (int i = 0; i < panels; i++) {
    int nq = int(rows - i * W < W ? rows - i * W : W);
    // Lanes of a vector that stand for padding (query_lengths) were computed with the others: nothing is visible there.
    for (int64_t q = valid - i * W > 0 ? valid - i * W : 0; q < nq; q++) state[i].minus_max[q] = state[i].sum[q] = R(0);
    finish_panel<R>(f, c, q0 + i * W, nq, split, s.out + i * W * f.value_pad, state[i]);
  }
}

template <class R>
void forward(const AdditiveAttentionParams& p) {
  Forward<R> f{};
  f.p = &p;
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  Longest longest = longest_sequence(p);
  int64_t heads = p.batch * p.heads, rows_per_panel = kPanel<R>;
  for (f.panels = kPanelsPerBlock;; f.panels /= 2) {
    f.blocks = (longest.queries + f.panels * rows_per_panel - 1) / (f.panels * rows_per_panel);
    if (f.panels == 1 || heads * f.blocks >= kMinTasks) break;
  }
  f.splits = 1;
  int64_t tasks = heads * f.blocks;
  if (tasks > 0 && tasks < kMinTasks && longest.keys >= 2 * kMinSplitKeys && !p.cu_seqlens_q) {
    int64_t wanted = (kMinTasks + tasks - 1) / tasks, possible = longest.keys / kMinSplitKeys;
    f.splits = wanted < possible ? wanted : possible;
  }
  f.rows_total = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.query_tokens;
  if (f.splits > 1) {
    int64_t slots = f.splits * f.rows_total;
    f.partial_out = static_cast<R*>(scratch(1, size_t(slots * (f.value_pad + 2)) * sizeof(R)));
    f.partial_max = f.partial_out + slots * f.value_pad;
    f.partial_sum = f.partial_max + slots;
  }
  bool serial =
      double(heads) * double(longest.queries) * double(longest.keys) * double(p.head_size + p.value_size / 4 + 2) <
      kSerialTriples;
  parallel_tasks(
      tasks * f.splits, serial,
      [](void* context, int64_t task) { forward_task<R>(*static_cast<const Forward<R>*>(context), task); }, &f);
  if (f.splits > 1)
    parallel_tasks(
        f.rows_total, serial,
        [](void* context, int64_t row) {
          const Forward<R>& f = *static_cast<const Forward<R>*>(context);
          merge_row<R>(*f.p, f, 1, row);
        },
        &f);
}

}  // namespace

void additive_attention_fwd(const AdditiveAttentionParams& p) {
  if (additive_attention_decode(p)) {
  } else if (p.query.dtype == DType::kFloat64) {
    forward<double>(p);
  } else {
    forward<float>(p);
  }
  if (p.weights_mode != WeightsMode::kNone) additive_attention_weights(p);
}

}  // namespace attnfast::ATTNFAST_ISA
