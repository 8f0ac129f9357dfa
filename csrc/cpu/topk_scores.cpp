// The k best slots for each query, without the matrix of scores: product and choice in one pass over the keys.
//
// Many queries: lanes are queries. A panel of them is packed once, and the elements of a key are broadcast against it,
// read where they lie. The scores of the first slots are written out, and the maxima of groups of them bound the k-th
// best from below; from then on a tile is compared with the thresholds while it is in registers, and what exceeds them,
// which soon is little, goes to the candidates (topk_select.h). Up to kRowQueries queries: lanes run along D, keys are
// streamed once, and the work is that of memory.
//
// Tasks are groups of panels, and where these are few also ranges of slots, whose candidates are merged. A score is
// formed alike wherever it is formed, and the choice is exact, so no schedule shows in the result.
#include "topk_scores.h"

#include "mask_bits.h"
#include "parallel.h"
#include "topk_sift.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kRowQueries = 4;
constexpr int64_t kWarmSlots = 1152;  // whose scores are written out first
constexpr int64_t kBoundCount = 64;   // largest k that takes its first threshold from them
constexpr int64_t kKeyStep = 192;     // slots formed at a time: a multiple of every tile's rows and of kKeyTile
constexpr int64_t kKeyBytes = 192 << 10;
constexpr int64_t kMinShare = 16384;             // slots of a range at least
constexpr int64_t kMaxShare = int64_t(1) << 30;  // slots are counted in 32 bits within a range
static_assert(kKeyStep % kKeyTile == 0 && kKeyStep % (2 * kTileRows) == 0 && kWarmSlots % kKeyStep == 0);

// Hands out pieces of one buffer, or from a null pointer finds out how large it must be.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// ---------------------------------------------------------------- a task: some panels, one range of slots

template <class R>
struct Task {
  Panel<R>* panels;
  int count;  // of panels
  int64_t begin, end;
  R *converted, *tail, *S, *maxima;
  Sieve sieve;
  uint64_t* visible;
  Candidates<R> spare;
};

// Keys in int8, as the numbers they stand for.
static void load_codes(const TopkParams& p, int64_t first, int64_t count, float* dst, int64_t stride) {
  const int8_t* codes = static_cast<const int8_t*>(p.keys.data) + first * p.keys.stride[2];
  for (int64_t i = 0; i < count; i++, dst += stride) {
    load_row<float>(codes + i * p.keys.stride[2], 1, p.size, dst);
    const float scale = p.key_scales[first + i];
    for (int64_t d = 0; d < p.size; d += kLanes<float>) store(dst + d, load(dst + d) * scale);
  }
}

template <class R>
static Rows<R> key_rows(const Search<R>& f, const Task<R>& t, int64_t first, int64_t count) {
  const Tensor4& keys = f.p->keys;
  if (f.in_place) return {static_cast<const R*>(keys.data) + first * keys.stride[2], keys.stride[2]};
  const int64_t stride = padded<R>(f.p->size) + kLanes<R>;  // an odd number of lines: see readable_in_place
  if constexpr (std::is_same_v<R, float>) {
    if (f.p->key_scales) {
      load_codes(*f.p, first, count, t.converted, stride);
      return {t.converted, stride};
    }
  }
  load_rows<R>(keys, first * keys.stride[2], count, f.p->size, t.converted, stride);
  return {t.converted, stride};
}

// One word of lanes for each slot, or null where all may be chosen.
template <class R>
static const uint64_t* visible_slots(const Search<R>& f, const Task<R>& t, const Panel<R>& panel, int64_t first,
                                     int64_t count) {
  const Tensor4& mask = f.p->mask;
  if (!mask.data) return nullptr;
  for (int64_t k = 0; k < count; k += kKeyTile)
    load_mask_bits(mask, panel.first * mask.stride[2] + (first + k) * mask.stride[3], panel.queries,
                   int(count - k < kKeyTile ? count - k : kKeyTile), t.visible + k);
  return t.visible;
}

