// Forward of the dot core on tensor cores, bfloat16 and float16, in the manner of FlashAttention-2 (Dao 2023): one pass
// over the keys with an online softmax, scores and weights in registers only.
//
// A block has four warps and 64 queries, a warp 16 of them. Tiles of keys and values come by cp.async into two buffers,
// the next while the last is used. Scores are Q K^T by mma m16n8k16; their C fragments, exponentiated and rounded to 16
// bits, are the A fragments of weights times V. Rows in shared memory are a multiple of 128 bytes, and the 16-byte
// chunk c of row r lies at chunk c ^ (r % 8): eight rows of one column of chunks, which ldmatrix wants at once, are
// then in different banks. A lane with g = lane / 4 and t = lane % 4 holds rows g and g + 8, and columns 2 t and 2 t +
// 1 of every eight.
#include "cuda/device/mma_tiles.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"
#include "cuda/parts.cuh"

namespace attnfast::cuda {
namespace {

struct BFloat16 : MmaBFloat16 {
  static constexpr const char* kName = "dot_attention_mma<bfloat16>";
};
struct Float16 : MmaFloat16 {
  static constexpr const char* kName = "dot_attention_mma<float16>";
};

template <int kHead>
struct Plan {
  static constexpr int kKeys = kHead <= 128 ? 64 : 32;
  // Beyond that Q's fragments would not fit the registers beside the output's; they are then read again for every tile.
  static constexpr bool kKeepQueries = kHead <= 128;
  static constexpr int kSharedElements = (kMmaRows + 4 * kKeys) * kHead;
  static constexpr int kStepsAtOnce = kKeepQueries ? kHead / 16 : 2;
  static constexpr int kSteps = kHead / 16, kScoreTiles = kKeys / 8, kValueTiles = kHead / 8;
};

template <class T, int kHead>
__global__ void __launch_bounds__(kMmaThreads, 2) dot_attention_mma_kernel(DotAttentionParams p, Parts parts) {
  using P = Plan<kHead>;
  constexpr int kKeys = P::kKeys;
  ATTNFAST_SHARED(shared);
  uint16_t* queries = reinterpret_cast<uint16_t*>(shared);
  uint16_t* key_tiles = queries + kMmaRows * kHead;
  uint16_t* value_tiles = key_tiles + 2 * kKeys * kHead;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  // In shared memory, because registers are short in the loop.
  Rows& rows = *reinterpret_cast<Rows*>(value_tiles + 2 * kKeys * kHead);
  const Rows found = rows_of_part(p, kMmaRows, parts, blockIdx.x);
  if (threadIdx.x == 0) rows = found;
  __syncthreads();
  const int64_t keys = rows.sequence.keys;
  const uint16_t* key_data = static_cast<const uint16_t*>(p.key.data) + key_offset(rows, p.key);
  const uint16_t* value_data = static_cast<const uint16_t*>(p.value.data) + key_offset(rows, p.value);
  const bool modified = is_modified(p), factored = has_factor(p);
  const int64_t first_tile = rows.key_begin / kKeys * kKeys;

  copy_rows<kHead>(queries, static_cast<const uint16_t*>(p.query.data) + query_offset(rows, p.query), p.query.stride[2],
                   rows.first, kMmaRows, rows.last, p.head_size);
  if (first_tile < rows.key_end) {
    copy_rows<kHead>(key_tiles, key_data, p.key.stride[2], first_tile, kKeys, keys, p.head_size);
    copy_rows<kHead>(value_tiles, value_data, p.value.stride[2], first_tile, kKeys, keys, p.value_size);
  }
  ptx::copy_async_commit();

  float out[P::kValueTiles][4];
#pragma unroll
  for (int n = 0; n < P::kValueTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] = 0;
  float maximum[2] = {negative_infinity<float>(), negative_infinity<float>()}, sum[2] = {0, 0};
  uint32_t query[P::kKeepQueries ? P::kSteps : 1][4];
  const uint16_t* query_rows = queries + warp * 16 * kHead;

  int current = 0;
  for (int64_t key = first_tile; key < rows.key_end; key += kKeys) {
    if (key + kKeys < rows.key_end) {
      const int other = (current ^ 1) * kKeys * kHead;
      copy_rows<kHead>(key_tiles + other, key_data, p.key.stride[2], key + kKeys, kKeys, keys, p.head_size);
      copy_rows<kHead>(value_tiles + other, value_data, p.value.stride[2], key + kKeys, kKeys, keys, p.value_size);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<1>();  // all but the tile that was just asked for
    __syncthreads();
    if constexpr (P::kKeepQueries) {
      if (key == first_tile) {
#pragma unroll
        for (int k = 0; k < P::kSteps; ++k) {
          ptx::ldmatrix_x4(query[k], query_rows + swizzled_at<kHead>(lane % 16, 2 * k + lane / 16));
        }
      }
    }
    const uint16_t* key_tile = key_tiles + current * kKeys * kHead;
    uint16_t* value_tile = value_tiles + current * kKeys * kHead;

    float score[P::kScoreTiles][4];
#pragma unroll
    for (int n = 0; n < P::kScoreTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = 0;
#pragma unroll P::kStepsAtOnce
    for (int k = 0; k < P::kSteps; ++k) {
      uint32_t* a = query[P::kKeepQueries ? k : 0];
      if constexpr (!P::kKeepQueries) {
        ptx::ldmatrix_x4(a, query_rows + swizzled_at<kHead>(lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < P::kScoreTiles; n += 2) {
        // K as it lies is K^T as mma wants it: matrices of 8 keys by 8 features, features first.
        uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment,
                         key_tile + swizzled_at<kHead>(n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        T::mma(score[n], a, fragment);
        T::mma(score[n + 1], a, fragment + 2);
      }
    }

    const bool plain = !modified && sees_all(rows, key, kKeys);
    const float scale = static_cast<float>(p.scale * kLog2e);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t q = rows.first + warp * 16 + g + 8 * r;
      TileRow<float> row = {};
      if (!plain) row = tile_row_of<float>(p, rows, modified, q, key, kKeys);
      float largest = maximum[r];
#pragma unroll
      for (int n = 0; n < P::kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[n][2 * r + e];
          s = plain ? s * scale : score_of(p, row, modified, n * 8 + 2 * t + e, s);
          largest = fmaxf(largest, s);
        }
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
      const float shift = largest == negative_infinity<float>() ? 0.0f : largest;
      const float shrink = ptx::exp2_fast(maximum[r] - shift);
      maximum[r] = largest;
      sum[r] *= shrink;
      const RowPrior<float> prior = prior_row_of<float>(p, rows, q, key);
#pragma unroll
      for (int n = 0; n < P::kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[n][2 * r + e];
          const bool hidden = s == negative_infinity<float>();
          float weight = hidden ? -0.0f : ptx::exp2_fast(s - shift);
          sum[r] += weight;
          if (factored && !hidden) weight = apply_factor(p, rows, prior, q, key, n * 8 + 2 * t + e, weight);
          s = weight;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kValueTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[n][2 * r + e] *= shrink;
    }

    // A hidden value may hold anything, and zero times that is not zero.
    if (!plain && __syncthreads_or(has_strange_rows<T, kHead, kKeys>(value_tile))) {
      take_strange_rows<T, kHead, kKeys>(value_tile, score, out);
    }
    add_weighted_rows<T, kHead, kKeys>(score, value_tile, out);
    __syncthreads();  // this tile's buffer is the next to be filled
    current ^= 1;
  }
  ptx::copy_async_wait<0>();  // what no visible key asked for may still be on its way

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
    const int64_t q = rows.first + warp * 16 + g + 8 * r;
    if (q >= rows.last) continue;
    const Finish<float> to = finish_row(p, rows, parts, blockIdx.x, q, maximum[r], sum[r], t == 0);
    if (parts.splits > 1) {
      float* row = static_cast<float*>(to.data) + to.offset;
#pragma unroll
      for (int n = 0; n < P::kValueTiles; ++n) {
        const int c = n * 8 + 2 * t;
        if (c >= p.value_size) continue;
        row[c] = out[n][2 * r];
        row[c + 1] = out[n][2 * r + 1];
      }
      continue;
    }
    uint16_t* row = static_cast<uint16_t*>(to.data) + to.offset;
#pragma unroll
    for (int n = 0; n < P::kValueTiles; ++n) {
      const int c = n * 8 + 2 * t;
      if (c >= p.value_size) continue;
      *reinterpret_cast<uint32_t*>(row + c) = T::pack(out[n][2 * r] * to.scale, out[n][2 * r + 1] * to.scale);
    }
  }
}

template <class T, int kHead>
void launch(const DotAttentionParams& p, const Parts& parts, Stream stream) {
  constexpr size_t kBytes = Plan<kHead>::kSharedElements * sizeof(uint16_t) + sizeof(Rows);
  allow_shared(dot_attention_mma_kernel<T, kHead>, kBytes, T::kName, p);
  ATTNFAST_LAUNCH((dot_attention_mma_kernel<T, kHead>), grid_of(p, kMmaRows, T::kName, parts.splits), kMmaThreads,
                  kBytes, stream, p, parts);
  check_launched(T::kName, p);
}

template <class T>
void launch_by_size(const DotAttentionParams& p, const Parts& parts, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<T, 64>(p, parts, stream);
  else if (size <= 128)
    launch<T, 128>(p, parts, stream);
  else
    launch<T, 256>(p, parts, stream);
}

}  // namespace

bool dot_attention_mma_takes(const DotAttentionParams& p) {
  return (p.query.dtype == DType::kBFloat16 || p.query.dtype == DType::kFloat16) && p.head_size > 0 &&
         p.value_size > 0 && p.head_size <= 256 && p.value_size <= 256 && rows_are_aligned(p.query, p.head_size) &&
         rows_are_aligned(p.key, p.head_size) && rows_are_aligned(p.value, p.value_size) &&
         rows_are_aligned(p.out, p.value_size);
}

void dot_attention_mma_fwd(const DotAttentionParams& p, const Parts& parts, void* stream) {
  if (p.query.dtype == DType::kBFloat16)
    launch_by_size<BFloat16>(p, parts, static_cast<Stream>(stream));
  else
    launch_by_size<Float16>(p, parts, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
