// The additive core with one query per head, as a decoder calls it, forward and backward: every key and value is read
// once, dimensions in lanes. Long rows of keys are split, by shapes alone, and the parts merged in order.
//
// Forward: scores of a chunk of keys (additive_single.h), online softmax with keys in lanes, weighted sum of values.
// Backward: for a few keys the hyperbolic tangents t that make the scores stay in the first-level cache, and then
//   dV = P dO,  dS = P (V . dO - delta),  dK = w dS (1 - t^2),  dQ = sum of dK,  dw = sum of dS t
// leave in the order of the keys. What neither takes goes to the tile kernels, whose scores of one query are the same.
#include "additive_attention.h"
#include "additive_gradient.h"
#include "additive_single.h"
#include "backward_tile.h"
#include "softmax_rows.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kMinTasks = 16;       // keys are split until there are this many tasks,
constexpr int64_t kMinSplitKeys = 256;  // but not further than this
constexpr int kGradientKeys = 8;        // whose tangents wait for dS

static int64_t decode_splits(const AdditiveAttentionParams& p) {
  int64_t heads = p.batch * p.heads;
  if (heads == 0 || heads >= kMinTasks || p.key_tokens < 2 * kMinSplitKeys) return 1;
  int64_t wanted = (kMinTasks + heads - 1) / heads, possible = p.key_tokens / kMinSplitKeys;
  return wanted < possible ? wanted : possible;
}
static bool decode_serial(const AdditiveAttentionParams& p) {
  return double(p.batch * p.heads) * double(p.key_tokens) * double(p.head_size + p.value_size / 4 + 2) < kSerialTriples;
}
// Keys of one task, multiples of a tile.
static int64_t decode_share(const AdditiveAttentionParams& p, int64_t splits) {
  int64_t tiles = (p.key_tokens + kKeyTile - 1) / kKeyTile;
  return (tiles + splits - 1) / splits * kKeyTile;
}

// query + score_bias and weight, as R and padded with zeros.
template <class R>
void load_query_and_weight(const HeadContext& c, R* query, R* weight) {
  const AdditiveAttentionParams& p = static_cast<const AdditiveAttentionParams&>(*c.p);
  int64_t depth = p.head_size;
  load_rows<R>(p.query, c.query_offset(p.query, 0), 1, depth, query, padded<R>(depth));
  if (p.score_bias) {
    // `weight` is free until it is filled below.
    load_row<R>(static_cast<const R*>(p.score_bias) + (p.score_bias_by_head ? c.h * depth : 0), 1, depth, weight);
    for (int64_t d = 0; d < padded<R>(depth); d += kLanes<R>) store(query + d, load(query + d) + load(weight + d));
  }
  load_row<R>(static_cast<const R*>(p.weight) + (p.weight_by_head ? c.h * depth : 0), 1, depth, weight);
}

// ---------------------------------------------------------------- forward
template <class R>
struct Decode : RowPartials<R> {
  const AdditiveAttentionParams* p;
  int64_t share;
};

// Scores of n keys become exp2(score - maximum), 0 where masked, against the largest of all keys so far; `out` and
// `sum` follow it. Rounded as in tiles: see softmax_rows.h.
template <class R>
void exponentiate_row(int n, const R* add, int64_t value_pad, R* score, R* out, R& maximum, R& sum) {
  constexpr int N = kLanes<R>;
  const R factor = R(kLog2e);
  R largest = -infinity<R>();
  for (int i = n; i < (n + N - 1) / N * N; i++) score[i] = -infinity<R>();
  auto base2 = [&](int i) ATTNFAST_LAMBDA {
    Vec<R> x = rounded<R>(load(score + i) * factor);
    if (add) x = load(add + i) == -infinity<R>() ? splat(-infinity<R>()) : x + load(add + i);
    return x;
  };
  Vec<R> most = splat(-infinity<R>());
  for (int i = 0; i < n; i += N) {
    Vec<R> x = base2(i);
    most = x > most ? x : most;
  }
  for (int i = 0; i < N; i++) largest = most[i] > largest ? most[i] : largest;
  if (largest > maximum) {
    R rescale = sum == R(0) ? R(0) : exp2_real(maximum - largest);
    maximum = largest;
    sum *= rescale;
    for (int64_t d = 0; d < value_pad; d += N) store(out + d, load(out + d) * rescale);
  }
  R base = maximum == -infinity<R>() ? R(0) : maximum;
  bool huge = any_huge<R>(&base, 1);
  Vec<R> total{};
  for (int i = 0; i < n; i += N) {
    Vec<R> x;
    if (huge) {
      x = base2(i) - base;
    } else {
      x = load(score + i) * factor - base;
      if (add) x = load(add + i) == -infinity<R>() ? splat(-infinity<R>()) : x + load(add + i);
    }
    x = exp2v<R>(x);
    total += x;
    store(score + i, x);
  }
  sum += sum_lanes<R>(total);
}