template <class R, int N>
static void warm_up(const Search<R>& f, const Task<R>& t, Panel<R>& panel, int64_t count) {
  const int64_t k = f.p->count;
  const bool bounded = k <= kBoundCount;
  for (int64_t j = 0; j < count; j += kKeyStep) {
    const int64_t n = count - j < kKeyStep ? count - j : kKeyStep;
    const uint64_t* visible = visible_slots(f, t, panel, t.begin + j, n);
    R* s = bounded ? t.S + j * N * kLanes<R> : t.S;
    if (!bounded) {
      form<R, N, false>(f, panel, key_rows(f, t, t.begin + j, n), j, n, visible, s, t.tail);
      continue;
    }
    form<R, N, true>(f, panel, key_rows(f, t, t.begin + j, n), j, n, visible, s, t.tail);
    if (visible)
      for (int64_t i = 0; i < n; i++)
        for (int v = 0; v < N; v++) {
          R* x = s + (i * N + v) * kLanes<R>;
          store(x, select_bits<R>(visible[i] >> (v * kLanes<R>), load(x), splat(-infinity<R>())));
        }
  }
  if (!bounded) return;
  int power = 1;
  while (power < k) power *= 2;
  if (count >= 4 * power) bound<R, N>(t.S, count, power, panel.threshold, t.maxima);
  for (int64_t j = 0; j < count; j += kKeyStep) {
    const int64_t n = count - j < kKeyStep ? count - j : kKeyStep;
    const uint64_t* visible = visible_slots(f, t, panel, t.begin + j, n);
    filter<R, N, true>(f, panel, t.S + j * N * kLanes<R>, j, int(n), visible);
  }
  // From here on a score must exceed k candidates. With fewer, of slots that are hidden, everything may still come.
  for (int lane = 0; lane < panel.queries; lane++) {
    if (panel.count[lane] < k) {
      panel.threshold[lane] = R(__builtin_nan(""));
    } else if (t.begin + count < t.end) {
      Candidates<R> c = candidates(f, panel, lane);
      Ordered<R> worst = c.score[0];
      if (panel.count[lane] > k)
        worst = keep_best<R>(c, panel.count[lane], k);
      else
        for (int64_t i = 1; i < k; i++) worst = c.score[i] < worst ? c.score[i] : worst;
      panel.threshold[lane] = score_of<R>(worst);
      panel.count[lane] = int(k);
    }
  }
}

// visit(Int<N>) with the number of vectors of a panel.
template <class F>
ATTNFAST_INLINE void with_vectors(int vectors, F visit) {
  if (vectors == kTileCols) return visit(Int<kTileCols>());
  if constexpr (kTileCols > 2) {
    if (vectors == 2) return visit(Int<2>());
  }
  visit(Int<1>());
}

template <class R>
static void pack(const Search<R>& f, Panel<R>& panel, R* packed, R* rows) {
  const TopkParams& p = *f.p;
  const int64_t width = panel.vectors * kLanes<R>, stride = padded<R>(p.size);
  load_rows<R>(p.query, panel.first * p.query.stride[2], panel.queries, p.size, rows, stride);
  for (int64_t d = 0; d < p.size; d++)
    for (int q = panel.queries; q < width; q++) packed[d * width + q] = R(0);
  for (int q = 0; q < panel.queries; q += kLanes<R>) {
    for (int64_t d = 0; d < stride; d += kLanes<R>) {
      Vec<R> r[kLanes<R>];
      ATTNFAST_UNROLL for (int i = 0; i < kLanes<R>; i++) r[i] =
          q + i < panel.queries ? load(rows + (q + i) * stride + d) * R(p.scale) : Vec<R>{};
      transpose<R>(r);
      for (int i = 0; i < kLanes<R> && d + i < p.size; i++) store(packed + (d + i) * width + q, r[i]);
    }
  }
  panel.packed = packed;
}

