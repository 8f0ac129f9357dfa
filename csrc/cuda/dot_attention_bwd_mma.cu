// Gradients of the dot core on tensor cores, bfloat16 and float16; the formulas and the two passes are those of
// dot_attention_bwd_fma.cu.
//
// A warp has 16 of the 64 rows that its block owns: queries for dQ, keys for dK and dV. Tiles of the other side come by
// cp.async into two buffers, the next while the last is used, in the pass by keys with what a query brings
// (gradients.cuh) beside them. Both products of a tile, own rows times the tile's, stay in registers: their C
// fragments, made into probabilities and score gradients and rounded to 16 bits, are the A fragments of what is added
// to the sums. In the pass by keys the products are those of K Q^T and V dO^T, so that nothing is transposed.
#include "cuda/device/gradients.cuh"
#include "cuda/device/mma_tiles.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

enum Sums { kFirst = 1, kSecond = 2, kBoth = 3 };  // dK or dQ; dV

template <int kHead, bool kByKeys>
struct Plan {
  static constexpr int kTile = kHead <= 128 ? 32 : 16;
  static constexpr int kValues = kByKeys ? 3 * kTile : 0;  // floats beside the two tiles of a buffer
  // What a block has is in shared memory too, because registers are short.
  static constexpr int kSharedBytes = (2 * kMmaRows + 4 * kTile) * kHead * 2 + 2 * kValues * 4 + sizeof(GradientBlock);
};

