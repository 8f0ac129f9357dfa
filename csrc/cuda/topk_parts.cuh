// What the kernels that choose slots share: how many queries a block has, and what becomes of its candidates.
#pragma once

#include "cuda/device/candidates.cuh"
#include "cuda/topk_scores.h"

namespace attnfast::cuda {

// Queries of a block, and the largest k that their candidates are made for.
constexpr int topk_queries(TopkSize size) { return size == TopkSize::kMany ? 32 : size == TopkSize::kSome ? 8 : 2; }
constexpr int topk_max_count(TopkSize size) {
  return size == TopkSize::kMany ? 64 : size == TopkSize::kSome ? 512 : 2048;
}

// Lists of many queries are short and many: a warp has one. The others have the whole block.
template <TopkSize SIZE, int kThreads>
struct TopkTeam {
  using Type = BlockTeam<kThreads>;
};
template <int kThreads>
struct TopkTeam<TopkSize::kMany, kThreads> {
  using Type = WarpTeam;
};

// What a block has of a call: queries from `first_query` on, and slots [begin, end).
struct TopkPart {
  int64_t first_query, split, begin, end;
};
template <int kQueries>
ATTNFAST_DEVICE TopkPart topk_part(const TopkParams& p, int64_t share, int64_t splits) {
  const int64_t block = blockIdx.x, split = block % splits, begin = split * share;
  return {block / splits * kQueries, split, begin, begin + share < p.slots ? begin + share : p.slots};
}

// The k best of a sorted list to one row of the result; places without a candidate get -inf and -1.
template <class Team, class R>
ATTNFAST_DEVICE void write_best(const TopkParams& p, const CandidateList<R>& c, int64_t query, int lane) {
  const int n = *c.count;
  for (int64_t i = lane; i < p.count; i += Team::kSize) {
    const bool there = i < n;
    static_cast<R*>(p.scores)[query * p.count + i] = there ? c.list[i].score() : -static_cast<R>(__builtin_inf());
    p.indices[query * p.count + i] = there ? static_cast<int64_t>(c.list[i].slot()) : -1;
  }
}

// The best of a block's slots for one query: to the result, or with several ranges to the workspace, a list for each.
// What was appended is behind a barrier.
template <class Team, class R>
ATTNFAST_DEVICE void finish_query(const TopkParams& p, const CandidateList<R>& c, int64_t query, int64_t split,
                                  int64_t splits, Candidate<R>* workspace, int lane) {
  Team::sync();  // make_room has set its count
  const int count = static_cast<int>(p.count);
  c.template keep_best<Team>(count, lane);
  if (splits == 1) return write_best<Team>(p, c, query, lane);
  const int n = *c.count;
  Candidate<R>* to = workspace + (query * splits + split) * count;
  for (int i = lane; i < count; i += Team::kSize) to[i] = i < n ? c.list[i] : Candidate<R>{};
}

}  // namespace attnfast::cuda
