// Forward of the dot core: blocks of up to four query panels pass over the keys once, with an online softmax in base 2.
//
// The maximum is lazy: scores are shifted by the maximum of the panel's first visible tile, the exponential is taken
// while they are still in registers, and only if a row sum passes 2^40 is the tile redone with its true
// maximum. When there are few blocks the keys are split as well and the partial states merged in order; the split
// depends on shapes alone, so results do not depend on the number of threads.
#include "dot_attention.h"
#include "dot_tile.h"
#include "parallel.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kMinTasks = 32;  // blocks shrink, then keys are split, until there are this many tasks
constexpr int64_t kMinSplitKeys = 256;
constexpr int kExactTiles = 4;
template <class R>
constexpr R kSumLimit = R(0x1p40);

// What all tasks of a call share.
template <class R>
struct Forward : RowPartials<R> {
  DotAttentionParams p;
  int64_t group, blocks;
  int panels;  // per block
  int64_t depth_pad;
  R query_scale;
};

template <class R>
struct ForwardScratch {
  R *queries, *packed, *out, *probabilities, *keys, *values, *keep, *clean, *score;
  uint32_t *weight_pairs, *value_pairs;  // of bfloat16: P [key / 2][panel] and the values [key / 2][value_pad]
  static int64_t size(const Forward<R>& f) {
    int64_t W = kPanel<R>;
    return W * f.depth_pad + f.panels * W * (f.depth_pad + f.value_pad) + 2 * kKeyTile * W +
           kKeyTile * (f.depth_pad + 2 * f.value_pad) + kKeyTile / 2 * (W + f.value_pad) + ScoreScratch<R>::size();
  }
  ForwardScratch(const Forward<R>& f, R* base) {
    int64_t W = kPanel<R>;
    queries = base;
    packed = queries + W * f.depth_pad;
    out = packed + f.panels * W * f.depth_pad;
    probabilities = out + f.panels * W * f.value_pad;
    keep = probabilities + kKeyTile * W;
    keys = keep + kKeyTile * W;
    values = keys + kKeyTile * f.depth_pad;
    clean = values + kKeyTile * f.value_pad;
    score = clean + kKeyTile * f.value_pad;
    weight_pairs = reinterpret_cast<uint32_t*>(score + ScoreScratch<R>::size());
    value_pairs = weight_pairs + kKeyTile / 2 * W;
  }
};

// The exact step: true maximum of the tile, then exponentials, with the running output rescaled where it grew.
template <class R, class T>
__attribute__((noinline)) void exact_step(const HeadContext& c, const ScoreTile<R>& tile, Rows<T> keys,
                                          const Packed<T>* packed, R* P, R* out, int64_t value_pad,
                                          PanelState<R>& state) {
  int vectors = (tile.nq + kLanes<R> - 1) / kLanes<R>;
  raw_scores<R, T>(keys, steps_of<T>(c.p->head_size), packed, P, tile.nk, vectors, tile.bands_or_null());
  softmax_step<R>(c, tile, score_scale(dot_params(c).scale).score, P, out, value_pad, state);
}

// Exponentials in the score epilogue, against the lazy maximum; false if a row sum left its range (nothing is kept).
template <class R, class T>
__attribute__((noinline)) bool lazy_step(const HeadContext& c, const ScoreTile<R>& tile, Rows<T> keys,
                                         const Packed<T>* packed, R* P, PanelState<R>& state) {
  constexpr int N = kLanes<R>, W = kPanel<R>;
  int vectors = (tile.nq + N - 1) / N;
  alignas(64) R sums[W];
  for (int j = 0; j < vectors; j++) store(sums + N * j, Vec<R>{});
  const R* table = exp2_table<R>();
  bool plain = tile.plain();
  R factor = R(score_scale(dot_params(c).scale).score);
  score_product<R, T>(keys, steps_of<T>(c.p->head_size), packed, nullptr, P, tile.nk, vectors, tile.bands_or_null(),
                      R(0), [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                        constexpr int M = decltype(m)::value;
                        Vec<R> shift = load(state.minus_max + N * j);
                        ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = x[i] * factor + shift;
                        if (!plain) {
                          ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = tile.modify(x[i], r + i, j);
                        }
                        Vec<R> sum = load(sums + N * j);
                        exp2_block<R, M>(x, table);
                        ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
                          sum += x[i];
                          store(P + (r + i) * W + N * j, x[i]);
                        }
                        store(sums + N * j, sum);
                      });
  bool good = true;
  for (int j = 0; j < vectors; j++) {
    Vec<R> total = load(state.sum + N * j) + load(sums + N * j);
    auto within = total <= kSumLimit<R>;
    for (int i = 0; i < N && N * j + i < tile.nq; i++) good &= within[i] != 0;
    store(sums + N * j, total);
  }
  if (!good) return false;
  for (int j = 0; j < vectors; j++) store(state.sum + N * j, load(sums + N * j));
  return true;
}

