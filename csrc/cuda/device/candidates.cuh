// Choosing the k best of a stream of scores: candidates in shared memory, sorted when their buffer is full.
//
// A candidate is a score and a slot in one integer that orders both: larger scores first, NaN as the largest, both
// zeros equal, and of equal scores the lower slot. No two candidates are equal, so neither the order in which threads
// append nor the way they are sorted shows in the result.
#pragma once

#include "cuda/device/elements.cuh"

namespace attnfast::cuda {

template <class R>
struct Candidate;

template <>
struct Candidate<float> {
  uint64_t bits;  // 0: none, which is less than any

  ATTNFAST_DEVICE static Candidate of(float score, uint32_t slot) {
    uint32_t word;
    const float plus = score + 0.0f;  // -0 becomes 0
    memcpy(&word, &plus, sizeof(word));
    word = word >> 31 ? ~word : word | 0x80000000u;
    if (score != score) word = 0xFFFFFFFFu;
    return {static_cast<uint64_t>(word) << 32 | static_cast<uint32_t>(~slot)};
  }
  ATTNFAST_DEVICE bool before(const Candidate& other) const { return bits > other.bits; }
  ATTNFAST_DEVICE bool is_none() const { return bits == 0; }
  ATTNFAST_DEVICE uint32_t slot() const { return ~static_cast<uint32_t>(bits); }
  ATTNFAST_DEVICE float score() const {
    uint32_t word = static_cast<uint32_t>(bits >> 32);
    word = word >> 31 ? word & 0x7FFFFFFFu : ~word;  // of NaN all bits are set, and it stays one
    float x;
    memcpy(&x, &word, sizeof(x));
    return x;
  }
};

template <>
struct alignas(16) Candidate<double> {
  uint64_t bits, order;  // the score; the slot, complemented

  ATTNFAST_DEVICE static Candidate of(double score, uint32_t slot) {
    uint64_t word;
    const double plus = score + 0.0;
    memcpy(&word, &plus, sizeof(word));
    word = word >> 63 ? ~word : word | uint64_t(1) << 63;
    if (score != score) word = ~uint64_t(0);
    return {word, static_cast<uint32_t>(~slot)};
  }
  ATTNFAST_DEVICE bool before(const Candidate& other) const {
    return bits > other.bits || (bits == other.bits && order > other.order);
  }
  ATTNFAST_DEVICE bool is_none() const { return bits == 0; }
  ATTNFAST_DEVICE uint32_t slot() const { return ~static_cast<uint32_t>(order); }
  ATTNFAST_DEVICE double score() const {
    uint64_t word = bits >> 63 ? bits & ~(uint64_t(1) << 63) : ~bits;
    double x;
    memcpy(&x, &word, sizeof(x));
    return x;
  }
};

// A warp or the whole block: who works on one buffer together.
struct WarpTeam {
  static constexpr int kSize = 32;
  ATTNFAST_DEVICE static void sync() { __syncwarp(); }
};
template <int kThreads>
struct BlockTeam {
  static constexpr int kSize = kThreads;
  ATTNFAST_DEVICE static void sync() { __syncthreads(); }
};

// Sorts n candidates, the best first. The whole team comes here; before it and after it, it is in step.
//
// A bitonic network whose comparators all put the better one at the lower place: each merge begins by comparing places
// that mirror one another. So places past the n-th, of any power of two, can be left out: nothing would move there.
template <class Team, class C>
ATTNFAST_DEVICE void sort_candidates(C* list, int n, int lane) {
  const auto order = [&](int low, int high) {
    if (high >= n) return;
    const C a = list[low], b = list[high];
    if (!b.before(a)) return;
    list[low] = b;
    list[high] = a;
  };
#pragma unroll 1
  for (int bit = 0; 1 << bit < n; ++bit) {  // lists of 2^bit candidates, merged in pairs
    const int half = 1 << bit;
    for (int i = lane; (i >> bit << (bit + 1)) + (i & (half - 1)) < n; i += Team::kSize) {
      const int first = i >> bit << (bit + 1), place = i & (half - 1);
      order(first + place, first + 2 * half - 1 - place);
    }
    Team::sync();
#pragma unroll 1
    for (int step = bit - 1; step >= 0; --step) {
      const int stride = 1 << step;
      for (int i = lane; (i >> step << (step + 1)) + (i & (stride - 1)) < n; i += Team::kSize) {
        const int low = (i >> step << (step + 1)) + (i & (stride - 1));
        order(low, low + stride);
      }
      Team::sync();
    }
  }
}

// Of n candidates, the first k of which are sorted, the k best in order in the first k places. Sorting the others alone
// and one merge cost a third of sorting all. The team is in step before it and after it.
template <class Team, class C>
ATTNFAST_DEVICE void merge_candidates(C* list, int k, int n, int lane) {
  const int more = n - k;
  sort_candidates<Team>(list + k, more, lane);
  // Of two sorted lists the k best are the better ones of each pair, if one list is read backwards: they fall and then
  // rise, which the last stages of a bitonic network sort. Places before the first, up to a power of two, hold what is
  // better than all: nothing would move there.
  for (int i = lane; i < k; i += Team::kSize) {
    const int other = k - 1 - i;
    if (other < more && list[k + other].before(list[i])) list[i] = list[k + other];
  }
  Team::sync();
  int bits = 0;
  while (1 << bits < k) ++bits;
  const int before = (1 << bits) - k;
#pragma unroll 1
  for (int step = bits - 1; step >= 0; --step) {
    const int stride = 1 << step;
    for (int i = lane; 2 * i < 1 << bits; i += Team::kSize) {
      const int low = (i >> step << (step + 1)) + (i & (stride - 1)) - before;
      if (low < 0) continue;
      const C a = list[low], b = list[low + stride];
      if (!b.before(a)) continue;
      list[low] = b;
      list[low + stride] = a;
    }
    Team::sync();
  }
}

// The candidates of one query, all in shared memory. What is appended must be better than the threshold: the worst of
// the k best when there was no room last, which have been in order in the first k places since. Before that there is no
// threshold and no order.
template <class R>
struct CandidateList {
  Candidate<R>* list;
  Candidate<R>* threshold;
  int* count;

  ATTNFAST_DEVICE void append(const Candidate<R>& candidate) const { list[atomicAdd(count, 1)] = candidate; }

  // The best come first, at least k of them if there are so many. The team comes here in step and leaves in step.
  template <class Team>
  ATTNFAST_DEVICE void keep_best(int k, int lane) const {
    if (threshold->is_none())
      sort_candidates<Team>(list, *count, lane);
    else
      merge_candidates<Team>(list, k, *count, lane);
  }

  // Makes room for `incoming` more; `capacity` is at least k + incoming. The team comes here in step, and what is
  // appended next must be behind a barrier.
  template <class Team>
  ATTNFAST_DEVICE void make_room(int k, int incoming, int capacity, int lane) const {
    if (*count + incoming <= capacity) return;
    keep_best<Team>(k, lane);
    if (lane == 0) {
      *threshold = list[k - 1];
      *count = k;
    }
  }
};

}  // namespace attnfast::cuda
