// Gradients of the dot core on tensor cores, bfloat16, float16 and float32 as tf32; the formulas and the two passes are
// those of dot_attention_bwd_fma.cu.
//
// A warp has 16 of the 64 rows (32 in tf32 above D = 128) that its block owns: queries for dQ, keys for dK and dV.
// Tiles of the other side come by cp.async into two buffers, the next while the last is used, in the pass by keys with
// what a query brings (gradients.cuh) beside them; where shared memory has place for one buffer, the next is asked for
// when the last is done. Both products of a tile, own rows times the tile's, stay in registers: their C fragments, made
// into probabilities and score gradients and rounded, are the A fragments of what is added to the sums. In the pass by
// keys the products are those of K Q^T and V dO^T, so that nothing is transposed.
#include "cuda/device/gradients.cuh"
#include "cuda/device/mma_tiles.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

enum Sums { kFirst = 1, kSecond = 2, kBoth = 3 };  // dK or dQ; dV

template <class T, int kHead, bool kByKeys>
struct Plan {
  static constexpr bool kWide = T::kChunk == 4;
  static constexpr int kTile = kHead <= (kWide ? 64 : 128) ? 32 : 16;
  static constexpr int kBuffers = kWide && kHead > 128 ? 1 : 2;
  static constexpr int kValues = kByKeys ? 3 * kTile : 0;  // floats beside the two tiles of a buffer
  static constexpr int kElements = 2 * (T::kRows + kBuffers * kTile) * kHead;
  static constexpr size_t kSharedBytes =
      kElements * sizeof(typename T::Element) + kBuffers * kValues * sizeof(float) + sizeof(GradientBlock);
};

