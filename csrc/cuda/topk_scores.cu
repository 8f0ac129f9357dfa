// The k best slots for each query, without the matrix of scores: product and choice in one pass over the keys. Here by
// fused multiply-adds, for all that topk_scores_mma.cu does not take, and how a call is cut into blocks.
//
// A block has some queries and a range of slots, which it takes in tiles. The product of a tile is one of registers:
// keys come through shared memory a few columns at a time, queries stay there if they are not too wide. Then each
// score is compared with its query's threshold, and what is better is appended to the query's candidates
// (device/candidates.cuh). After the first tiles that is little. Where candidates could overflow they are sorted, by a
// warp where lists are short and by the block where they are long, and the worst of the k best is the new threshold.
//
// With few queries the slots are split into ranges, whose k best go to the workspace and are merged by a block for each
// query. A score is formed by additions in the order of the columns wherever it is formed, and the choice is exact, so
// neither ranges nor the order of threads show in the result.
#include "cuda/topk_scores.h"

#include <type_traits>

#include "cuda/device/table.cuh"
#include "cuda/launch.h"
#include "cuda/topk_parts.cuh"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kBlocks = 528;      // slots are split until there are about so many
constexpr int64_t kMinShare = 2048;   // slots of a range at least,
constexpr int64_t kShareOfCount = 4;  // or so many times k
constexpr int64_t kShareStep = 256;   // a multiple of every tile

constexpr TopkSize kMany = TopkSize::kMany, kSome = TopkSize::kSome, kFew = TopkSize::kFew;

template <class R, TopkSize SIZE>
struct Plan {
  static constexpr int kQueries = topk_queries(SIZE), kMaxCount = topk_max_count(SIZE);
  static constexpr int kQueriesOfThread = SIZE == kFew ? 2 : 4, kSlotsOfThread = SIZE == kMany ? 4 : 2;
  static constexpr int kQueryGroups = kQueries / kQueriesOfThread, kSlotGroups = kThreads / kQueryGroups;
  static constexpr int kSlots = kSlotGroups * kSlotsOfThread;
  // Columns of a tile of keys; rows in shared memory are 16 bytes longer, so that eight neighbours start in different
  // banks.
  static constexpr int kVector = 16 / static_cast<int>(sizeof(R));
  static constexpr int kColumns = (SIZE == kMany ? 128 : 64) / static_cast<int>(sizeof(R)), kPitch = kColumns + kVector;
  static constexpr int kResident = sizeof(R) == 4 ? 256 : 64;  // up to this size queries stay in shared memory
  // Of kSome so that two blocks of float32 fit the multiprocessor of an A100.
  static constexpr int kCapacity = SIZE == kMany   ? 128
                                   : SIZE == kSome ? (sizeof(R) == 4 ? 768 : 640)
                                                   : (sizeof(R) == 4 ? 3072 : 2304);
  static_assert(kCapacity >= kMaxCount + kSlots && kShareStep % kSlots == 0);

  static constexpr int query_pitch(int64_t size) {
    const int columns = size > 0 ? static_cast<int>(size < kResident ? size : kResident) : 1;
    return size <= kResident ? (columns + kColumns - 1) / kColumns * kColumns + kVector : kPitch;
  }
  static constexpr size_t shared_bytes(int64_t size) {
    const size_t candidates = (kQueries * kCapacity + kQueries) * sizeof(Candidate<R>);
    return candidates + (kSlots * kPitch + kQueries * query_pitch(size)) * sizeof(R) + kQueries * sizeof(int);
  }
};

struct Any {};  // keys whose rows cannot be read 16 bytes at a time; their type is known at run time

// What may be a table in int8, of which slot n stands for key_scales[n] times its elements.
template <class T>
constexpr bool kMayBeCodes = std::is_same_v<T, int8_t> || std::is_same_v<T, Any>;

ATTNFAST_DEVICE float load_any(const TopkParams& p, int64_t at, float) {
  if (p.keys.dtype == DType::kInt8) return static_cast<float>(static_cast<const int8_t*>(p.keys.data)[at]);
  return load_element<float>(p.keys.data, p.keys.dtype, at);
}
ATTNFAST_DEVICE double load_any(const TopkParams& p, int64_t at, double) {
  return static_cast<const double*>(p.keys.data)[at];
}

