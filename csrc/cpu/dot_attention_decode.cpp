// Decode: one query per head. The work is one pass over keys and values, so the kernel streams them: lanes run along D,
// 16 (8) key rows are reduced at once, half types are widened in registers. Long key rows are split, the split chosen
// from shapes alone, and partial states are merged in order. For inference only: see the end of the file.
#include "decode_rows.h"
#include "dot_attention.h"
#include "parallel.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kSplitKeys = 512;  // at least this many keys a split
constexpr int64_t kMinTasks = 16;

template <class R>
struct Decode {
  const DotAttentionParams* p;
  int64_t splits, share, value_pad;
  R *partial_out, *partial_max, *partial_sum;  // [head][split]
  R query_scale, score_scale;
};

template <class R, class T>
void decode_task(const Decode<R>& f, int64_t task) {
  constexpr int N = kLanes<R>;
  const DotAttentionParams& p = *f.p;
  int64_t head = task / f.splits, split = task % f.splits;
  HeadContext c = head_context(p, head / p.heads, head % p.heads);
  int64_t depth_pad = padded<R>(p.head_size), value_pad = f.value_pad;
  Extent<R> depth(p.head_size), width(p.value_size);
  R* base = static_cast<R*>(scratch(0, size_t(depth_pad + value_pad + 3 * kDecodeChunk) * sizeof(R)));
  R *query = base, *out = query + depth_pad, *weight = out + value_pad;
  R *row = weight + kDecodeChunk, *add = row + kDecodeChunk;
  for (int64_t d = 0; d < value_pad; d += N) store(out + d, Vec<R>{});
  R maximum = -infinity<R>(), sum = 0;

  auto [begin, end] = c.s.queries > 0 ? c.keys(0) : KeyRange{0, 0};
  if (begin < split * f.share) begin = split * f.share;
  if (end > (split + 1) * f.share) end = (split + 1) * f.share;
  if (begin < end) {
    load_rows<R>(p.query, c.query_offset(p.query, 0), 1, p.head_size, query, depth_pad);
    for (int64_t d = 0; d < depth_pad; d += N) store(query + d, load(query + d) * f.query_scale);
  }
  const T* keys = static_cast<const T*>(p.key.data) + c.key_offset(p.key, 0);
  const T* values = static_cast<const T*>(p.value.data) + c.key_offset(p.value, 0);
  int64_t key_stride = p.key.stride[2], value_stride = p.value.stride[2];
  for (int64_t k0 = begin; k0 < end; k0 += kDecodeChunk) {
    int n = int(end - k0 < kDecodeChunk ? end - k0 : kDecodeChunk);
    bool masked = load_addends<R>(c, k0, n, row, add);
    R chunk_max = -infinity<R>();
    for (int i = 0; i < n; i += N) {
      Vec<R> dot[N];
      for (int r = 0; r < N; r++) {
        const T* k = keys + (k0 + (i + r < n ? i + r : n - 1)) * key_stride;
        dot[r] = partial_dot<R>(k, query, depth);
      }
      store(weight + i, sum_of_rows<1, R>(dot) * f.score_scale);
    }
    for (int i = 0; i < n; i++) {
      if (masked) weight[i] = add[i] == -infinity<R>() ? -infinity<R>() : weight[i] + add[i];
      chunk_max = weight[i] > chunk_max ? weight[i] : chunk_max;
      // NaN must survive to the output although comparisons ignore it: the exponential below turns it into one.
    }
    for (int i = n; i < (n + N - 1) / N * N; i++) weight[i] = -infinity<R>();
    if (chunk_max > maximum) {
      R rescale = sum == R(0) ? R(0) : exp2_real(maximum - chunk_max);
      maximum = chunk_max;
      sum *= rescale;
      for (int64_t d = 0; d < value_pad; d += N) store(out + d, load(out + d) * rescale);
    }
    Vec<R> chunk_sum{}, shift = splat(maximum == -infinity<R>() ? R(0) : maximum);
    for (int i = 0; i < n; i += N) {
      Vec<R> e = exp2v<R>(load(weight + i) - shift);
      chunk_sum += e;
      store(weight + i, e);
    }
    sum += sum_lanes<R>(chunk_sum);
    const T* v = values + k0 * value_stride;
    add_weighted_rows<R>(v, value_stride, n, weight, masked ? add : nullptr, width, out);
  }
  if (f.splits > 1) {
    f.partial_max[task] = maximum;
    f.partial_sum[task] = sum;
    for (int64_t d = 0; d < value_pad; d += N) store(f.partial_out + task * value_pad + d, load(out + d));
    return;
  }
  R sink = p.sink ? static_cast<const R*>(p.sink)[c.h] * R(kLog2e) : R(0);
  SoftmaxResult<R> done = close_row<R>({maximum == -infinity<R>() ? R(0) : maximum, sum}, p.sink, sink);
  if (sum == R(0))
    store_zero_row<R>(p.out, c.query_offset(p.out, 0), p.value_size);
  else
    store_row<R>(p.out, c.query_offset(p.out, 0), p.value_size, out, done.output_scale);
}