template <class T, int kHead, bool kByKeys, int kSums>
__global__ void __launch_bounds__(kMmaThreads, 2) dot_attention_bwd_mma_kernel(DotAttentionParams p) {
  using P = Plan<kHead, kByKeys>;
  constexpr int kTile = P::kTile, kTileElements = kTile * kHead;
  ATTNFAST_SHARED(shared);
  uint16_t* own_first = reinterpret_cast<uint16_t*>(shared);  // K or Q
  uint16_t* own_second = own_first + kMmaRows * kHead;        // V or dO
  uint16_t* tiles = own_second + kMmaRows * kHead;            // twice: Q, dO or K, V
  float* tile_values = reinterpret_cast<float*>(tiles + 4 * kTileElements);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  GradientBlock& block = *reinterpret_cast<GradientBlock*>(tile_values + 2 * P::kValues);
  const GradientBlock found = gradient_block<kByKeys>(p, kMmaRows, kTile, blockIdx.x);
  if (threadIdx.x == 0) block = found;
  __syncthreads();
  const Sequence& sequence = block.rows.sequence;
  const int64_t b = sequence.tensor_batch, kv_head = block.rows.kv_head;
  const bool modified = is_modified(p);

  const Tensor4 &own_x = kByKeys ? p.key : p.query, &own_y = kByKeys ? p.value : p.grad_out;
  const Tensor4 &tile_x = kByKeys ? p.query : p.key, &tile_y = kByKeys ? p.grad_out : p.value;
  const int64_t own_head = kByKeys ? kv_head : block.rows.head;
  const auto own_row = [&](const Tensor4& t, int64_t i) {
    return offset4(t, b, own_head, (kByKeys ? sequence.key_begin : sequence.query_begin) + i, 0);
  };
  const auto tile_row = [&](const Tensor4& t, int64_t h) {
    return offset4(t, b, h, kByKeys ? sequence.query_begin : sequence.key_begin, 0);
  };
  copy_rows<kHead>(own_first, static_cast<const uint16_t*>(own_x.data) + own_row(own_x, 0), own_x.stride[2], block.own,
                   kMmaRows, block.own_valid, p.head_size);
  copy_rows<kHead>(own_second, static_cast<const uint16_t*>(own_y.data) + own_row(own_y, 0), own_y.stride[2], block.own,
                   kMmaRows, block.own_valid, p.value_size);
  const auto start_tile = [&](int64_t head, int64_t first, int buffer) {
    const int64_t end = kByKeys ? sequence.queries : sequence.keys, h = kByKeys ? head : kv_head;
    uint16_t* to = tiles + buffer * 2 * kTileElements;
    copy_rows<kHead>(to, static_cast<const uint16_t*>(tile_x.data) + tile_row(tile_x, h), tile_x.stride[2], first,
                     kTile, end, p.head_size);
    copy_rows<kHead>(to + kTileElements, static_cast<const uint16_t*>(tile_y.data) + tile_row(tile_y, h),
                     tile_y.stride[2], first, kTile, end, p.value_size);
    if constexpr (kByKeys) {
      const float* values = static_cast<const float*>(p.delta) + row_index(p, sequence, head, 0);
      for (int i = static_cast<int>(threadIdx.x); i < P::kValues; i += kMmaThreads) {
        const int64_t q = first + i % kTile;
        const bool valid = q < end;
        ptx::copy_async_4(tile_values + buffer * P::kValues + i,
                          valid ? values + i / kTile * plane_size(p) + q : static_cast<const float*>(p.delta), valid);
      }
    }
  };
  int64_t head = found.rows.head;
  if (block.begin < block.end) start_tile(head, block.begin, 0);
  ptx::copy_async_commit();

  QueryValues<float> own_values[2] = {};
  if constexpr (!kByKeys) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own_values[r] = query_values<float>(p, block.rows, block.own + warp * 16 + g + 8 * r);
    }
  }
  float center[2] = {};
  float sum_first[kSums & kFirst ? kHead / 8 : 1][4], sum_second[kSums & kSecond ? kHead / 8 : 1][4];
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSums & kFirst) sum_first[n][i] = 0;
      if constexpr (kSums & kSecond) sum_second[n][i] = 0;
    }
  }

  int buffer = 0, heads_left = static_cast<int>(block.heads);
  int64_t first = block.begin;
  while (first < block.end) {
    if (first + kTile < block.end) {
      start_tile(head, first + kTile, buffer ^ 1);
    } else if (heads_left > 1) {
      start_tile(head + 1, block.begin, buffer ^ 1);
    }
    if (threadIdx.x == 0) enter_tile<kByKeys>(p, block, head, first, kTile);
    ptx::copy_async_commit();
    ptx::copy_async_wait<1>();  // all but the tile that was just asked for
    __syncthreads();
    uint16_t* tile_first = tiles + buffer * 2 * kTileElements;
    uint16_t* tile_second = tile_first + kTileElements;
    const bool plain = !modified && sees_tile<kByKeys>(block, first, kMmaRows, kTile);

    float product[kTile / 8][4], grad[kTile / 8][4];
    multiply_rows<T, kHead, kTile>(own_first + warp * 16 * kHead, tile_first, product);
    if constexpr (kSums & kFirst) {
      multiply_rows<T, kHead, kTile>(own_second + warp * 16 * kHead, tile_second, grad);
    } else {
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[n][i] = 0;
    }
    if constexpr (kByKeys) {
      const float* values = tile_values + buffer * P::kValues;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n * 8 + 2 * t + e;
          const QueryValues<float> of_query = {values[kDeltaPlane * kTile + column],
                                               values[kBasePlane * kTile + column], values[kLogPlane * kTile + column]};
          TileRow<float> row = {};
          if (!plain) row = tile_row_of<float>(p, block.rows, modified, first + column, block.own, kMmaRows);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            differentiate(p, block.rows, row, of_query, plain, modified, true, first + column, block.own,
                          warp * 16 + g + 8 * r, product[n][2 * r + e], grad[n][2 * r + e], center[r]);
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t q = block.own + warp * 16 + g + 8 * r;
        TileRow<float> row = {};
        if (!plain) row = tile_row_of<float>(p, block.rows, modified, q, first, kTile);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            differentiate(p, block.rows, row, own_values[r], plain, modified, true, q, first, n * 8 + 2 * t + e,
                          product[n][2 * r + e], grad[n][2 * r + e], center[r]);
          }
        }
      }
    }

    // What is hidden may hold anything, and zero times that is not zero. All warps are done with the products here.
    constexpr int kWeighted = kSums == kBoth ? 2 * kTile : kTile;
    if (!plain && __syncthreads_or(has_strange_rows<T, kHead, kWeighted>(kSums & kFirst ? tile_first : tile_second))) {
      if constexpr (kSums & kFirst) take_strange_rows<T, kHead, kTile>(tile_first, grad, sum_first);
      if constexpr (kSums & kSecond) take_strange_rows<T, kHead, kTile>(tile_second, product, sum_second);
    }
    if constexpr (kSums & kFirst) add_weighted_rows<T, kHead, kTile>(grad, tile_first, sum_first);
    if constexpr (kSums & kSecond) add_weighted_rows<T, kHead, kTile>(product, tile_second, sum_second);
    __syncthreads();  // this tile's buffer is the next to be filled
    buffer ^= 1;
    first += kTile;
    if (first < block.end) continue;
    if (--heads_left == 0) break;
    first = block.begin;
    ++head;
  }
  ptx::copy_async_wait<0>();  // what no visible pair asked for may still be on its way

  const auto store = [&](const Tensor4& to, const float (*sum)[4], int64_t size, float factor) {
    if (!to.data) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t i = block.own + warp * 16 + g + 8 * r;
      if (i >= block.own_end) continue;
      uint16_t* row = static_cast<uint16_t*>(to.data) + own_row(to, i);
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        const int c = n * 8 + 2 * t;
        if (c >= size) continue;
        *reinterpret_cast<uint32_t*>(row + c) = T::pack(sum[n][2 * r] * factor, sum[n][2 * r + 1] * factor);
      }
    }
  };
  const float scale = static_cast<float>(p.scale);
  if constexpr (kSums & kFirst) store(kByKeys ? p.grad_key : p.grad_query, sum_first, p.head_size, scale);
  if constexpr (kSums & kSecond) store(p.grad_value, sum_second, p.value_size, 1.0f);
  if constexpr (!kByKeys) {
    if (!p.grad_center) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      center[r] += __shfl_xor_sync(0xFFFFFFFFu, center[r], 1);
      center[r] += __shfl_xor_sync(0xFFFFFFFFu, center[r], 2);
      const int64_t q = block.own + warp * 16 + g + 8 * r;
      if (t == 0 && q < block.own_end) store_center(p, block.rows, q, center[r]);
    }
  }
}

