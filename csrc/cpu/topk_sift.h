// Sifting: products of bfloat16, at twice the rate of float32's, tell which scores cannot exceed their thresholds; only
// the others are formed. The scores themselves never come from these products, so they change no bit of the result.
//
// Rounding both factors to bfloat16 moves a score by at most (2^-7 + ...) |query| |key|. With the lengths at hand, a
// score whose bfloat16 product stays below its threshold by that much is done with. Once some thousand slots have been
// seen little else is left: some pairs of a slot and a vector of queries, whose scores are formed as a tile forms them,
// element after element. Where much is left, in data whose scores lie close together, tiles are formed as before.
#pragma once

#include "topk_panel.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// Keys of a chunk as sifting reads them.
struct Sieve {
  BFloat16* rows;
  int64_t stride;
  float* margin;  // how far rounding can move a score of this key, for a query of length 1; infinite: not known
};

constexpr int kSiftPending = 4;  // pairs whose scores are formed together
constexpr int kSiftMost = 8;     // pairs of one tile, above which the whole tile is formed
constexpr int kSiftPause = 8;    // chunks

// Lengths beyond it are taken as not known: products could overflow.
constexpr float kLongest = 0x1p60f;
// Stands for what underflows.
constexpr float kShortest = 0x1p-50f;

// Whether enough has been seen for sifting to pay: that few pairs of a tile are still of interest.
static inline bool worth_sifting(int64_t seen, int64_t k) {
  return seen >= k * kTileRows * kTileCols * kLanes<float> / kSiftPending;
}

#if ATTNFAST_PAIRS
// [count][D] rows of floats to the sieve.
static void prepare_sieve(Rows<float> keys, int64_t count, int64_t size, const Sieve& sieve) {
  constexpr int L = kLanes<float>;
  // Both factors rounded: 2^-8 each and their product; float32 sums, of either kind: 2^-23 a step at most.
  const float relative = 0x1.02p-7f + float(size) * 0x1p-22f;
  for (int64_t i = 0; i < count; i += L) {
    VecF squares[L];
    for (int r = 0; r < L; r++) {
      const int64_t own = i + r < count ? i + r : count - 1;
      const float* row = keys.data + own * keys.stride;
      BFloat16* to = sieve.rows + own * sieve.stride;
      VecF sum{};
      for (int64_t d = 0; d < size; d += 2 * L) {
        auto part = [&](int64_t at) ATTNFAST_LAMBDA {
          return at + L <= size ? load(row + at) : at < size ? load_partial<float>(row + at, int(size - at)) : VecF{};
        };
        VecF low = part(d), high = part(d + L);
        sum += low * low;
        sum += high * high;
        store(reinterpret_cast<uint32_t*>(to + d), round_two(low, high));
      }
      squares[r] = sum;
    }
    VecF length = square_root(sum_of_rows<1, float>(squares));
    store(sieve.margin + i, length < kLongest ? (length + kShortest) * relative : splat(infinity<float>()));
  }
}

// The panel's queries, packed as float32, as pairs along D; without, if a length is not known.
static void prepare_panel(Panel<float>& panel, int64_t size, uint32_t* pairs) {
  constexpr int L = kLanes<float>;
  const int64_t width = panel.vectors * L;
  panel.pairs = pairs;
  for (int v = 0; v < panel.vectors; v++) {
    VecF squares{}, any{};
    for (int64_t d = 0; d < size; d += 2) {
      VecF low = load(panel.packed + d * width + v * L);
      VecF high = d + 1 < size ? load(panel.packed + (d + 1) * width + v * L) : VecF{};
      squares += low * low;
      squares += high * high;
      any = low != 0.0f || high != 0.0f ? splat(1.0f) : any;
      store(pairs + d / 2 * width + v * L, interleave_halves(round_two(low, high)));
    }
    for (int l = 0; l < L; l++) {
      // A query of zeros has scores of zero, exactly: a margin would let all pass.
      float length = __builtin_sqrtf(squares[l]);
      panel.reach[v * L + l] = any[l] != 0.0f ? length + kShortest : 0.0f;
      if (!(length < kLongest)) panel.pairs = nullptr;
    }
  }
}

