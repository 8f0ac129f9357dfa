// Forward of the dot core on tensor cores, bfloat16, float16 and float32 as tf32, in the manner of FlashAttention-2
// (Dao 2023): one pass over the keys with an online softmax, scores and weights in registers only.
//
// A block has four warps and 64 queries, a warp 16 of them. Tiles of keys and values come by cp.async into two buffers,
// the next while the last is used; where shared memory has place for one, the next is asked for when the last is done.
// Scores are Q K^T by mma; their C fragments, exponentiated and rounded, are the A fragments of weights times V.
// Fragments and the layout of shared memory are those of device/mma_tiles.cuh.
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
struct Tf32 : MmaTf32 {
  static constexpr const char* kName = "dot_attention_mma<tf32>";
};

template <class T, int kHead>
struct Plan {
  static constexpr bool kWide = T::kChunk == 4;
  static constexpr int kKeys = (kHead <= 128 ? 64 : 32) / (kWide ? 2 : 1);
  static constexpr int kBuffers = kWide && kHead > 128 ? 1 : 2;
  // Beyond that Q's fragments would not fit the registers beside the output's; they are then read again for every tile.
  static constexpr bool kKeepQueries = kHead <= (kWide ? 64 : 128);
  static constexpr int kTileElements = kKeys * kHead;
  static constexpr size_t kTileBytes = sizeof(typename T::Element) * (kMmaRows * kHead + 2 * kBuffers * kTileElements);
  static constexpr int kSteps = kHead / T::kInner, kScoreTiles = kKeys / 8, kValueTiles = kHead / 8;
  static constexpr int kStepsAtOnce = kKeepQueries ? kSteps : 2;
};

// Scores of a tile, base 2, from its products; -inf where a query may not see the key. `plain`: nothing but the product
// decides over them.
template <int kKeys>
ATTNFAST_DEVICE void score_tile(const DotAttentionParams& p, const Rows& rows, bool modified, bool plain, int64_t first,
                                int64_t key, float (*score)[4]) {
  TileRow<float> row = {};
  if (modified) {
    for_each_by_rows<kKeys / 8, 1>(
        score, [&](int r) { row = tile_row_of<float>(p, rows, true, first + 8 * r, key, kKeys); },
        [&](int column, float* s) { *s = score_of(p, row, true, column, *s); });
    return;
  }
  const float scale = static_cast<float>(p.scale * kLog2e);
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!plain) row = tile_row_of<float>(p, rows, false, first + 8 * r, key, kKeys);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + 2 * t + e;
        float& s = score[n][2 * r + e];
        s = plain || (column >= row.begin && column < row.end) ? s * scale : negative_infinity<float>();
      }
    }
  }
}