template <class R, class T>
void decode_task(const Decode<R>& f, int64_t task) {
  constexpr int N = kLanes<R>;
  const AdditiveAttentionParams& p = *f.p;
  int64_t head = task / f.splits, split = task % f.splits;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  int64_t depth_pad = padded<R>(p.head_size);
  R* query = static_cast<R*>(scratch(0, size_t(2 * depth_pad + f.value_pad + 3 * kDecodeChunk) * sizeof(R)));
  R *weight = query + depth_pad, *out = weight + depth_pad, *score = out + f.value_pad;
  R *row = score + kDecodeChunk, *add = row + kDecodeChunk;
  for (int64_t d = 0; d < f.value_pad; d += N) store(out + d, Vec<R>{});
  R maximum = -infinity<R>(), sum = 0;

  auto [begin, end] = c.s.queries > 0 ? c.keys(0) : KeyRange{0, 0};
  begin = begin < split * f.share ? split * f.share : begin;
  end = end > (split + 1) * f.share ? (split + 1) * f.share : end;
  if (begin < end) load_query_and_weight<R>(c, query, weight);
  const T* keys = static_cast<const T*>(p.key.data) + c.key_offset(p.key, 0);
  const T* values = static_cast<const T*>(p.value.data) + c.key_offset(p.value, 0);
  for (int64_t k0 = begin; k0 < end; k0 += kDecodeChunk) {
    int n = int(end - k0 < kDecodeChunk ? end - k0 : kDecodeChunk);
    const R* addends = load_addends<R>(c, k0, n, row, add) ? add : nullptr;
    Soon<1> soon;
    soon.set(0, values + k0 * p.value.stride[2], p.value.stride[2]);
    single_query_scores<false, 1, R>(keys + k0 * p.key.stride[2], p.key.stride[2], n, addends, query, weight,
                                     Extent<R>(p.head_size), static_cast<R*>(nullptr), 0, score, soon);
    exponentiate_row<R>(n, addends, f.value_pad, score, out, maximum, sum);
    add_weighted_rows<R>(values + k0 * p.value.stride[2], p.value.stride[2], n, score, addends, Extent<R>(p.value_size),
                         out);
  }
  PanelState<R> state;
  state.minus_max[0] = maximum == -infinity<R>() ? R(0) : -maximum;
  state.sum[0] = sum;
  finish_panel<R>(f, c, 0, 1, split, out, state);
}

template <class R, class T>
void decode(const AdditiveAttentionParams& p) {
  Decode<R> f;  // not zeroed as a whole: GCC would align it to 64 bytes, which AddressSanitizer's frames are not
  f.p = &p;
  f.partial_out = f.partial_max = f.partial_sum = nullptr;
  f.value_pad = padded<R>(p.value_size);
  f.rows_total = p.batch * p.heads;
  f.splits = decode_splits(p);
  f.share = decode_share(p, f.splits);
  if (f.splits > 1) {
    int64_t slots = f.splits * f.rows_total;
    f.partial_out = static_cast<R*>(scratch(1, size_t(slots * (f.value_pad + 2)) * sizeof(R)));
    f.partial_max = f.partial_out + slots * f.value_pad;
    f.partial_sum = f.partial_max + slots;
  }
  parallel_tasks(
      f.rows_total * f.splits, decode_serial(p),
      [](void* context, int64_t task) { decode_task<R, T>(*static_cast<const Decode<R>*>(context), task); }, &f);
  if (f.splits > 1)
    for (int64_t row = 0; row < f.rows_total; row++) merge_row<R>(p, f, 1, row);
}

