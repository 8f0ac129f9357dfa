// A panel of queries that looks for its k best slots: what is known of each query, its first threshold, and the tiles
// that form scores and pass on what exceeds the thresholds.
#pragma once

#include "gemm_tile.h"
#include "topk_select.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int64_t kDepth = 128;  // of the product formed at a time: that much of a panel stays in L1

template <class R>
struct Search {
  const TopkParams* p;
  int64_t panels, group, groups;  // group: panels of a task
  int64_t splits, share;          // share: slots of a range
  int64_t chunk;                  // slots that the panels of a task visit together
  int64_t capacity;               // of a buffer of candidates
  bool in_place;                  // keys can be read where they are
  bool sifted;                    // bfloat16 products may tell which scores need not be formed
  // With several ranges, what each found: [query][range][k].
  int64_t* found;
  Candidates<R> best;
};

// The queries of a panel and what is known of each.
template <class R>
struct Panel {
  int64_t first;  // query
  int queries, vectors;
  const R* packed;        // [D][vectors]
  R* threshold;           // what a score must exceed: NaN at first, which everything does
  const uint32_t* pairs;  // the same rounded to bfloat16, [D / 2][vectors]; null: not to be used. See topk_sift.h
  R* reach;               // length of each query, nearly
  int pause;              // chunks for which sifting does not pay
  uint64_t lanes;         // one bit a query
  int32_t* count;         // of candidates
  Ordered<R>* buffer;     // of each query: capacity scores, then as many slots, both with a vector of room
};

template <class R>
static int64_t buffer_half(const Search<R>& f) {
  return f.capacity + kLanes<R>;
}
template <class R>
static Candidates<R> candidates(const Search<R>& f, const Panel<R>& panel, int lane) {
  Ordered<R>* own = panel.buffer + 2 * lane * buffer_half(f);
  return {own, own + buffer_half(f)};
}

// ---------------------------------------------------------------- candidates of a panel

template <class R>
ATTNFAST_INLINE void push(const Search<R>& f, Panel<R>& panel, int lane, R score, int64_t slot) {
  Candidates<R> c = candidates(f, panel, lane);
  int n = panel.count[lane];
  c.score[n] = ordered_one(score);
  c.slot[n] = Ordered<R>(slot);
  if (++n == f.capacity) {
    panel.threshold[lane] = score_of<R>(keep_best<R>(c, n, f.p->count));
    n = int(f.p->count);
  }
  panel.count[lane] = n;
}

// Candidates among `rows` slots from `slot` on, whose scores are S[row][lane]. INCLUSIVE: the threshold bounds the k-th
// best from below, but stands for no candidates yet, so a score may also equal it.
template <class R, int N, bool INCLUSIVE>
__attribute__((noinline)) static void filter(const Search<R>& f, Panel<R>& panel, const R* S, int64_t slot, int rows,
                                             const uint64_t* visible) {
  constexpr int L = kLanes<R>;
  for (int i = 0; i < rows; i++, S += N * L) {
    uint64_t bits = 0;
    ATTNFAST_UNROLL for (int v = 0; v < N; v++) {
      Vec<R> x = load(S + v * L), t = load(panel.threshold + v * L);
      uint64_t own = INCLUSIVE ? lane_bits<MaskInt<R>>(~(x < t)) : not_at_most_bits<R>(x, t);
      bits |= own << (v * L);
    }
    bits &= visible ? panel.lanes & visible[i] : panel.lanes;
    for (; bits != 0; bits &= bits - 1) {
      int lane = __builtin_ctzll(bits);
      push(f, panel, lane, S[lane], slot + i);
    }
  }
}