template <class T, int kHead, bool kByKeys, int kSums>
void launch_pass(const DotAttentionParams& p, Stream stream) {
  constexpr const char* kName = "dot_attention_bwd_mma";
  constexpr size_t kBytes = Plan<kHead, kByKeys>::kSharedBytes;
  const unsigned blocks = checked_grid(p, gradient_blocks<kByKeys>(p, kMmaRows), kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_mma_kernel<T, kHead, kByKeys, kSums>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_mma_kernel<T, kHead, kByKeys, kSums>), blocks, kMmaThreads, kBytes, stream, p);
  check_launched(kName, p);
}

template <class T, int kHead>
void launch(const DotAttentionParams& p, Stream stream) {
  if (p.grad_query.data || p.grad_center) launch_pass<T, kHead, false, kFirst>(p, stream);
  if constexpr (kHead <= 128) {
    if (p.grad_key.data || p.grad_value.data) launch_pass<T, kHead, true, kBoth>(p, stream);
  } else {  // both sums do not fit the registers
    if (p.grad_key.data) launch_pass<T, kHead, true, kFirst>(p, stream);
    if (p.grad_value.data) launch_pass<T, kHead, true, kSecond>(p, stream);
  }
}

template <class T>
void launch_by_size(const DotAttentionParams& p, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<T, 64>(p, stream);
  else if (size <= 128)
    launch<T, 128>(p, stream);
  else
    launch<T, 256>(p, stream);
}

}  // namespace

bool dot_attention_mma_bwd_takes(const DotAttentionParams& p) {
  const auto takes = [](const Tensor4& x, int64_t size) { return !x.data || rows_are_aligned(x, size); };
  return (p.query.dtype == DType::kBFloat16 || p.query.dtype == DType::kFloat16) && p.head_size > 0 &&
         p.value_size > 0 && p.head_size <= 256 && p.value_size <= 256 && takes(p.query, p.head_size) &&
         takes(p.key, p.head_size) && takes(p.value, p.value_size) && takes(p.grad_out, p.value_size) &&
         takes(p.grad_query, p.head_size) && takes(p.grad_key, p.head_size) && takes(p.grad_value, p.value_size);
}

void dot_attention_mma_bwd(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kBFloat16)
    launch_by_size<MmaBFloat16>(p, static_cast<Stream>(stream));
  else
    launch_by_size<MmaFloat16>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