// ---------------------------------------------------------------- backward
template <class R>
struct DecodeGradient : GradientParts<R> {
  int64_t share;
  bool scores;  // a gradient of query, key, weight or score_bias is wanted
};

// Stores to a row of T of `extent` elements.
template <class R, class T>
ATTNFAST_INLINE void store_rest(T* p, Vec<R> x, int rest) {
  if constexpr (std::is_same_v<R, T>) {
    store_partial<R>(p, x, rest);
  } else {
    alignas(64) T all[kLanes<R>];
    store_as(all, x);
    for (int i = 0; i < rest; i++) p[i] = all[i];
  }
}
template <class R, class T>
ATTNFAST_INLINE void store_scaled(T* to, const R* x, R factor, Extent<R> extent) {
  for (int64_t d = 0; d < extent.whole; d += kLanes<R>) store_as(to + d, load(x + d) * factor);
  if (extent.rest) store_rest<R>(to + extent.whole, load(x + extent.whole) * factor, extent.rest);
}
template <class T>
static void store_zeros(T* to, int64_t stride, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t d = 0; d < cols; d++) to[i * stride + d] = T{};
}

// One vector of K keys from their tangents: stores dK = w e with e = dS (1 - t^2), adds e to dq and dS t to dw.
template <int K, class R, class StoreKey>
ATTNFAST_INLINE void key_gradients(const R* tanhs, int64_t stride, const R* slope, const R* weight, int64_t d, R* dq,
                                   R* dw, StoreKey store_key) {
  Vec<R> e[K], m[K];
  ATTNFAST_UNROLL for (int i = 0; i < K; i++) {
    Vec<R> t = load(tanhs + i * stride + d);
    m[i] = t * slope[i];
    e[i] = slope[i] - m[i] * t;
    store_key(i, load(weight + d) * e[i]);
  }
  ATTNFAST_UNROLL for (int i = 1; i < K; i++) {
    e[0] += e[i];
    m[0] += m[i];
  }
  store(dq + d, load(dq + d) + e[0]);
  store(dw + d, load(dw + d) + m[0]);
}

template <int K, class R, class T>
__attribute__((noinline)) void add_key_gradients(const R* tanhs, int64_t stride, const R* slope, const R* weight,
                                                 Extent<R> depth, T* grad_key, int64_t grad_stride, R* dq, R* dw) {
  for (int64_t d = 0; d < depth.whole; d += kLanes<R>)
    key_gradients<K, R>(tanhs, stride, slope, weight, d, dq, dw, [&](int i, Vec<R> x) ATTNFAST_LAMBDA {
      if (grad_key) store_as(grad_key + i * grad_stride + d, x);
    });
  if (depth.rest)
    key_gradients<K, R>(tanhs, stride, slope, weight, depth.whole, dq, dw, [&](int i, Vec<R> x) ATTNFAST_LAMBDA {
      if (grad_key) store_rest<R>(grad_key + i * grad_stride + depth.whole, x, depth.rest);
    });
}

template <class R>
struct GradientScratch {
  R *query, *weight, *grad_out, *dq, *dw, *tile_dq, *tile_dw, *tanhs, *row, *add, *minus_lse, *minus_log;
  static int64_t size(int64_t depth_pad, int64_t value_pad) {
    return (6 + kGradientKeys) * depth_pad + value_pad + 2 * kDecodeChunk + 2 * kPanel<R>;
  }
  GradientScratch(R* base, int64_t depth_pad, int64_t value_pad) {
    query = base;
    weight = query + depth_pad;
    dq = weight + depth_pad;
    dw = dq + depth_pad;
    tile_dq = dw + depth_pad;
    tile_dw = tile_dq + depth_pad;
    tanhs = tile_dw + depth_pad;
    grad_out = tanhs + kGradientKeys * depth_pad;
    row = grad_out + value_pad;
    add = row + kDecodeChunk;
    minus_lse = add + kDecodeChunk;
    minus_log = minus_lse + kPanel<R>;
  }
};

