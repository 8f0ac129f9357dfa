// Choosing the k best of a stream of scores. Each query has a buffer of candidates, kept in the order of their slots;
// when it is full, the k best remain, and the worst of them is what a further score must exceed. So what is chosen is
// exact, ties go to the lowest slot, and the order of work never shows.
//
// Scores are held as integers in the same order, which makes one comparison of all: NaN is the largest, and both zeros
// are equal. Small buffers are ranked by comparing all pairs, vectors at a time; large ones by their digits.
#pragma once

#include "simd.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

template <class R>
using Ordered = MaskInt<R>;
template <class R>
constexpr Ordered<R> kLargest = sizeof(R) == 8 ? Ordered<R>(INT64_MAX) : Ordered<R>(INT32_MAX);

template <class R>
ATTNFAST_INLINE Vec<Ordered<R>> ordered(Vec<R> x) {
  using I = Ordered<R>;
  Vec<I> bits = reinterpret_cast<Vec<I>>(x + R(0));  // -0 becomes 0
  bits ^= (bits >> (8 * sizeof(I) - 1)) & kLargest<R>;
  return x == x ? bits : splat(kLargest<R>);
}
template <class R>
ATTNFAST_INLINE Ordered<R> ordered_one(R x) {
  Ordered<R> bits;
  R plus = x + R(0);
  __builtin_memcpy(&bits, &plus, sizeof(bits));
  return x == x ? bits ^ ((bits >> (8 * sizeof(bits) - 1)) & kLargest<R>) : kLargest<R>;
}
template <class R>
ATTNFAST_INLINE R score_of(Ordered<R> bits) {
  R x;
  bits ^= (bits >> (8 * sizeof(bits) - 1)) & kLargest<R>;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// Up to so many candidates are ranked by comparing all pairs.
constexpr int kRankLimit = 192;
template <class R>
constexpr int kRankRoom = kRankLimit + kLanes<R>;

// Entries past the last candidate may be overwritten, up to a vector of them.
template <class R>
struct Candidates {
  Ordered<R>* score;
  Ordered<R>* slot;
};

// rank[i] = number of candidates before i in the result: larger ones, and equal ones of lower slots.
template <class R>
static void rank_all(const Ordered<R>* score, int n, Ordered<R>* rank) {
  using I = Ordered<R>;
  constexpr int N = kLanes<R>;
  const Vec<I> lane = iota<I>();
  for (int t = 0; t < n; t += N) {
    Vec<I> own = load(score + t), above{}, more{};
    int j = 0;
    for (; j < t; j += 2) {  // t is a multiple of N
      above -= splat(score[j]) >= own;
      more -= splat(score[j + 1]) >= own;
    }
    for (; j < t + N && j < n; j++) {
      Vec<I> other = splat(score[j]);
      above -= (other > own) | ((other == own) & (lane > I(j - t)));
    }
    for (; j < n; j++) above -= splat(score[j]) > own;
    store(rank + t, above + more);
  }
}

// The k-th largest of n > k scores, and how many equal to it are among the k: by digits of 8 bits, from the first.
template <class R>
static Ordered<R> kth_largest(const Ordered<R>* score, int64_t n, int64_t k, int64_t& ties) {
  using U = std::make_unsigned_t<Ordered<R>>;
  constexpr int kBits = 8 * sizeof(U);
  constexpr U kSign = U(1) << (kBits - 1);
  U prefix = 0, known = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; i++) {
      U u = U(score[i]) ^ kSign;
      histogram[(u >> shift) & 255] += (u & known) == prefix;
    }
    int digit = 255;
    for (; histogram[digit] < k; digit--) k -= histogram[digit];
    prefix |= U(digit) << shift;
    known |= U(255) << shift;
  }
  ties = k;
  return Ordered<R>(prefix ^ kSign);
}

// Keeps the k best of n > k candidates, still in the order of their slots; returns the worst of them.
template <class R>
__attribute__((noinline)) static Ordered<R> keep_best(Candidates<R> c, int64_t n, int64_t k) {
  using I = Ordered<R>;
  constexpr int N = kLanes<R>;
  if (n <= kRankLimit) {
    alignas(64) I rank[kRankRoom<R>];
    rank_all<R>(c.score, int(n), rank);
    I worst = 0;
    int kept = 0;
    for (int t = 0; t < n; t += N) {
      uint64_t live = n - t >= N ? ~uint64_t(0) : (uint64_t(1) << (n - t)) - 1;
      Vec<I> r = load(rank + t), score = load(c.score + t), slot = load(c.slot + t);
      uint64_t last = live & lane_bits<I>(r == I(k - 1));
      if (last) worst = c.score[t + __builtin_ctzll(last)];
      uint64_t keep = live & lane_bits<I>(r < I(k));
      compress_store(c.score + kept, keep, score);
      kept += compress_store(c.slot + kept, keep, slot);
    }
    return worst;
  }
  int64_t ties, kept = 0;
  I worst = kth_largest<R>(c.score, n, k, ties);
  for (int64_t i = 0; i < n; i++) {
    I score = c.score[i];
    bool tie = score == worst, keep = score > worst || (tie && ties > 0);
    ties -= tie;
    c.score[kept] = score;
    c.slot[kept] = c.slot[i];
    kept += keep;
  }
  return worst;
}

// Sorts by score, larger first, equal ones as they stand: by digits, from the last. `spare` has room for n.
template <class R>
static void sort_candidates(Candidates<R> c, int64_t n, Candidates<R> spare) {
  using U = std::make_unsigned_t<Ordered<R>>;
  constexpr int kBits = 8 * sizeof(U);
  constexpr U kDescending = ~(U(1) << (kBits - 1));
  Candidates<R> from = c, to = spare;
  for (int shift = 0; shift < kBits; shift += 8) {
    int64_t place[257] = {};
    for (int64_t i = 0; i < n; i++) place[(((U(from.score[i]) ^ kDescending) >> shift) & 255) + 1]++;
    for (int digit = 0; digit < 256; digit++) place[digit + 1] += place[digit];
    for (int64_t i = 0; i < n; i++) {
      int64_t at = place[((U(from.score[i]) ^ kDescending) >> shift) & 255]++;
      to.score[at] = from.score[i];
      to.slot[at] = from.slot[i];
    }
    Candidates<R> swap = from;
    from = to;
    to = swap;
  }
  static_assert(kBits / 8 % 2 == 0, "the result is where it began");
}

// The k best of n candidates, sorted, to one row of the result; slot_of(slot) is what the caller knows a slot as.
// Places without a candidate get -inf and -1. `spare` has room for k.
template <class R, class SlotOf>
static void write_best(Candidates<R> c, int64_t n, int64_t k, Candidates<R> spare, R* scores, int64_t* indices,
                       SlotOf slot_of) {
  using I = Ordered<R>;
  if (n > k) {
    keep_best<R>(c, n, k);
    n = k;
  }
  if (n <= kRankLimit) {
    alignas(64) I rank[kRankRoom<R>];
    rank_all<R>(c.score, int(n), rank);
    for (int64_t i = 0; i < n; i++) {
      scores[rank[i]] = score_of<R>(c.score[i]);
      indices[rank[i]] = slot_of(c.slot[i]);
    }
  } else {
    sort_candidates<R>(c, n, spare);
    for (int64_t i = 0; i < n; i++) {
      scores[i] = score_of<R>(c.score[i]);
      indices[i] = slot_of(c.slot[i]);
    }
  }
  for (int64_t i = n; i < k; i++) {
    scores[i] = -infinity<R>();
    indices[i] = -1;
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