template <class R>
static void finish(const Search<R>& f, Candidates<R> c, int64_t n, int64_t query, int64_t split, int64_t begin,
                   Candidates<R> spare) {
  const int64_t k = f.p->count;
  if (f.splits == 1) {
    write_best<R>(c, n, k, spare, static_cast<R*>(f.p->scores) + query * k, f.p->indices + query * k,
                  [&](Ordered<R> slot) { return begin + int64_t(slot); });
    return;
  }
  if (n > k) {
    keep_best<R>(c, n, k);
    n = k;
  }
  const int64_t at = query * f.splits + split;
  f.found[at] = n;
  for (int64_t i = 0; i < n; i++) {
    f.best.score[at * k + i] = c.score[i];
    f.best.slot[at * k + i] = c.slot[i];
  }
}

// Lays a task out in its scratch memory; with a null base only its size counts.
template <class R>
static Task<R> lay_out(const Search<R>& f, Arena& arena, R*& packed, R*& rows) {
  const TopkParams& p = *f.p;
  constexpr int64_t W = kTileCols * kLanes<R>;
  Task<R> t{};
  t.panels = arena.take<Panel<R>>(f.group);
  packed = arena.take<R>(f.group * W * p.size);
  rows = arena.take<R>(W * padded<R>(p.size));
  R* thresholds = arena.take<R>(f.group * W);
  int32_t* counts = arena.take<int32_t>(f.group * W);
  Ordered<R>* buffers = arena.take<Ordered<R>>(f.group * W * 2 * buffer_half(f));
  const int64_t most = f.chunk > kKeyStep ? f.chunk : kKeyStep;
  t.sieve.stride = (padded<float>(p.size) + 63) / 32 / 2 * 64 + 32;  // an odd number of lines
  t.sieve.rows = arena.take<BFloat16>(f.sifted ? most * t.sieve.stride : 0);
  t.sieve.margin = arena.take<float>(f.sifted ? most + kLanes<float> : 0);
  uint32_t* pairs = arena.take<uint32_t>(f.sifted ? f.group * W * steps_of<BFloat16>(p.size) : 0);
  R* reach = arena.take<R>(f.sifted ? f.group * W : 0);
  t.converted = arena.take<R>(f.in_place ? 0 : most * (padded<R>(p.size) + kLanes<R>));
  t.tail = arena.take<R>(2 * kTileRows * p.size);
  t.S = arena.take<R>((kWarmSlots > most ? kWarmSlots : most) * W);
  t.maxima = arena.take<R>(4 * kBoundCount * kLanes<R>);
  t.visible = arena.take<uint64_t>(p.mask.data ? most + kKeyTile : 0);
  t.spare.score = arena.take<Ordered<R>>(p.count + kLanes<R>);
  t.spare.slot = arena.take<Ordered<R>>(p.count + kLanes<R>);
  if (arena.base)
    for (int64_t i = 0; i < f.group; i++) {
      Panel<R>& panel = t.panels[i];
      panel.threshold = thresholds + i * W;
      panel.pairs = f.sifted ? pairs + i * W * steps_of<BFloat16>(p.size) : nullptr;
      panel.reach = reach + i * W;
      panel.count = counts + i * W;
      panel.buffer = buffers + i * W * 2 * buffer_half(f);
    }
  return t;
}