// Both terms of a huge lse, as the tile kernels form them; false if it is not huge.
template <class R, class T>
bool split_lse(const HeadContext& c, const GradientScratch<R>& s) {
  const AdditiveAttentionParams& p = static_cast<const AdditiveAttentionParams&>(*c.p);
  constexpr int W = kPanel<R>;
  if (!any_huge<R>(s.minus_lse, 1)) return false;
  R* P = static_cast<R*>(scratch(2, size_t(kKeyTile * W + ScoreScratch<R>::size()) * sizeof(R)));
  ScoreScratch<R> score_scratch(P + kKeyTile * W);
  return split_huge_lse<R>(
      c, 0, 1, kLog2e, s.minus_lse, s.minus_log, P, score_scratch, [&](const ScoreTile<R>& tile, R* P) {
        alignas(64) R score[kKeyTile];
        const T* keys = static_cast<const T*>(p.key.data) + c.key_offset(p.key, tile.k0);
        single_query_scores<false, 0, R>(keys, p.key.stride[2], tile.nk, static_cast<R*>(nullptr), s.query, s.weight,
                                         Extent<R>(p.head_size), static_cast<R*>(nullptr), 0, score, Soon<0>{});
        for (int k = 0; k < tile.nk; k++) {
          Vec<R> x{};
          x[0] = score[k];
          store(P + k * W, x);
        }
      });
}