// A lower bound of the k-th best of n scores for each lane: of the maxima of 2 * power groups the power-th largest,
// where power >= k. NaN, the largest score of all, is passed over, which only lowers the bound.
template <class R, int N>
static void bound(const R* S, int64_t n, int power, R* threshold, R* maxima) {
  constexpr int L = kLanes<R>;
  const int groups = 2 * power;
  auto order = [](R* low, R* high) ATTNFAST_LAMBDA {
    Vec<R> a = load(low), b = load(high), m = larger<R>(a, b);
    store(low, m == a ? b : a);
    store(high, m);
  };
  for (int v = 0; v < N; v++) {
    for (int g = 0; g < groups; g++) {
      Vec<R> m = splat(-infinity<R>());
      for (int64_t i = g; i < n; i += groups) m = larger<R>(load(S + (i * N + v) * L), m);
      store(maxima + g * L, m);
    }
    for (int half = 0; half < 2; half++) {  // Batcher's odd-even merge sort, upwards, each lane on its own
      R* x = maxima + half * power * L;
      for (int p = 1; p < power; p *= 2)
        for (int w = p; w >= 1; w /= 2)
          for (int a = w % p; a + w < power; a += 2 * w)
            for (int i = a; i < a + w && i + w < power; i++)
              if (i / (2 * p) == (i + w) / (2 * p)) order(x + L * i, x + L * (i + w));
    }
    // The larger half of two sorted halves, one of them read backwards, pair by pair.
    Vec<R> least = splat(infinity<R>());
    for (int i = 0; i < power; i++) {
      Vec<R> m = larger<R>(load(maxima + i * L), load(maxima + (groups - 1 - i) * L));
      least = m < least ? m : least;
    }
    // -inf: slots may be hidden, and a true -inf is a score like others.
    store(threshold + v * L, least == -infinity<R>() ? splat(R(__builtin_nan(""))) : least);
  }
}

// ---------------------------------------------------------------- tiles

// c[i][v] += sum_d a[i][d] * q[d][v]; the rows at `ahead` are wanted next.
template <class R, int M, int N>
ATTNFAST_INLINE void accumulate(int64_t depth, const R* a, int64_t stride, const R* ahead, const R* q,
                                Vec<R> (&c)[M][N]) {
  constexpr int64_t kLine = 64 / sizeof(R), W = N * kLanes<R>;
  int64_t d = 0;
  for (; d + kLine <= depth; d += kLine) {
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) prefetch(ahead + i * stride + d);
    multiply<R, M, N, false, R>(kLine, a + d, stride, q + d * W, W, c);
  }
  multiply<R, M, N, false, R>(depth - d, a + d, stride, q + d * W, W, c);
}

// The scores of `count` slots from `slot` on, whose keys are given, for a panel of N vectors. STORE: written to S, for
// the bound to come; otherwise compared with the thresholds, and S holds what is not finished.
template <class R, int N, bool STORE>
static void form(const Search<R>& f, Panel<R>& panel, Rows<R> keys, int64_t slot, int64_t count,
                 const uint64_t* visible, R* S, R* tail) {
  constexpr int M = N == kTileCols ? kTileRows : 2 * kTileRows;
  constexpr int L = kLanes<R>, W = N * L;
  const int64_t size = f.p->size;
  const int64_t pieces = size > kDepth ? (size + kDepth - 1) / kDepth : 1;
  const int64_t depth = (size / pieces + 15) / 16 * 16;
  const int64_t whole = count / M * M;
  // The last rows go through a tile that is filled up with zeros.
  for (int64_t i = whole; whole < count && i < whole + M; i++)
    for (int64_t d = 0; d < size; d++) tail[(i - whole) * size + d] = i < count ? keys.data[i * keys.stride + d] : R(0);
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t d0 = piece * depth < size ? piece * depth : size;
    const int64_t part = piece == pieces - 1 || size - d0 < depth ? size - d0 : depth;
    const bool last = piece == pieces - 1;
    for (int64_t j = 0; j < count; j += M) {
      const int rows = count - j < M ? int(count - j) : M;
      R* s = S + j * W;
      if (visible) {
        uint64_t any = 0;
        for (int i = 0; i < rows; i++) any |= visible[j + i];
        if ((any & panel.lanes) == 0) {
          if (STORE)
            for (int i = 0; i < rows * W; i++) s[i] = -infinity<R>();
          continue;
        }
      }
      const R* a = (j < whole ? keys.data + j * keys.stride : tail) + d0;
      const int64_t stride = j < whole ? keys.stride : size;
      const R* ahead = j + 2 * M <= whole ? a + M * stride : a;
      Vec<R> c[M][N];
      if (piece == 0) {
        ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++) c[i][v] = Vec<R>{};
      } else {
        ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++) c[i][v] =
            load(s + i * W + v * L);
      }
      accumulate<R, M, N>(part, a, stride, ahead, panel.packed + d0 * W, c);
      if (!STORE && last) {
        Vec<R> t[N];
        ATTNFAST_UNROLL for (int v = 0; v < N; v++) t[v] = load(panel.threshold + v * L);
        if (__builtin_expect(!any_not_at_most<R, M, N>(c, t), 1)) continue;
      }
      ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++)
          store(s + i * W + v * L, c[i][v]);
      if (!STORE && last) filter<R, N, false>(f, panel, s, slot + j, rows, visible ? visible + j : nullptr);
    }
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