template <class R>
static void search_panels(const Search<R>& f, int64_t task) {
  const TopkParams& p = *f.p;
  constexpr int64_t L = kLanes<R>, W = kTileCols * L;
  const int64_t split = task / f.groups, first = task % f.groups * f.group;
  R *packed, *rows;
  Arena arena{nullptr};
  lay_out(f, arena, packed, rows);
  arena = {static_cast<char*>(scratch(0, arena.used))};
  Task<R> t = lay_out(f, arena, packed, rows);
  t.count = int(f.panels - first < f.group ? f.panels - first : f.group);
  t.begin = split * f.share;
  t.end = p.slots - t.begin < f.share ? p.slots : t.begin + f.share;
  const int64_t warm = t.end - t.begin < kWarmSlots ? t.end - t.begin : kWarmSlots;
  for (int i = 0; i < t.count; i++) {
    Panel<R>& panel = t.panels[i];
    panel.first = (first + i) * W;
    panel.queries = int(p.queries - panel.first < W ? p.queries - panel.first : W);
    for (panel.vectors = kTileCols; panel.vectors > 1 && panel.queries <= panel.vectors / 2 * L;) panel.vectors /= 2;
    panel.lanes = panel.queries < 64 ? (uint64_t(1) << panel.queries) - 1 : ~uint64_t(0);
    for (int lane = 0; lane < W; lane++) {
      panel.threshold[lane] = lane < panel.queries ? R(__builtin_nan("")) : infinity<R>();
      panel.count[lane] = 0;
    }
    pack(f, panel, packed + i * W * p.size, rows);
    panel.pause = 0;
#if ATTNFAST_PAIRS
    if constexpr (std::is_same_v<R, float>)
      if (f.sifted) prepare_panel(panel, p.size, const_cast<uint32_t*>(panel.pairs));
#endif
    with_vectors(panel.vectors, [&](auto n) { warm_up<R, decltype(n)::value>(f, t, panel, warm); });
  }
  for (int64_t j = t.begin + warm; j < t.end; j += f.chunk) {
    const int64_t n = t.end - j < f.chunk ? t.end - j : f.chunk;
    Rows<R> keys = key_rows(f, t, j, n);
    [[maybe_unused]] bool prepared = false;
    for (int i = 0; i < t.count; i++) {
      Panel<R>& panel = t.panels[i];
      const uint64_t* visible = visible_slots(f, t, panel, j, n);
      with_vectors(panel.vectors, [&](auto v) {
#if ATTNFAST_PAIRS
        if constexpr (std::is_same_v<R, float>) {
          if (panel.pause > 0) {
            panel.pause--;
          } else if (panel.pairs && worth_sifting(j - t.begin, p.count)) {
            if (!prepared) prepare_sieve(keys, n, p.size, t.sieve);
            prepared = true;
            sift<decltype(v)::value>(f, panel, keys, t.sieve, j - t.begin, n, visible, t.S, t.tail);
            return;
          }
        }
#endif
        form<R, decltype(v)::value, false>(f, panel, keys, j - t.begin, n, visible, t.S, t.tail);
      });
    }
  }
  for (int i = 0; i < t.count; i++)
    for (int lane = 0; lane < t.panels[i].queries; lane++)
      finish(f, candidates(f, t.panels[i], lane), t.panels[i].count[lane], t.panels[i].first + lane, split, t.begin,
             t.spare);
}

// ---------------------------------------------------------------- few queries: keys are streamed

