// How a backward is cut into tasks. What a task computes follows from shapes alone; the number of threads chooses only
// among schedules that give the same bits.
//
// The keys of a sequence form a few parts, and dQ is the sum over parts in order of what each part gives.
#pragma once

#include "../core/masks.h"
#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kMaxParts = 8;
constexpr int kMinTilesPerPart = 2;
constexpr int64_t kPartBytes = int64_t{32} << 20;  // what dQ of all parts may take together, roughly

static inline int64_t part_count(int64_t tiles, int64_t query_bytes) {
  return clamp_index(query_bytes > 0 ? kPartBytes / query_bytes : 1, 1,
                     clamp_index(tiles / kMinTilesPerPart, 1, kMaxParts));
}

enum class Schedule { kHeads, kParts, kTwoPasses };

// Pairs of a query and a key that one head of a sequence forms, roughly.
static inline double sequence_work(const AttentionParams& p, int64_t b) {
  Sequence s = sequence_of(p, b);
  return double(s.queries) * double(s.keys);
}

// The schedule that should end first, by products a tile and by how evenly its tasks can be shared.
static inline Schedule choose_schedule(const AttentionParams& p, int64_t threads, int64_t parts) {
  if (threads <= 1) return Schedule::kHeads;
  double total = 0, longest = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    double work = sequence_work(p, b);
    total += work * double(p.kv_heads);
    longest = work > longest ? work : longest;
  }
  int64_t key_heads = p.batch * p.kv_heads;
  double share = total / double(threads);
  // Equal tasks come in rounds; unequal ones, the longest first, end together but for the longest.
  double heads = total >= longest * double(key_heads) ? double((key_heads + threads - 1) / threads) * longest
                 : share > longest                    ? share
                                                      : longest;
  // Half of a task is what threads wait for each other at the end, one time with another. Parts load queries again.
  double part = longest / double(parts), by_parts = share > part ? share + 0.5 * part : part;
  double cost[] = {5.0 * heads, 5.15 * by_parts, 7.0 * share};
  if (cost[0] <= cost[1] && cost[0] <= cost[2]) return Schedule::kHeads;
  return parts > 1 && cost[1] <= cost[2] ? Schedule::kParts : Schedule::kTwoPasses;
}

// order = the sequences by falling work, equal ones as they come (shell sort: no header of the library).
static inline void sort_by_work(const AttentionParams& p, int64_t* order, double* work) {
  for (int64_t b = 0; b < p.batch; b++) {
    order[b] = b;
    work[b] = sequence_work(p, b);
  }
  auto before = [&](int64_t x, int64_t y) { return work[x] != work[y] ? work[x] > work[y] : x < y; };
  for (int64_t gap = p.batch / 2; gap > 0; gap /= 2)
    for (int64_t i = gap; i < p.batch; i++) {
      int64_t b = order[i], j = i;
      for (; j >= gap && before(b, order[j - gap]); j -= gap) order[j] = order[j - gap];
      order[j] = b;
    }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