template <class R, class T>
void gradient_task(const DecodeGradient<R>& f, int64_t task) {
  constexpr int N = kLanes<R>, kKeys = kGradientKeys;
  constexpr int kLanesOfKeys = kKeys > N ? kKeys : N;
  const AdditiveAttentionParams& p = *f.p;
  int64_t head = task / f.splits, split = task % f.splits, depth_pad = f.depth_pad;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  Extent<R> depth(p.head_size), width(p.value_size);
  GradientScratch<R> s(
      static_cast<R*>(scratch(0, size_t(GradientScratch<R>::size(depth_pad, f.value_pad)) * sizeof(R))), depth_pad,
      f.value_pad);
  for (int64_t d = 0; d < depth_pad; d += N) {
    store(s.dq + d, Vec<R>{});
    store(s.dw + d, Vec<R>{});
  }
  int64_t keys0 = split * f.share < p.key_tokens ? split * f.share : p.key_tokens;
  int64_t keys1 = keys0 + f.share < p.key_tokens ? keys0 + f.share : p.key_tokens;
  KeyRange seen = c.s.queries > 0 ? c.keys(0) : KeyRange{0, 0};
  int64_t begin = clamp_index(seen.begin, keys0, keys1), end = clamp_index(seen.end, begin, keys1);

  const int64_t key_stride = p.key.stride[2], value_stride = p.value.stride[2];
  const int64_t dk_stride = p.grad_key.stride[2], dv_stride = p.grad_value.stride[2];
  const T* keys = static_cast<const T*>(p.key.data) + c.key_offset(p.key, 0);
  const T* values = static_cast<const T*>(p.value.data) + c.key_offset(p.value, 0);
  T* grad_key = static_cast<T*>(p.grad_key.data);
  T* grad_value = static_cast<T*>(p.grad_value.data);
  if (grad_key) grad_key += c.key_offset(p.grad_key, 0);
  if (grad_value) grad_value += c.key_offset(p.grad_value, 0);
  auto clear = [&](int64_t from, int64_t to) {
    if (grad_key) store_zeros(grad_key + from * dk_stride, dk_stride, to - from, p.head_size);
    if (grad_value) store_zeros(grad_value + from * dv_stride, dv_stride, to - from, p.value_size);
  };
  clear(keys0, begin);
  clear(end, keys1);

  R minus_delta = 0;
  bool split_terms = false;
  if (begin < end) {
    load_query_and_weight<R>(c, s.query, s.weight);
    load_rows<R>(p.grad_out, c.query_offset(p.grad_out, 0), 1, p.value_size, s.grad_out, f.value_pad);
    load_panel_lse<R>(c, 0, 1, s.minus_lse);
    split_terms = split_lse<R, T>(c, s);
    minus_delta = -static_cast<const R*>(p.delta)[c.row(0)];
  }
  // A fresh sum over the keys of each tile.
  for (int64_t k0 = begin; k0 < end; k0 += kKeyTile) {
    int n = int(end - k0 < kKeyTile ? end - k0 : kKeyTile);
    const R* add = load_addends<R>(c, k0, n, s.row, s.add) ? s.add : nullptr;
    for (int64_t d = 0; d < depth_pad; d += N) {
      store(s.tile_dq + d, Vec<R>{});
      store(s.tile_dw + d, Vec<R>{});
    }
    for (int i0 = 0; i0 < n; i0 += kKeys) {
      int m = n - i0 < kKeys ? n - i0 : kKeys;
      int64_t k = k0 + i0;
      alignas(64) R P[kLanesOfKeys], slope[kLanesOfKeys];
      const R* hidden = add ? add + i0 : nullptr;
      const T* v = values + k * value_stride;
      T* dk = grad_key ? grad_key + k * dk_stride : nullptr;
      T* dv = grad_value ? grad_value + k * dv_stride : nullptr;
      Soon<3> soon;
      soon.set(0, v, value_stride);
      soon.set(1, dk ? dk : v, dk ? dk_stride : value_stride);
      soon.set(2, dv ? dv : v, dv ? dv_stride : value_stride);
      single_query_scores<true, 3, R>(keys + k * key_stride, key_stride, m, hidden, s.query, s.weight, depth, s.tanhs,
                                      depth_pad, P, soon);
      for (int i = 0; i < m; i += N) {
        Vec<R> x = load(P + i) * R(kLog2e);
        if (split_terms) {  // rounded as in split_huge_lse
          x = rounded<R>(x);
          if (hidden) x += load(hidden + i);
          x = x + s.minus_lse[0] + s.minus_log[0];
        } else {
          x += s.minus_lse[0];
          if (hidden) x += load(hidden + i);
        }
        if (hidden) x = load(hidden + i) == -infinity<R>() ? splat(-infinity<R>()) : x;
        store(P + i, exp2v<R>(x));
      }
      Vec<R> dots[kLanesOfKeys] = {};
      for (int i = 0; i < m; i++)
        if (P[i] != R(0)) dots[i] = partial_dot<R>(v + i * value_stride, s.grad_out, width);
      bool all = m == kKeys;
      for (int i = 0; i < kKeys; i += N) store(slope + i, sum_of_rows<1, R>(dots + i));
      for (int i = 0; i < m; i++) {
        // Selected, not multiplied: the sum may be NaN where the probability is zero.
        slope[i] = P[i] == R(0) ? R(0) : P[i] * (slope[i] + minus_delta);
        all &= P[i] != R(0);
        if (dv && P[i] == R(0))
          store_zeros(dv + i * dv_stride, 0, 1, p.value_size);
        else if (dv)
          store_scaled<R>(dv + i * dv_stride, s.grad_out, P[i], width);
      }
      if (!f.scores) continue;
      if (all) {
        add_key_gradients<kKeys, R>(s.tanhs, depth_pad, slope, s.weight, depth, dk, dk_stride, s.tile_dq, s.tile_dw);
        continue;
      }
      for (int i = 0; i < m; i++) {
        if (P[i] != R(0))
          add_key_gradients<1, R>(s.tanhs + i * depth_pad, depth_pad, slope + i, s.weight, depth,
                                  dk ? dk + i * dk_stride : nullptr, dk_stride, s.tile_dq, s.tile_dw);
        else if (dk)
          store_zeros(dk + i * dk_stride, 0, 1, p.head_size);
      }
    }
    for (int64_t d = 0; d < depth_pad; d += N) {
      store(s.dq + d, load(s.dq + d) + load(s.tile_dq + d));
      store(s.dw + d, load(s.dw + d) + load(s.tile_dw + d));
    }
  }
  if (!f.scores) return;
  R* part = f.weight_part(c.s.batch, c.h, split);
  for (int64_t d = 0; d < depth_pad; d += N) {
    store(part + d, load(s.dw + d));
    Vec<R> x = begin < end ? load(s.weight + d) * load(s.dq + d) : Vec<R>{};
    store(part + depth_pad + d, x);
    if (f.splits > 1) store(f.query_part(split, c.row(0)) + d, x);
  }
  if (f.splits == 1 && p.grad_query.data)
    store_row<R>(p.grad_query, c.query_offset(p.grad_query, 0), p.head_size, part + depth_pad, R(1));
}