// Columns [first, first + kColumns) of slots [slot, slot + kSlots) to shared memory, zero where there is none.
template <class R, class T, class P>
ATTNFAST_DEVICE void load_keys(const TopkParams& p, R* tile, int64_t slot, int64_t end, int64_t first) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (std::is_same_v<T, Any>) {
    for (int i = thread; i < P::kSlots * P::kColumns; i += kThreads) {
      const int row = i / P::kColumns, column = i % P::kColumns;
      const bool there = slot + row < end && first + column < p.size;
      tile[row * P::kPitch + column] =
          there ? load_any(p, (slot + row) * p.keys.stride[2] + first + column, R(0)) : R(0);
    }
  } else {
    constexpr int kWidth = 16 / static_cast<int>(sizeof(T)), kVectors = P::kColumns / kWidth;
    static_assert(P::kSlots * kVectors % kThreads == 0);
    constexpr int kLoads = P::kSlots * kVectors / kThreads;
    Pack<T, kWidth> pack[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = (thread + l * kThreads) / kVectors, column = (thread + l * kThreads) % kVectors * kWidth;
      pack[l] = {};
      if (slot + row >= end) continue;
      const T* from = static_cast<const T*>(p.keys.data) + (slot + row) * p.keys.stride[2] + first + column;
      if (first + column + kWidth <= p.size) {
        pack[l] = *reinterpret_cast<const Pack<T, kWidth>*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (first + column + e < p.size) pack[l].x[e] = from[e];
        }
      }
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = (thread + l * kThreads) / kVectors, column = (thread + l * kThreads) % kVectors * kWidth;
#pragma unroll
      for (int e = 0; e < kWidth; e += P::kVector) {
        Pack<R, P::kVector> wide;
#pragma unroll
        for (int f = 0; f < P::kVector; ++f) wide.x[f] = widen<R>(pack[l].x[e + f]);
        *reinterpret_cast<Pack<R, P::kVector>*>(tile + row * P::kPitch + column + e) = wide;
      }
    }
  }
}

// Columns [first, first + columns) of the block's queries, times the scale.
template <class R, class P>
ATTNFAST_DEVICE void load_queries(const TopkParams& p, R* tile, int pitch, int64_t query, int64_t first, int columns) {
  for (int i = static_cast<int>(threadIdx.x); i < P::kQueries * columns; i += kThreads) {
    const int row = i / columns, column = i % columns;
    R x = R(0);
    if (query + row < p.queries && first + column < p.size) {
      x = static_cast<R>(p.scale) *
          load_element<R>(p.query.data, p.query.dtype,
                          (query + row) * p.query.stride[2] + (first + column) * p.query.stride[3]);
    }
    tile[row * pitch + column] = x;
  }
}

template <class R, class T, TopkSize SIZE>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 4 ? 4 : 2)
    topk_scores_kernel(TopkParams p, int64_t share, int64_t splits, int query_pitch, Candidate<R>* workspace) {
  using P = Plan<R, SIZE>;
  using Team = typename TopkTeam<SIZE, kThreads>::Type;
  constexpr int kTeams = kThreads / Team::kSize;
  ATTNFAST_SHARED(shared);
  Candidate<R>* lists = reinterpret_cast<Candidate<R>*>(shared);
  Candidate<R>* thresholds = lists + P::kQueries * P::kCapacity;
  R* keys = reinterpret_cast<R*>(thresholds + P::kQueries);
  R* queries = keys + P::kSlots * P::kPitch;
  int* counts = reinterpret_cast<int*>(queries + P::kQueries * query_pitch);
  const int thread = static_cast<int>(threadIdx.x), team = thread / Team::kSize, lane = thread % Team::kSize;
  const int tx = thread % P::kSlotGroups, ty = thread / P::kSlotGroups;
  const auto [first_query, split, begin, end] = topk_part<P::kQueries>(p, share, splits);
  const bool resident = p.size <= P::kResident;
  const int count = static_cast<int>(p.count);
  const auto candidates = [&](int q) { return CandidateList<R>{lists + q * P::kCapacity, thresholds + q, counts + q}; };

  if (thread < P::kQueries) {
    thresholds[thread] = {};
    counts[thread] = 0;
  }
  if (resident) load_queries<R, P>(p, queries, query_pitch, first_query, 0, query_pitch - P::kVector);

#pragma unroll 1
  for (int64_t slot = begin; slot < end; slot += P::kSlots) {
    R score[P::kQueriesOfThread][P::kSlotsOfThread] = {};
    int64_t d = 0;
#pragma unroll 1
    do {                // once for D = 0, whose scores are 0
      __syncthreads();  // the columns before are no longer read, and candidates are in order
      load_keys<R, T, P>(p, keys, slot, end, d);
      if (!resident) load_queries<R, P>(p, queries, query_pitch, first_query, d, P::kColumns);
      __syncthreads();
      const R* q = queries + ty * query_pitch + (resident ? d : 0);
#pragma unroll 2
      for (int e = 0; e < P::kColumns; e += P::kVector) {
        Pack<R, P::kVector> k[P::kSlotsOfThread];
#pragma unroll
        for (int j = 0; j < P::kSlotsOfThread; ++j) {
          k[j] = *reinterpret_cast<const Pack<R, P::kVector>*>(keys + (tx + j * P::kSlotGroups) * P::kPitch + e);
        }
#pragma unroll
        for (int i = 0; i < P::kQueriesOfThread; ++i) {
          const auto x = *reinterpret_cast<const Pack<R, P::kVector>*>(q + i * P::kQueryGroups * query_pitch + e);
#pragma unroll
          for (int j = 0; j < P::kSlotsOfThread; ++j)
#pragma unroll
            for (int f = 0; f < P::kVector; ++f) score[i][j] += x.x[f] * k[j].x[f];
        }
      }
      d += P::kColumns;
    } while (d < p.size);

#pragma unroll
    for (int i = 0; i < P::kQueriesOfThread; ++i) {
      const int q = ty + i * P::kQueryGroups;
      if (first_query + q >= p.queries) continue;
      const CandidateList<R> list = candidates(q);
      const Candidate<R> threshold = *list.threshold;
#pragma unroll
      for (int j = 0; j < P::kSlotsOfThread; ++j) {
        const int64_t n = slot + tx + j * P::kSlotGroups;
        if (n >= end) continue;
        R s = score[i][j];
        if constexpr (kMayBeCodes<T> && sizeof(R) == 4) {
          if (p.key_scales) s *= p.key_scales[n];
        }
        const Candidate<R> candidate = Candidate<R>::of(s, static_cast<uint32_t>(n));
        if (!candidate.before(threshold)) continue;
        if (p.mask.data) {
          const int64_t at = (first_query + q) * p.mask.stride[2] + n * p.mask.stride[3];
          if (static_cast<const uint8_t*>(p.mask.data)[at] == 0) continue;
        }
        list.append(candidate);
      }
    }
    __syncthreads();
    for (int q = team; q < P::kQueries; q += kTeams) {
      candidates(q).template make_room<Team>(count, P::kSlots, P::kCapacity, lane);
    }
  }

  for (int q = team; q < P::kQueries; q += kTeams) {
    if (first_query + q >= p.queries) break;
    finish_query<Team>(p, candidates(q), first_query + q, split, splits, workspace, lane);
  }
}