template <class R, class T>
static void search_rows(const Search<R>& f, int64_t split) {
  const TopkParams& p = *f.p;
  constexpr int L = kLanes<R>;
  const int64_t k = p.count, width = padded<R>(p.size), whole = p.size / L * L;
  const int rest = int(p.size - whole);
  Arena arena{nullptr};
  R* query;
  Candidates<R> own[kRowQueries], spare;
  for (int pass = 0; pass < 2; pass++) {
    query = arena.take<R>(p.queries * width);
    for (int64_t b = 0; b < p.queries; b++) {
      own[b].score = arena.take<Ordered<R>>(buffer_half(f));
      own[b].slot = arena.take<Ordered<R>>(buffer_half(f));
    }
    spare.score = arena.take<Ordered<R>>(k + L);
    spare.slot = arena.take<Ordered<R>>(k + L);
    if (pass == 0) arena = {static_cast<char*>(scratch(0, arena.used))};
  }
  load_rows<R>(p.query, 0, p.queries, p.size, query, width);
  for (int64_t d = 0; d < p.queries * width; d += L) store(query + d, load(query + d) * R(p.scale));
  R threshold[kRowQueries];
  int count[kRowQueries] = {};
  for (R& t : threshold) t = R(__builtin_nan(""));
  const int64_t begin = split * f.share, end = p.slots - begin < f.share ? p.slots : begin + f.share;
  const T* keys = static_cast<const T*>(p.keys.data);
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data);
  const Vec<Ordered<R>> lane = iota<Ordered<R>>();
  for (int64_t block = begin; block < end; block += kKeyTile) {
    const int rows = end - block < kKeyTile ? int(end - block) : kKeyTile;
    uint64_t visible[kRowQueries], any = 0;
    for (int64_t b = 0; b < p.queries; b++) {
      visible[b] = rows < 64 ? (uint64_t(1) << rows) - 1 : ~uint64_t(0);
      if (mask) visible[b] &= pack_bits(mask + b * p.mask.stride[2] + block * p.mask.stride[3], p.mask.stride[3], rows);
      any |= visible[b];
    }
    for (int j = 0; j < rows; j += L) {
      constexpr uint64_t kAll = (uint64_t(1) << L) - 1;
      if ((any >> j & kAll) == 0) continue;
      const T* row[L];
      for (int r = 0; r < L; r++) row[r] = keys + (block + (j + r < rows ? j + r : rows - 1)) * p.keys.stride[2];
      for (int64_t b = 0; b < p.queries; b++) {
        const R* q = query + b * width;
        Vec<R> dot[L];
        for (int r = 0; r < L; r++) {
          Vec<R> sum{};
          for (int64_t d = 0; d < whole; d += L) sum += load_as<R>(row[r] + d) * load(q + d);
          if (rest) sum += load_partial<R>(row[r] + whole, rest) * load(q + whole);
          dot[r] = sum;
        }
        Vec<R> score = sum_of_rows<1, R>(dot);
        if constexpr (std::is_same_v<T, int8_t>) {
          const float* scales = p.key_scales + block + j;
          score *= rows - j >= L ? load(scales) : load_partial<R>(scales, rows - j);
        }
        uint64_t bits = not_at_most_bits<R>(score, splat(threshold[b])) & (visible[b] >> j) & kAll;
        if (__builtin_expect(bits == 0, 1)) continue;
        compress_store(own[b].score + count[b], bits, ordered<R>(score));
        count[b] += compress_store(own[b].slot + count[b], bits, lane + Ordered<R>(block - begin + j));
        if (count[b] + L > f.capacity) {
          threshold[b] = score_of<R>(keep_best<R>(own[b], count[b], k));
          count[b] = int(k);
        }
      }
    }
  }
  for (int64_t b = 0; b < p.queries; b++) finish(f, own[b], count[b], b, split, begin, spare);
}

// ---------------------------------------------------------------- schedule

template <class R>
static void merge(const Search<R>& f, int64_t query) {
  const TopkParams& p = *f.p;
  const int64_t k = p.count;
  Arena arena{nullptr};
  Candidates<R> all, spare;
  for (int pass = 0; pass < 2; pass++) {
    all = {arena.take<Ordered<R>>(f.splits * k + kLanes<R>), arena.take<Ordered<R>>(f.splits * k + kLanes<R>)};
    spare = {arena.take<Ordered<R>>(k + kLanes<R>), arena.take<Ordered<R>>(k + kLanes<R>)};
    if (pass == 0) arena = {static_cast<char*>(scratch(0, arena.used))};
  }
  const Candidates<R> best = {f.best.score + query * f.splits * k, f.best.slot + query * f.splits * k};
  int64_t n = 0;
  for (int64_t split = 0; split < f.splits; split++)
    for (int64_t i = 0; i < f.found[query * f.splits + split]; i++, n++) {
      all.score[n] = best.score[split * k + i];
      all.slot[n] = Ordered<R>(split * k + i);  // where to find it
    }
  write_best<R>(all, n, k, spare, static_cast<R*>(p.scores) + query * k, p.indices + query * k,
                [&](Ordered<R> at) { return at / k * f.share + int64_t(best.slot[at]); });
}

