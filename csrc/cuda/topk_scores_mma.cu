// The k best slots for each query on tensor cores: queries and keys both bfloat16, or both float16.
//
// As topk_scores.cu, with products by mma m16n8k16: slots are the rows, queries the columns, so that a block of two
// queries issues the same instructions for a score as one of 32, and the score has the same bits. Tiles of keys come by
// cp.async into two buffers, 64 columns at a time, the next while the last is used; the chunk of 16 bytes c of row r
// lies at c ^ (r % 8), as in device/mma_tiles.cuh. Chunks that do not start at a multiple of 16 bytes, or that are not
// whole, are read by element instead.
//
// A lane with g = lane / 4 and t = lane % 4 holds the scores of slots g and g + 8 with queries 2 t and 2 t + 1 of every
// eight. One comparison says of a score that it is below its query's threshold, which nearly all are; what is not is
// looked at again, exactly.
#include "cuda/device/mma_tiles.cuh"
#include "cuda/launch.h"
#include "cuda/topk_parts.cuh"

namespace attnfast::cuda {
namespace {

struct BFloat16 : MmaBFloat16 {
  static constexpr const char* kName = "topk_scores_mma<bfloat16>";
};
struct Float16 : MmaFloat16 {
  static constexpr const char* kName = "topk_scores_mma<float16>";
};

constexpr int kColumns = 64;    // of a tile: rows of 128 bytes
constexpr int kResident = 256;  // up to this size queries stay in shared memory

template <TopkSize SIZE>
struct Plan {
  static constexpr int kQueries = topk_queries(SIZE), kQueryTiles = (kQueries + 7) / 8, kQueryRows = 8 * kQueryTiles;
  static constexpr int kSlotTiles = SIZE == TopkSize::kFew ? 2 : 1;  // of 16 slots for each warp
  static constexpr int kSlots = kMmaRows * kSlotTiles;
  static constexpr int kCapacity = SIZE == TopkSize::kMany ? 128 : SIZE == TopkSize::kSome ? 768 : 2304;
  static constexpr int kKeyElements = kSlots * kColumns, kQueryElements = kQueryRows * kColumns;  // of 64 columns
  static constexpr int kCounts = (kQueries + 3) / 4 * 4;  // what follows is aligned to 16 bytes
  static_assert(kCapacity >= topk_max_count(SIZE) + kSlots);

  // Pieces of 64 columns of the queries in shared memory: all, or those that belong to the two buffers of keys.
  static constexpr int64_t query_pieces(int64_t size) {
    return size > kResident || size == 0 ? 2 : (size + kColumns - 1) / kColumns;
  }
  static constexpr size_t shared_bytes(int64_t size) {
    const size_t tiles = 2 * kKeyElements + static_cast<size_t>(query_pieces(size)) * kQueryElements;
    return tiles * sizeof(uint16_t) + (kQueries * kCapacity + kQueries) * sizeof(Candidate<float>) +
           kCounts * sizeof(int);
  }
};

ATTNFAST_DEVICE bool chunks_are_aligned(const Tensor4& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[2] % 8 == 0 && x.stride[3] == 1;
}

// Columns [column, column + 64) of rows [first, first + kRows) on their way to shared memory, zero where there is none.
template <int kRows>
ATTNFAST_DEVICE void load_piece(uint16_t* to, const Tensor4& from, bool aligned, int64_t first, int64_t end,
                                int64_t column, int64_t size) {
  constexpr int kChunks = kColumns / 8;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kMmaThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t c = column + chunk * 8;
    const bool there = first + row < end && c < size;
    const uint16_t* data =
        static_cast<const uint16_t*>(from.data) + (first + row) * from.stride[2] + c * from.stride[3];
    uint16_t* at = to + swizzled_at<MmaHalf, kColumns>(row, chunk);
    if (aligned && there && c + 8 <= size) {
      ptx::copy_async_16(at, data, true);
      continue;
    }
    Halves8 x = {};
    if (there) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (c + e < size) x.x[e] = data[e * from.stride[3]];
    }
    *reinterpret_cast<Halves8*>(at) = x;
  }
}