// Pairs of a slot and a vector of queries whose scores are to be formed.
struct Pending {
  int64_t row[kSiftPending];
  int vector[kSiftPending];
  int count = 0;
};

template <int N>
static void form_pending(const Search<float>& f, Panel<float>& panel, Rows<float> keys, int64_t slot,
                         const uint64_t* visible, Pending& pending) {
  constexpr int L = kLanes<float>, W = N * L;
  const float *a[kSiftPending], *q[kSiftPending];
  VecF c[kSiftPending] = {};
  for (int i = 0; i < kSiftPending; i++) {
    int from = i < pending.count ? i : 0;
    a[i] = keys.data + pending.row[from] * keys.stride;
    q[i] = panel.packed + pending.vector[from] * L;
  }
  for (int64_t d = 0; d < f.p->size; d++) {
    ATTNFAST_UNROLL for (int i = 0; i < kSiftPending; i++) c[i] += splat(a[i][d]) * load(q[i] + d * W);
  }
  for (int i = 0; i < pending.count; i++) {
    const int first = pending.vector[i] * L;
    uint64_t bits = not_at_most_bits<float>(c[i], load(panel.threshold + first));
    bits &= (visible ? panel.lanes & visible[pending.row[i]] : panel.lanes) >> first;
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctzll(bits);
      push(f, panel, first + lane, c[i][lane], slot + pending.row[i]);
    }
  }
  pending.count = 0;
}

// As form<float, N, false>.
template <int N>
static void sift(const Search<float>& f, Panel<float>& panel, Rows<float> keys, const Sieve& sieve, int64_t slot,
                 int64_t count, const uint64_t* visible, float* S, float* tail) {
  constexpr int M = N == kTileCols ? kTileRows : 2 * kTileRows;
  constexpr int L = kLanes<float>, W = N * L;
  const int64_t steps = steps_of<BFloat16>(f.p->size), whole = count / M * M;
  Pending pending;
  int64_t formed = 0;
  auto flush = [&] {
    if (pending.count > 0) form_pending<N>(f, panel, keys, slot, visible, pending);
  };
  auto form_tile = [&](int64_t j, int64_t rows) {
    flush();
    form<float, N, false>(f, panel, {keys.data + j * keys.stride, keys.stride}, slot + j, rows,
                          visible ? visible + j : nullptr, S, tail);
  };
  for (int64_t j = 0; j < whole; j += M) {
    float margin = 0;
    uint64_t any = visible ? 0 : ~uint64_t(0);
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
      margin = sieve.margin[j + i] > margin ? sieve.margin[j + i] : margin;
      if (visible) any |= visible[j + i];
    }
    if ((any & panel.lanes) == 0) continue;
    if (!(margin < infinity<float>())) {
      form_tile(j, M);
      continue;
    }
    const BFloat16* a = sieve.rows + j * sieve.stride;
    VecF c[M][N] = {};
    multiply<float, M, N, false, BFloat16>(steps, a, sieve.stride, panel.pairs, W, c);
    VecF t[N];
    ATTNFAST_UNROLL for (int v = 0; v < N; v++) t[v] =
        load(panel.threshold + v * L) - margin * load(panel.reach + v * L);
    if (__builtin_expect(!any_not_at_most<float, M, N>(c, t), 1)) continue;
    uint32_t found[M];  // one bit a vector
    int pairs = 0;
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
      found[i] = 0;
      const uint64_t live = visible ? panel.lanes & visible[j + i] : panel.lanes;
      ATTNFAST_UNROLL for (int v = 0; v < N; v++) found[i] |=
          uint32_t((not_at_most_bits<float>(c[i][v], t[v]) & (live >> (v * L))) != 0) << v;
      pairs += __builtin_popcount(found[i]);
    }
    formed += pairs;
    if (pairs > kSiftMost) {
      form_tile(j, M);
      continue;
    }
    for (int i = 0; i < M; i++)
      for (uint32_t rest = found[i]; rest != 0; rest &= rest - 1) {
        pending.row[pending.count] = j + i;
        pending.vector[pending.count] = __builtin_ctz(rest);
        if (++pending.count == kSiftPending) flush();
      }
  }
  if (whole < count) form_tile(whole, count - whole);
  flush();
  if (formed > count * N / 4) panel.pause = kSiftPause;
}
#endif

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