// One query: the k best of what its ranges of slots gave.
template <class R>
__global__ void __launch_bounds__(kThreads)
    topk_merge_kernel(TopkParams p, int64_t splits, const Candidate<R>* workspace) {
  constexpr int kCapacity = Plan<R, kFew>::kCapacity, kTile = kCapacity - Plan<R, kFew>::kMaxCount;
  ATTNFAST_SHARED(shared);
  Candidate<R>* all = reinterpret_cast<Candidate<R>*>(shared);
  const CandidateList<R> list = {all, all + kCapacity, reinterpret_cast<int*>(all + kCapacity + 1)};
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t query = blockIdx.x, total = splits * p.count;
  if (thread == 0) {
    *list.threshold = {};
    *list.count = 0;
  }
  for (int64_t first = 0; first < total; first += kTile) {
    __syncthreads();
    const Candidate<R> threshold = *list.threshold;
    for (int64_t i = first + thread; i < first + kTile && i < total; i += kThreads) {
      const Candidate<R> candidate = workspace[query * total + i];
      if (!candidate.is_none() && candidate.before(threshold)) list.append(candidate);
    }
    __syncthreads();
    list.template make_room<BlockTeam<kThreads>>(static_cast<int>(p.count), kTile, kCapacity, thread);
  }
  __syncthreads();
  list.template keep_best<BlockTeam<kThreads>>(static_cast<int>(p.count), thread);
  write_best<BlockTeam<kThreads>>(p, list, query, thread);
}

// ---- Launches --------------------------------------------------------------------------------------------------

TopkSchedule schedule_of(const TopkParams& p) {
  TopkSchedule s{};
  s.size = p.count > topk_max_count(kSome) || p.queries <= topk_queries(kFew)    ? kFew
           : p.count > topk_max_count(kMany) || p.queries <= topk_queries(kSome) ? kSome
                                                                                 : kMany;
  const int64_t queries = topk_queries(s.size);
  s.groups = (p.queries + queries - 1) / queries;
  const int64_t least = kMinShare > kShareOfCount * p.count ? kMinShare : kShareOfCount * p.count;
  const int64_t wanted = kBlocks / (s.groups > 0 ? s.groups : 1), possible = p.slots / least;
  int64_t splits = wanted < possible ? wanted : possible;
  if (splits < 1) splits = 1;
  s.share = (p.slots + splits - 1) / splits;
  s.share = (s.share + kShareStep - 1) / kShareStep * kShareStep;
  s.splits = s.share > 0 ? (p.slots + s.share - 1) / s.share : 1;
  return s;
}