template <class T, TopkSize SIZE>
__global__ void __launch_bounds__(kMmaThreads, 4)
    topk_scores_mma_kernel(TopkParams p, int64_t share, int64_t splits, Candidate<float>* workspace) {
  using P = Plan<SIZE>;
  using Team = typename TopkTeam<SIZE, kMmaThreads>::Type;
  constexpr int kTeams = kMmaThreads / Team::kSize;
  ATTNFAST_SHARED(shared);
  uint16_t* keys = reinterpret_cast<uint16_t*>(shared);
  auto* lists = reinterpret_cast<Candidate<float>*>(keys + 2 * P::kKeyElements);
  Candidate<float>* thresholds = lists + P::kQueries * P::kCapacity;
  int* counts = reinterpret_cast<int*>(thresholds + P::kQueries);
  uint16_t* queries = reinterpret_cast<uint16_t*>(counts + P::kCounts);
  const int thread = static_cast<int>(threadIdx.x), team = thread / Team::kSize, member = thread % Team::kSize;
  const int lane = thread % 32, g = lane / 4, t = lane % 4, warp_row = thread / 32 * 16 * P::kSlotTiles;
  const auto [first_query, split, begin, end] = topk_part<P::kQueries>(p, share, splits);
  const int64_t last_query = first_query + P::kQueries < p.queries ? first_query + P::kQueries : p.queries;
  const bool resident = p.size <= kResident, aligned = chunks_are_aligned(p.keys);
  const bool queries_aligned = chunks_are_aligned(p.query);
  const int count = static_cast<int>(p.count);
  const float scale = static_cast<float>(p.scale);
  const auto candidates = [&](int q) {
    return CandidateList<float>{lists + q * P::kCapacity, thresholds + q, counts + q};
  };
  const auto load = [&](int buffer, int64_t slot, int64_t column) {
    load_piece<P::kSlots>(keys + buffer * P::kKeyElements, p.keys, aligned, slot, end, column, p.size);
    if (!resident) {
      load_piece<P::kQueryRows>(queries + buffer * P::kQueryElements, p.query, queries_aligned, first_query, last_query,
                                column, p.size);
    }
    ptx::copy_async_commit();
  };

  if (thread < P::kQueries) {
    thresholds[thread] = {};
    counts[thread] = 0;
  }
  if (resident) {
    for (int64_t column = 0; column < p.size; column += kColumns) {
      load_piece<P::kQueryRows>(queries + column / kColumns * P::kQueryElements, p.query, queries_aligned, first_query,
                                last_query, column, p.size);
    }
  }
  if (begin < end) load(0, begin, 0);

  int current = 0;
#pragma unroll 1
  for (int64_t slot = begin; slot < end; slot += P::kSlots) {
    float score[P::kSlotTiles][P::kQueryTiles][4] = {};
#pragma unroll 1
    for (int64_t d = 0; d == 0 || d < p.size; d += kColumns) {  // once for D = 0, whose scores are 0
      ptx::copy_async_wait<0>();
      __syncthreads();  // the tile is there, the other buffer is no longer read, and candidates are in order
      const bool more = d + kColumns < p.size;
      const int64_t next = more ? slot : slot + P::kSlots;
      if (next < end) load(current ^ 1, next, more ? d + kColumns : 0);
      const uint16_t* key_tile = keys + current * P::kKeyElements + warp_row * kColumns;
      const uint16_t* query_tile = queries + (resident ? d / kColumns : current) * P::kQueryElements;
      current ^= 1;
      if (d == p.size) continue;  // D = 0: nothing has been loaded for the queries
#pragma unroll
      for (int k = 0; k < kColumns / 32; ++k) {
        uint32_t b[P::kQueryTiles][4];
#pragma unroll
        for (int n = 0; n < P::kQueryTiles; ++n) {
          ptx::ldmatrix_x4(b[n], query_tile + swizzled_at<MmaHalf, kColumns>(n * 8 + lane % 8, 4 * k + lane / 8));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < P::kSlotTiles; ++m) {
            uint32_t a[4];
            ptx::ldmatrix_x4(
                a, key_tile + swizzled_at<MmaHalf, kColumns>(m * 16 + lane % 16, 4 * k + 2 * half + lane / 16));
#pragma unroll
            for (int n = 0; n < P::kQueryTiles; ++n) T::mma(score[m][n], a, b[n] + 2 * half);
          }
      }
    }

#pragma unroll
    for (int n = 0; n < P::kQueryTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int q = n * 8 + 2 * t + e;
        if (q >= P::kQueries || first_query + q >= p.queries) continue;
        const CandidateList<float> list = candidates(q);
        const Candidate<float> threshold = *list.threshold;
        const float limit = threshold.score();  // NaN where there is none: nothing is below it
        bool interesting = false;
#pragma unroll
        for (int m = 0; m < P::kSlotTiles; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float& s = score[m][n][2 * r + e];
            s *= scale;
            interesting = interesting || !(s < limit);
          }
        if (!interesting) continue;
#pragma unroll
        for (int m = 0; m < P::kSlotTiles; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int64_t at = slot + warp_row + m * 16 + g + 8 * r;
            if (at >= end) continue;
            const auto candidate = Candidate<float>::of(score[m][n][2 * r + e], static_cast<uint32_t>(at));
            if (!candidate.before(threshold)) continue;
            if (p.mask.data && !static_cast<const uint8_t*>(
                                   p.mask.data)[(first_query + q) * p.mask.stride[2] + at * p.mask.stride[3]]) {
              continue;
            }
            list.append(candidate);
          }
      }
    __syncthreads();
    for (int q = team; q < P::kQueries; q += kTeams) {
      candidates(q).template make_room<Team>(count, P::kSlots, P::kCapacity, member);
    }
  }

  for (int q = team; q < P::kQueries && first_query + q < p.queries; q += kTeams) {
    finish_query<Team>(p, candidates(q), first_query + q, split, splits, workspace, member);
  }
}