template <class R>
static void choose(const TopkParams& p) {
  constexpr int64_t W = kTileCols * kLanes<R>;
  Search<R> f{};
  f.p = &p;
  const bool rows = p.queries <= kRowQueries;
  f.panels = rows ? 1 : (p.queries + W - 1) / W;
  f.group = f.panels < kPanelsPerBlock ? f.panels : kPanelsPerBlock;
  if (f.panels / f.group < 2 * p.threads && p.threads > 1)
    f.group = f.panels / (2 * p.threads) > 0 ? f.panels / (2 * p.threads) : 1;
  f.groups = (f.panels + f.group - 1) / f.group;
  f.splits = (p.slots + kMaxShare - 1) / kMaxShare;
  if (f.groups < 4 * p.threads && f.groups % p.threads != 0) {
    const int64_t wanted = (4 * p.threads + f.groups - 1) / f.groups, possible = p.slots / kMinShare;
    const int64_t splits = wanted < possible ? wanted : possible;
    if (splits > f.splits) f.splits = splits;
  }
  f.share = (p.slots + f.splits - 1) / f.splits;
  f.share = (f.share + kKeyTile - 1) / kKeyTile * kKeyTile;
  f.splits = (p.slots + f.share - 1) / f.share;
  f.chunk = kKeyBytes / (p.size * int64_t(sizeof(R)) + 1) / kKeyStep * kKeyStep;
  f.chunk = f.chunk < kKeyStep ? kKeyStep : f.chunk > kWarmSlots ? kWarmSlots : f.chunk;
  f.capacity = p.count <= 64 ? 128 : (2 * p.count + 79) / 16 * 16;
  f.sifted = ATTNFAST_PAIRS && p.native_bf16 && std::is_same_v<R, float> && worth_sifting(f.share, p.count);
  f.in_place = p.keys.dtype == kRealType<R> && p.keys.stride[2] * int64_t(sizeof(R)) % 4096 != 0;
  if (f.splits > 1) {
    const int64_t entries = p.queries * f.splits * p.count;
    Arena arena{nullptr};
    for (int pass = 0; pass < 2; pass++) {
      f.found = arena.take<int64_t>(p.queries * f.splits);
      f.best = {arena.take<Ordered<R>>(entries), arena.take<Ordered<R>>(entries)};
      if (pass == 0) arena = {static_cast<char*>(scratch(1, arena.used))};
    }
  }
  const bool serial = double(p.queries) * double(p.slots) * double(p.size + 16) < kSerialProducts;
  if (rows) {
    visit_table<R>(p.keys.dtype, [&](auto tag) {
      using T = decltype(tag);
      parallel_tasks(
          f.splits, serial,
          [](void* context, int64_t task) { search_rows<R, T>(*static_cast<const Search<R>*>(context), task); }, &f);
    });
  } else {
    parallel_tasks(
        f.groups * f.splits, serial,
        [](void* context, int64_t task) { search_panels<R>(*static_cast<const Search<R>*>(context), task); }, &f);
  }
  if (f.splits > 1)
    parallel_tasks(
        p.queries, serial,
        [](void* context, int64_t query) { merge<R>(*static_cast<const Search<R>*>(context), query); }, &f);
}

}  // namespace

void topk_scores_fwd(const TopkParams& p) {
  if (p.queries == 0 || p.count == 0) return;
  if (p.keys.dtype == DType::kFloat64)
    choose<double>(p);
  else
    choose<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