template <class R, class T>
void decode_gradient(const AdditiveAttentionParams& p) {
  DecodeGradient<R> f;
  f.p = &p;
  f.partial_query = f.partial_weight = nullptr;
  f.depth_pad = padded<R>(p.head_size);
  f.value_pad = padded<R>(p.value_size);
  f.rows_total = p.batch * p.heads;
  f.splits = decode_splits(p);
  f.share = decode_share(p, f.splits);
  f.scores = p.grad_query.data || p.grad_key.data || p.grad_weight || p.grad_score_bias;
  if (f.scores) place_parts<R>(f);
  bool serial = decode_serial(p);
  auto run = [&](int64_t tasks, void (*task)(const DecodeGradient<R>&, int64_t)) {
    struct Job {
      const DecodeGradient<R>* f;
      void (*task)(const DecodeGradient<R>&, int64_t);
    } job{&f, task};
    parallel_tasks(
        tasks, serial,
        [](void* x, int64_t i) {
          const Job& job = *static_cast<const Job*>(x);
          job.task(*job.f, i);
        },
        &job);
  };
  run(f.rows_total, [](const DecodeGradient<R>& f, int64_t i) { delta_rows<R>(*f.p, i); });
  if (p.grad_sink) run(p.heads, [](const DecodeGradient<R>& f, int64_t h) { sink_gradient<R>(*f.p, h); });
  if (f.scores || p.grad_value.data) run(f.rows_total * f.splits, gradient_task<R, T>);
  if (f.splits > 1 && p.grad_query.data)
    run(f.rows_total, [](const DecodeGradient<R>& f, int64_t row) { merge_query_row<R>(f, row); });
  if (p.grad_weight) merge_weights<R>(f, 0, p.weight_by_head, R(1), static_cast<R*>(p.grad_weight));
  if (p.grad_score_bias) merge_weights<R>(f, 1, p.score_bias_by_head, R(1), static_cast<R*>(p.grad_score_bias));
}

}  // namespace

const char* additive_attention_decode_obstacle(const AdditiveAttentionParams& p) {
  if (p.cu_seqlens_q) return "the input is packed";
  if (p.query_tokens != 1) return "T_q is not 1";
  if (p.softcap > 0) return "softcap is on";
  if (p.dropout_p > 0) return "dropout is on";
  if (p.prior_sigma > 0) return "a prior is on";
  if (p.head_size == 0) return "D is 0";
  if (p.key.stride[3] != 1) return "the last dimension of key is not contiguous";
  if (p.value.stride[3] != 1) return "the last dimension of value is not contiguous";
  return nullptr;
}

bool additive_attention_decode(const AdditiveAttentionParams& p) {
  if (additive_attention_decode_obstacle(p)) return false;
  return visit_arithmetic(p.query.dtype, [&](auto r, auto t) { decode<decltype(r), decltype(t)>(p); });
}

bool additive_attention_decode_bwd(const AdditiveAttentionParams& p) {
  if (additive_attention_decode_obstacle(p) || p.heads != p.kv_heads || p.grad_weights.data || p.grad_bias[0].data ||
      p.grad_bias[1].data || (p.grad_key.data && p.grad_key.stride[3] != 1) ||
      (p.grad_value.data && p.grad_value.stride[3] != 1))
    return false;
  return visit_arithmetic(p.query.dtype, [&](auto r, auto t) { decode_gradient<decltype(r), decltype(t)>(p); });
}

}  // namespace attnfast::ATTNFAST_ISA