template <class T, TopkSize SIZE>
void launch(const TopkParams& p, const TopkSchedule& s, void* workspace, Stream stream) {
  using P = Plan<SIZE>;
  static_assert(P::shared_bytes(kResident) <= 99 * 1024, "what sm_120 has for a block");
  const size_t bytes = P::shared_bytes(p.size);
  allow_shared(topk_scores_mma_kernel<T, SIZE>, bytes, T::kName, p);
  ATTNFAST_LAUNCH((topk_scores_mma_kernel<T, SIZE>), static_cast<unsigned>(s.groups * s.splits), kMmaThreads, bytes,
                  stream, p, s.share, s.splits, static_cast<Candidate<float>*>(workspace));
  check_launched(T::kName, p);
}

template <class T>
void launch_by_size(const TopkParams& p, const TopkSchedule& s, void* workspace, Stream stream) {
  if (s.size == TopkSize::kMany)
    launch<T, TopkSize::kMany>(p, s, workspace, stream);
  else if (s.size == TopkSize::kSome)
    launch<T, TopkSize::kSome>(p, s, workspace, stream);
  else
    launch<T, TopkSize::kFew>(p, s, workspace, stream);
}

}  // namespace

bool topk_scores_mma_takes(const TopkParams& p) {
  return p.query.dtype == p.keys.dtype && (p.keys.dtype == DType::kBFloat16 || p.keys.dtype == DType::kFloat16);
}

void topk_scores_mma(const TopkParams& p, const TopkSchedule& schedule, void* workspace, void* stream) {
  if (p.keys.dtype == DType::kBFloat16)
    launch_by_size<BFloat16>(p, schedule, workspace, static_cast<Stream>(stream));
  else
    launch_by_size<Float16>(p, schedule, workspace, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