template <class R>
void merge_decode(const Decode<R>& f, int64_t head) {
  constexpr int N = kLanes<R>;
  const DotAttentionParams& p = *f.p;
  int64_t b = head / p.heads, h = head % p.heads, width = f.value_pad;
  R* out = static_cast<R*>(scratch(0, size_t(width) * sizeof(R)));
  R maximum = -infinity<R>(), sum = 0;
  for (int64_t i = head * f.splits; i < (head + 1) * f.splits; i++)
    if (f.partial_sum[i] != R(0) && f.partial_max[i] > maximum) maximum = f.partial_max[i];
  if (maximum == -infinity<R>()) maximum = R(0);
  for (int64_t d = 0; d < width; d += N) store(out + d, Vec<R>{});
  for (int64_t i = head * f.splits; i < (head + 1) * f.splits; i++) {
    if (f.partial_sum[i] == R(0)) continue;
    R w = exp2_real((f.partial_max[i] == -infinity<R>() ? R(0) : f.partial_max[i]) - maximum);
    sum += w * f.partial_sum[i];
    for (int64_t d = 0; d < width; d += N) store(out + d, load(out + d) + load(f.partial_out + i * width + d) * w);
  }
  R sink = p.sink ? static_cast<const R*>(p.sink)[h] * R(kLog2e) : R(0);
  SoftmaxResult<R> done = close_row<R>({maximum, sum}, p.sink, sink);
  int64_t offset = offset4(p.out, b, h, 0, 0);
  if (sum == R(0))
    store_zero_row<R>(p.out, offset, p.value_size);
  else
    store_row<R>(p.out, offset, p.value_size, out, done.output_scale);
}

template <class R, class T>
void decode(const DotAttentionParams& p) {
  Decode<R> f{};
  f.p = &p;
  ScoreScale scale = score_scale(p.scale);
  f.query_scale = R(scale.query);
  f.score_scale = R(scale.score);
  f.value_pad = padded<R>(p.value_size);
  int64_t heads = p.batch * p.heads;
  f.splits = 1;
  if (heads > 0 && heads < kMinTasks && p.key_tokens >= 2 * kSplitKeys) {
    int64_t wanted = (kMinTasks + heads - 1) / heads, possible = p.key_tokens / kSplitKeys;
    f.splits = wanted < possible ? wanted : possible;
  }
  int64_t chunks = (p.key_tokens + kDecodeChunk - 1) / kDecodeChunk;
  f.share = (chunks + f.splits - 1) / f.splits * kDecodeChunk;
  if (f.splits > 1) {
    int64_t slots = heads * f.splits;
    f.partial_out = static_cast<R*>(scratch(1, size_t(slots * (f.value_pad + 2)) * sizeof(R)));
    f.partial_max = f.partial_out + slots * f.value_pad;
    f.partial_sum = f.partial_max + slots;
  }
  bool serial = double(heads) * double(p.key_tokens) * double(p.head_size + p.value_size) < kSerialWork / 4;
  parallel_tasks(
      heads * f.splits, serial,
      [](void* context, int64_t task) { decode_task<R, T>(*static_cast<const Decode<R>*>(context), task); }, &f);
  if (f.splits > 1)
    parallel_tasks(
        heads, true,
        [](void* context, int64_t head) { merge_decode<R>(*static_cast<const Decode<R>*>(context), head); }, &f);
}

}  // namespace

const char* dot_attention_decode_obstacle(const DotAttentionParams& p) {
  if (p.cu_seqlens_q) return "the input is packed";
  if (p.query_tokens != 1) return "T_q is not 1";
  if (p.heads != p.kv_heads) return "query heads share key heads, whose keys one tile reads once for all of them";
  if (p.softcap > 0) return "softcap is on";
  if (p.dropout_p > 0) return "dropout is on";
  if (p.prior_sigma > 0) return "a prior is on";
  if (p.head_size == 0) return "D is 0";
  if (p.key.stride[3] != 1) return "the last dimension of key is not contiguous";
  if (p.value.stride[3] != 1) return "the last dimension of value is not contiguous";
  return nullptr;
}

bool dot_attention_decode(const DotAttentionParams& p) {
  // Who asks for lse recomputes scores in tiles later, whose rounding differs from a row reduction's: with scores in
  // the hundreds the two would not cancel.
  if (p.lse || dot_attention_decode_obstacle(p)) return false;
  return visit_arithmetic(p.query.dtype, [&](auto r, auto t) { decode<decltype(r), decltype(t)>(p); });
}

}  // namespace attnfast::ATTNFAST_ISA