template <class T, int kHead>
__global__ void __launch_bounds__(kMmaThreads, 2) dot_attention_mma_kernel(DotAttentionParams p, Parts parts) {
  using P = Plan<T, kHead>;
  using Element = typename T::Element;
  constexpr int kKeys = P::kKeys;
  ATTNFAST_SHARED(shared);
  Element* queries = reinterpret_cast<Element*>(shared);
  Element* key_tiles = queries + kMmaRows * kHead;
  Element* value_tiles = key_tiles + P::kBuffers * P::kTileElements;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  // In shared memory, because registers are short in the loop.
  Rows& rows = *reinterpret_cast<Rows*>(value_tiles + P::kBuffers * P::kTileElements);
  const Rows found = rows_of_part(p, kMmaRows, parts, blockIdx.x);
  if (threadIdx.x == 0) rows = found;
  __syncthreads();
  const bool modified = is_modified(p), factored = has_factor(p);
  const int64_t first_tile = rows.key_begin / kKeys * kKeys;
  const auto start_tile = [&](int64_t key, int buffer) {
    const int64_t keys = rows.sequence.keys;
    const Element* key_data = static_cast<const Element*>(p.key.data) + key_offset(rows, p.key);
    const Element* value_data = static_cast<const Element*>(p.value.data) + key_offset(rows, p.value);
    copy_rows<T, kHead>(key_tiles + buffer * P::kTileElements, key_data, p.key.stride[2], key, kKeys, keys,
                        p.head_size);
    copy_rows<T, kHead>(value_tiles + buffer * P::kTileElements, value_data, p.value.stride[2], key, kKeys, keys,
                        p.value_size);
  };

  copy_rows<T, kHead>(queries, static_cast<const Element*>(p.query.data) + query_offset(rows, p.query),
                      p.query.stride[2], rows.first, kMmaRows, rows.last, p.head_size);
  if (first_tile < rows.key_end) start_tile(first_tile, 0);
  ptx::copy_async_commit();

  float out[P::kValueTiles][4];
  clear<P::kValueTiles>(out);
  float maximum[2] = {negative_infinity<float>(), negative_infinity<float>()}, sum[2] = {0, 0};
  uint32_t query[P::kKeepQueries ? P::kSteps : 1][4];
  const Element* query_rows = queries + warp * 16 * kHead;

  int current = 0;
  for (int64_t key = first_tile; key < rows.key_end; key += kKeys) {
    const bool last = key + kKeys >= rows.key_end;
    if constexpr (P::kBuffers == 2) {
      if (!last) start_tile(key + kKeys, current ^ 1);
      ptx::copy_async_commit();
    }
    ptx::copy_async_wait<P::kBuffers - 1>();  // all but the tile that was just asked for
    __syncthreads();
    if constexpr (P::kKeepQueries) {
      if (key == first_tile) {
#pragma unroll
        for (int k = 0; k < P::kSteps; ++k) own_fragment<T, kHead>(query_rows, k, query[k]);
      }
    }
    const Element* key_tile = key_tiles + current * P::kTileElements;
    Element* value_tile = value_tiles + current * P::kTileElements;

    float score[P::kScoreTiles][4];
    clear<P::kScoreTiles>(score);
#pragma unroll P::kStepsAtOnce
    for (int k = 0; k < P::kSteps; ++k) {
      uint32_t* a = query[P::kKeepQueries ? k : 0];
      if constexpr (!P::kKeepQueries) own_fragment<T, kHead>(query_rows, k, a);
      multiply_step<T, kHead, kKeys>(a, key_tile, k, score);
    }

    const bool plain = !modified && sees_all(rows, key, kKeys);
    const int64_t first_query = rows.first + warp * 16 + g;
    score_tile<kKeys>(p, rows, modified, plain, first_query, key, score);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum[r];
#pragma unroll
      for (int n = 0; n < P::kScoreTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) largest = fmaxf(largest, score[n][2 * r + e]);
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
      const float shift = largest == negative_infinity<float>() ? 0.0f : largest;
      const float shrink = ptx::exp2_fast(maximum[r] - shift);
      maximum[r] = largest;
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < P::kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[n][2 * r + e];
          s = s == negative_infinity<float>() ? -0.0f : ptx::exp2_fast(s - shift);
          sum[r] += s;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kValueTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[n][2 * r + e] *= shrink;
    }
    if (factored) {
      RowPrior<float> prior = {};
      int64_t q = 0;
      for_each_by_rows<P::kScoreTiles, 1>(
          score,
          [&](int r) {
            q = first_query + 8 * r;
            prior = prior_row_of<float>(p, rows, q, key);
          },
          [&](int column, float* weight) {
            if (!is_hidden(*weight)) *weight = apply_factor(p, rows, prior, q, key, column, *weight);
          });
    }

    // A hidden value may hold anything, and zero times that is not zero.
    if (!plain && __syncthreads_or(has_strange_rows<T, kHead, kKeys>(value_tile))) {
      take_strange_rows<T, kHead, kKeys>(value_tile, score, out);
    }
    add_weighted_rows<T, kHead, kKeys>(score, value_tile, out);
    __syncthreads();  // this tile's buffer is the next to be filled
    if constexpr (P::kBuffers == 2) {
      current ^= 1;
    } else {
      if (!last) start_tile(key + kKeys, 0);
      ptx::copy_async_commit();
    }
  }
  ptx::copy_async_wait<0>();  // what no visible key asked for may still be on its way

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
    const int64_t q = rows.first + warp * 16 + g + 8 * r;
    if (q >= rows.last) continue;
    const Finish<float> to = finish_row(p, rows, parts, blockIdx.x, q, maximum[r], sum[r], t == 0);
    if (parts.splits == 1) {
      store_sums<T, kHead>(static_cast<Element*>(to.data) + to.offset, r, out, p.value_size, to.scale);
      continue;
    }
    float* row = static_cast<float*>(to.data) + to.offset;
#pragma unroll
    for (int n = 0; n < P::kValueTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = sum_feature<T>(t, n, e);
        if (c < p.value_size) row[c] = out[n][2 * r + e];
      }
    }
  }
}

template <class T, int kHead>
void launch(const DotAttentionParams& p, const Parts& parts, Stream stream) {
  constexpr size_t kBytes = Plan<T, kHead>::kTileBytes + sizeof(Rows);
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
  const int64_t chunk = mma_chunk(p.query.dtype);
  const auto takes = [&](const Tensor4& x, int64_t size) { return rows_are_aligned(x, size, chunk); };
  return chunk > 0 && mma_has_sizes(p) && takes(p.query, p.head_size) && takes(p.key, p.head_size) &&
         takes(p.value, p.value_size) && (!p.out.data || takes(p.out, p.value_size));
}

void dot_attention_mma_fwd(const DotAttentionParams& p, const Parts& parts, void* stream) {
  if (p.query.dtype == DType::kBFloat16)
    launch_by_size<BFloat16>(p, parts, static_cast<Stream>(stream));
  else if (p.query.dtype == DType::kFloat16)
    launch_by_size<Float16>(p, parts, static_cast<Stream>(stream));
  else
    launch_by_size<Tf32>(p, parts, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