template <class R, class T>
void forward_task(const Forward<R>& f, int64_t task) {
  constexpr int W = kPanel<R>;
  constexpr bool kPairs = !std::is_same_v<R, T>;
  const DotAttentionParams& p = f.p;
  int64_t split = task % f.splits, block = task / f.splits % f.blocks, head = task / f.splits / f.blocks;
  HeadContext c = head_context(p, head / p.heads, head % p.heads, f.group);
  // The longest causal rows first: the last tasks to finish are then short ones.
  int64_t q0 = (f.blocks - 1 - block) * f.panels * W;
  int64_t rows = c.s.query_rows - q0 < f.panels * W ? c.s.query_rows - q0 : f.panels * W;
  if (rows <= 0) return;
  int64_t queries = f.group > 1 ? c.s.queries * f.group : c.s.queries;
  int64_t valid = queries - q0 < rows ? queries - q0 : rows;
  int panels = int((rows + W - 1) / W);

  ForwardScratch<R> s(f, static_cast<R*>(scratch(0, ForwardScratch<R>::size(f) * sizeof(R))));
  ScoreScratch<R> score_scratch(s.score);
  PanelState<R> state[kPanelsPerBlock];
  for (int i = 0; i < panels; i++) {
    for (int q = 0; q < W; q++) state[i].minus_max[q] = state[i].sum[q] = R(0);
    state[i].lazy = false;
  }
  bool started[kPanelsPerBlock] = {};
  int exact_left[kPanelsPerBlock] = {};
  if (valid > 0) {
    auto [begin, end] = seen_by_rows(c, q0, valid);
    int64_t tiles = (c.s.keys + kKeyTile - 1) / kKeyTile, share = (tiles + f.splits - 1) / f.splits * kKeyTile;
    int64_t low = split * share, high = low + share;
    begin = begin > low ? begin / kKeyTile * kKeyTile : low;
    end = end < high ? end : high;
    bool packed = false;
    auto packed_panel = [&](int i) { return reinterpret_cast<Packed<T>*>(s.packed + i * W * f.depth_pad); };
    // With ALiBi scores grow towards a query's own position, by more than the lazy maximum bears within a few tiles. So
    // the tile that the last query stands on comes first, the ones before it next, backwards, and then those after it.
    int64_t tiles_here = end > begin ? (end - begin + kKeyTile - 1) / kKeyTile : 0;
    int64_t turn = p.alibi_slopes ? (c.position(q0 + valid - 1) + c.band.offset - begin) / kKeyTile : -1;
    if (turn >= tiles_here) turn = tiles_here - 1;
    for (int64_t step = 0; step < tiles_here; step++) {
      int64_t k0 = begin + (step <= turn ? turn - step : step) * kKeyTile;
      int nk = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
      bool loaded = false;
      Rows<T> keys{};
      Rows<R> values{};
      PairRows value_pairs{};
      for (int i = 0; i < panels; i++) {
        int64_t first = q0 + i * W;
        int nq = int(q0 + valid - first < W ? q0 + valid - first : W);
        ScoreTile<R> tile;
        if (nq <= 0 || !prepare_tile<R>(c, first, nq, k0, nk, score_scratch, tile)) continue;
        if (!packed) {
          for (int j = 0; j < panels && j * W < valid; j++) {
            int count = int(valid - j * W < W ? valid - j * W : W);
            pack_panel<T, R>(p.query, c.query_offset(p.query, q0 + j * W), count, p.head_size, packed_panel(j),
                             f.query_scale, s.queries);
          }
          packed = true;
        }
        if (!loaded) {
          keys = operand_rows<T>(p.key, c.key_offset(p.key, k0), nk, p.head_size, s.keys);
          if constexpr (kPairs)
            value_pairs = interleave_rows(p.value, c.key_offset(p.value, k0), nk, p.value_size, s.value_pairs);
          else
            values = get_rows<R>(p.value, c.key_offset(p.value, k0), nk, p.value_size, true, s.values);
          loaded = true;
        }
        const Packed<T>* queries = packed_panel(i);
        R* out = s.out + i * W * f.value_pad;
        bool lazy = state[i].lazy && p.softcap <= 0 && exact_left[i] == 0;
        if (exact_left[i] > 0) exact_left[i]--;
        Rows<T> seen = keys.from(tile.skip);
        if (!lazy || !lazy_step<R, T>(c, tile, seen, queries, s.probabilities, state[i])) {
          // Scores that left their range once will do so again: the next tiles are not tried the fast way first.
          if (lazy) exact_left[i] = kExactTiles;
          exact_step<R, T>(c, tile, seen, queries, s.probabilities, out, f.value_pad, state[i]);
        }
        if (has_factor(p)) {
          factor_tile<R>(c, tile, s.keep);
          multiply_tile<R>(tile, s.probabilities, s.keep);
        }
        if constexpr (kPairs) {
          round_tile<R>(tile, s.probabilities, nullptr, s.weight_pairs);
          accumulate_pairs_by_query<R>(c, tile, s.weight_pairs, value_pairs.from(tile.skip), p.value_size, out,
                                       f.value_pad, !started[i], s.clean);
        } else {
          accumulate_by_query<R>(c, tile, s.probabilities, values.from(tile.skip), p.value_size, out, f.value_pad,
                                 !started[i], s.clean);
        }
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

// One query per head and shared key heads: the heads of a group become the rows of a panel, so keys are read once.
void group_heads(DotAttentionParams& p) {
  int64_t group = p.heads / p.kv_heads;
  for (Tensor4* t : {&p.query, &p.out, &p.mask, &p.bias[0], &p.bias[1]}) {
    t->stride[2] = t->stride[1];
    t->stride[1] *= group;
  }
  p.window_bounds_stride[2] = p.window_bounds_stride[1];
  p.window_bounds_stride[1] *= group;
  p.heads = p.kv_heads;
  p.query_tokens = group;
}

template <class R, class T>
void forward(const DotAttentionParams& params) {
  Forward<R> f;
  f.p = params;
  DotAttentionParams& p = f.p;
  f.group = 1;
  if (p.query_tokens == 1 && p.heads > p.kv_heads && !p.cu_seqlens_q) {
    f.group = p.heads / p.kv_heads;
    group_heads(p);
  }
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  f.query_scale = R(score_scale(p.scale).query);
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
  f.partial_out = nullptr;
  if (f.splits > 1) {
    int64_t slots = f.splits * f.rows_total;
    f.partial_out = static_cast<R*>(scratch(1, size_t(slots * (f.value_pad + 2)) * sizeof(R)));
    f.partial_max = f.partial_out + slots * f.value_pad;
    f.partial_sum = f.partial_max + slots;
  }
  double work = double(heads) * double(longest.queries) * double(longest.keys) * double(p.head_size + p.value_size + 8);
  bool serial = work < kSerialWork;
  parallel_tasks(
      tasks * f.splits, serial,
      [](void* context, int64_t task) { forward_task<R, T>(*static_cast<const Forward<R>*>(context), task); }, &f);
  if (f.splits > 1)
    parallel_tasks(
        f.rows_total, serial,
        [](void* context, int64_t row) {
          const Forward<R>& f = *static_cast<const Forward<R>*>(context);
          merge_row<R>(f.p, f, f.group, row);
        },
        &f);
}

}  // namespace

void dot_attention_fwd(const DotAttentionParams& p) {
  if (dot_attention_decode(p)) {
    // one query per head, handled
  } else {
    visit_operands(p, [&](auto real, auto operand) { forward<decltype(real), decltype(operand)>(p); });
  }
  if (p.weights_mode != WeightsMode::kNone) dot_attention_weights(p);
}

}  // namespace attnfast::ATTNFAST_ISA