template <class R>
void launch_merge(const TopkParams& p, const TopkSchedule& s, void* workspace, Stream stream) {
  if (s.splits == 1) return;
  constexpr const char* kMerge = "topk_merge";
  constexpr size_t kMergeBytes = (Plan<R, kFew>::kCapacity + 1) * sizeof(Candidate<R>) + sizeof(int);
  allow_shared(topk_merge_kernel<R>, kMergeBytes, kMerge, p);
  ATTNFAST_LAUNCH((topk_merge_kernel<R>), static_cast<unsigned>(p.queries), kThreads, kMergeBytes, stream, p, s.splits,
                  static_cast<const Candidate<R>*>(workspace));
  check_launched(kMerge, p);
}

template <class R, class T, TopkSize SIZE>
void launch(const TopkParams& p, const TopkSchedule& s, void* workspace, Stream stream) {
  using P = Plan<R, SIZE>;
  static_assert(P::shared_bytes(P::kResident) <= 99 * 1024, "what sm_120 has for a block");
  constexpr const char* kName = "topk_scores";
  const size_t bytes = P::shared_bytes(p.size);
  allow_shared(topk_scores_kernel<R, T, SIZE>, bytes, kName, p);
  ATTNFAST_LAUNCH((topk_scores_kernel<R, T, SIZE>), static_cast<unsigned>(s.groups * s.splits), kThreads, bytes, stream,
                  p, s.share, s.splits, P::query_pitch(p.size), static_cast<Candidate<R>*>(workspace));
  check_launched(kName, p);
}

template <class R, class T>
void launch_by_size(const TopkParams& p, const TopkSchedule& s, void* workspace, Stream stream) {
  if (s.size == kMany)
    launch<R, T, kMany>(p, s, workspace, stream);
  else if (s.size == kSome)
    launch<R, T, kSome>(p, s, workspace, stream);
  else
    launch<R, T, kFew>(p, s, workspace, stream);
  launch_merge<R>(p, s, workspace, stream);
}

template <class T>
bool rows_are_vectors(const TopkParams& p) {
  return reinterpret_cast<uintptr_t>(p.keys.data) % 16 == 0 &&
         p.keys.stride[2] * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace

const char* topk_scores_missing(const TopkParams& p) {
  if (p.slots > static_cast<int64_t>(UINT32_MAX)) return "2^32 slots or more";
  if (p.count > topk_max_count(kFew)) return "k above 2048";
  return nullptr;
}

int64_t topk_scores_workspace(const TopkParams& p) {
  const TopkSchedule s = schedule_of(p);
  const size_t bytes = p.keys.dtype == DType::kFloat64 ? sizeof(Candidate<double>) : sizeof(Candidate<float>);
  return s.splits > 1 ? p.queries * s.splits * p.count * static_cast<int64_t>(bytes) : 0;
}

void topk_scores_fwd(const TopkParams& p, void* workspace, void* stream) {
  if (const char* missing = topk_scores_missing(p)) {
    throw std::runtime_error(call_text("topk_scores", p) + ": no kernel has " + missing);
  }
  if (p.queries == 0 || p.count == 0) return;
  const TopkSchedule s = schedule_of(p);
  if (s.groups * s.splits > INT32_MAX || p.queries > INT32_MAX) {
    throw std::runtime_error(call_text("topk_scores", p) + ": more than 2^31 blocks");
  }
  const auto queue = static_cast<Stream>(stream);
  if (topk_scores_mma_takes(p)) {
    topk_scores_mma(p, s, workspace, stream);
    return launch_merge<float>(p, s, workspace, queue);
  }
  if (p.keys.dtype == DType::kFloat64) {
    if (rows_are_vectors<double>(p)) return launch_by_size<double, double>(p, s, workspace, queue);
    return launch_by_size<double, Any>(p, s, workspace, queue);
  }
  if (p.keys.dtype == DType::kFloat32 && rows_are_vectors<float>(p)) {
    return launch_by_size<float, float>(p, s, workspace, queue);
  }
  if (p.keys.dtype == DType::kBFloat16 && rows_are_vectors<BFloat16>(p)) {
    return launch_by_size<float, BFloat16>(p, s, workspace, queue);
  }
  if (p.keys.dtype == DType::kFloat16 && rows_are_vectors<Float16>(p)) {
    return launch_by_size<float, Float16>(p, s, workspace, queue);
  }
  if (p.keys.dtype == DType::kInt8 && rows_are_vectors<int8_t>(p)) {
    return launch_by_size<float, int8_t>(p, s, workspace, queue);
  }
  launch_by_size<float, Any>(p, s, workspace, queue);
}

}  // namespace attnfast::cuda