template <class T, int kHead, bool kByKeys, int kSums>
__global__ void __launch_bounds__(T::kThreads, 2) dot_attention_bwd_mma_kernel(DotAttentionParams p) {
  using P = Plan<T, kHead, kByKeys>;
  using Element = typename T::Element;
  constexpr int kTile = P::kTile, kTileElements = kTile * kHead;
  ATTNFAST_SHARED(shared);
  Element* own_first = reinterpret_cast<Element*>(shared);  // K or Q
  Element* own_second = own_first + T::kRows * kHead;       // V or dO
  Element* tiles = own_second + T::kRows * kHead;           // for each buffer: Q, dO or K, V
  float* tile_values = reinterpret_cast<float*>(tiles + 2 * P::kBuffers * kTileElements);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  // In shared memory, because registers are short. What changes from tile to tile, the head and the tile's queries by
  // keys, is there from the barrier before a tile's products to the one after its sums.
  GradientBlock& block = *reinterpret_cast<GradientBlock*>(tile_values + P::kBuffers * P::kValues);
  const GradientBlock found = gradient_block<kByKeys>(p, T::kRows, kTile, blockIdx.x);
  if (threadIdx.x == 0) block = found;
  __syncthreads();
  const Sequence& sequence = block.rows.sequence;
  const bool modified = is_modified(p);

  const Tensor4 &own_x = kByKeys ? p.key : p.query, &own_y = kByKeys ? p.value : p.grad_out;
  const Tensor4 &tile_x = kByKeys ? p.query : p.key, &tile_y = kByKeys ? p.grad_out : p.value;
  const auto own_head = [&] { return kByKeys ? block.rows.kv_head : block.rows.head; };
  const auto own_token = [&](int64_t i) { return (kByKeys ? sequence.key_begin : sequence.query_begin) + i; };
  const auto copy = [&](Element* to, const Tensor4& from, int64_t head, int64_t token, int64_t first, int rows,
                        int64_t end, int64_t size) {
    copy_rows<T, kHead>(to,
                        static_cast<const Element*>(from.data) + offset4(from, sequence.tensor_batch, head, token, 0),
                        from.stride[2], first, rows, end, size);
  };
  copy(own_first, own_x, own_head(), own_token(0), block.own, T::kRows, block.own_valid, p.head_size);
  copy(own_second, own_y, own_head(), own_token(0), block.own, T::kRows, block.own_valid, p.value_size);
  const auto start_tile = [&](int64_t head, int64_t first, int buffer) {
    const int64_t end = kByKeys ? sequence.queries : sequence.keys, h = kByKeys ? head : block.rows.kv_head;
    const int64_t token = kByKeys ? sequence.query_begin : sequence.key_begin;
    Element* to = tiles + buffer * 2 * kTileElements;
    copy(to, tile_x, h, token, first, kTile, end, p.head_size);
    copy(to + kTileElements, tile_y, h, token, first, kTile, end, p.value_size);
    if constexpr (kByKeys) {
      const float* values = static_cast<const float*>(p.delta) + row_index(p, sequence, head, 0);
      for (int i = static_cast<int>(threadIdx.x); i < P::kValues; i += T::kThreads) {
        const int64_t q = first + i % kTile;
        const bool valid = q < end;
        ptx::copy_async_4(tile_values + buffer * P::kValues + i,
                          valid ? values + i / kTile * plane_size(p) + q : static_cast<const float*>(p.delta), valid);
      }
    }
  };
  if (block.begin < block.end) start_tile(found.rows.head, block.begin, 0);
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
  if constexpr (kSums & kFirst) clear<kHead / 8>(sum_first);
  if constexpr (kSums & kSecond) clear<kHead / 8>(sum_second);

  int buffer = 0, heads_left = static_cast<int>(block.heads);
  int64_t first = block.begin, head = found.rows.head;
  const auto start_next = [&](int buffer) {
    if (first + kTile < block.end) {
      start_tile(head, first + kTile, buffer);
    } else if (kByKeys && heads_left > 1) {
      start_tile(head + 1, block.begin, buffer);
    }
    ptx::copy_async_commit();
  };
  while (first < block.end) {
    if (threadIdx.x == 0) enter_tile<kByKeys>(p, block, head, first, kTile);
    if constexpr (P::kBuffers == 2) start_next(buffer ^ 1);
    ptx::copy_async_wait<P::kBuffers - 1>();  // all but the tile that was just asked for
    __syncthreads();
    Element* tile_first = tiles + buffer * 2 * kTileElements;
    Element* tile_second = tile_first + kTileElements;
    const bool plain = !modified && sees_tile<kByKeys>(block, first, T::kRows, kTile);

    float both[2 * kTile / 8][4];
    float (*product)[4] = both, (*grad)[4] = both + kTile / 8;
    multiply_rows<T, kHead, kTile>(own_first + warp * 16 * kHead, tile_first, product);
    if constexpr (kSums & kFirst) {
      multiply_rows<T, kHead, kTile>(own_second + warp * 16 * kHead, tile_second, grad);
    } else {
      clear<kTile / 8>(grad);
    }
    // What query `column` of the tile brings, by keys.
    const auto values_of = [&](int column) {
      const float* values = tile_values + buffer * P::kValues + column;
      return QueryValues<float>{values[kDeltaPlane * kTile], values[kBasePlane * kTile], values[kLogPlane * kTile]};
    };
    if (plain && !has_factor(p) && !p.grad_weights.data) {
      const float scale = static_cast<float>(p.scale * kLog2e);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          QueryValues<float> of_query = {};
          if constexpr (kByKeys) of_query = values_of(n * 8 + 2 * t + e);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            differentiate_plain(kByKeys ? of_query : own_values[r], scale, product[n][2 * r + e], grad[n][2 * r + e]);
          }
        }
      }
    } else {
      const int thread = ptx::unknown(static_cast<int>(threadIdx.x));
      const int own = thread / 32 * 16 + thread % 32 / 4;
      TileRow<float> row = {};
      QueryValues<float> of_query = {};
      int64_t q = 0;
      float center_of_row = 0;
      if constexpr (kByKeys) {
        for_each_by_columns<kTile / 8, 2>(
            both,
            [&](int column) {
              q = first + column;
              of_query = values_of(column);
              row = tile_row_of<float>(p, block.rows, modified, q, block.own, T::kRows);
            },
            [&](int r, float* values) {
              differentiate(p, block.rows, row, of_query, false, modified, true, q, block.own, own + 8 * r, values[0],
                            values[1], center_of_row);
            });
      } else {
        for_each_by_rows<kTile / 8, 2>(
            both,
            [&](int r) {
              q = block.own + own + 8 * r;
              of_query = own_values[0];
              if (r == 1) {
                of_query = own_values[1];
                center[0] += center_of_row;
                center_of_row = 0;
              }
              row = tile_row_of<float>(p, block.rows, modified, q, first, kTile);
            },
            [&](int column, float* values) {
              differentiate(p, block.rows, row, of_query, false, modified, true, q, first, column, values[0], values[1],
                            center_of_row);
            });
        center[1] += center_of_row;
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
    if constexpr (P::kBuffers == 2)
      buffer ^= 1;
    else
      start_next(0);
    first += kTile;
    if (first < block.end) continue;
    if (!kByKeys || --heads_left == 0) break;  // one head, of which registers need not know
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
      Element* row = static_cast<Element*>(to.data) + offset4(to, sequence.tensor_batch, own_head(), own_token(i), 0);
      store_sums<T, kHead>(row, r, sum, size, factor);
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
  constexpr size_t kBytes = Plan<T, kHead, kByKeys>::kSharedBytes;
  const unsigned blocks = checked_grid(p, gradient_blocks<kByKeys>(p, T::kRows), kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_mma_kernel<T, kHead, kByKeys, kSums>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_mma_kernel<T, kHead, kByKeys, kSums>), blocks, T::kThreads, kBytes, stream, p);
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

template <class T, class Largest = T>
void launch_by_size(const DotAttentionParams& p, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<T, 64>(p, stream);
  else if (size <= 128)
    launch<T, 128>(p, stream);
  else
    launch<Largest, 256>(p, stream);
}

}  // namespace

bool dot_attention_mma_bwd_takes(const DotAttentionParams& p) {
  const int64_t chunk = mma_chunk(p.query.dtype);
  const auto takes = [&](const Tensor4& x, int64_t size) { return !x.data || rows_are_aligned(x, size, chunk); };
  return chunk > 0 && mma_has_sizes(p) && takes(p.query, p.head_size) && takes(p.key, p.head_size) &&
         takes(p.value, p.value_size) && takes(p.grad_out, p.value_size) && takes(p.grad_query, p.head_size) &&
         takes(p.grad_key, p.head_size) && takes(p.grad_value, p.value_size);
}

void dot_attention_mma_bwd(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kBFloat16)
    launch_by_size<MmaBFloat16>(p, static_cast<Stream>(stream));
  else if (p.query.dtype == DType::kFloat16)
    launch_by_size<MmaFloat16>(p, static_cast<Stream>(stream));
  else
    launch_by_size<MmaTf32, MmaTf32Half>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
