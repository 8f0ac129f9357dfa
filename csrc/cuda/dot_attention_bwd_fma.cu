// Gradients of the dot core by fused multiply-adds: float64, float32, and 16-bit operands that the tensor-core kernel
// does not take, widened to float32. Any strides, D and D_v up to 256.
//
// With P = exp(s - lse), dP = dO V^T (dropped out as P was) and delta = rowsum(dO * O) + shift:
//   dS = P * (dP - delta),  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K.
// One kernel, two passes: by queries a block owns Q and dO and walks along K and V for dQ; by keys it owns K and V and
// walks along Q and dO for dK and dV. For each tile: the two products in registers, P and dS from them, to shared
// memory, and from there times the tile.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/device/gradients.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class R, int kHead>
struct Plan : FmaPlan<R, kHead> {
  using F = FmaPlan<R, kHead>;
  // Else both tiles take turns in one place, and the first comes twice.
  static constexpr bool kTwoTiles = sizeof(R) == 4 || kHead <= 128;
  static constexpr int kSharedElements =
      (2 * F::kRows + (kTwoTiles ? 2 : 1) * F::kColumns) * F::kPitch + 2 * F::kRows * F::kWeightPitch;
};

// P and dS of a tile from its products, in place.
template <class R, int kHead, bool kByKeys>
ATTNFAST_DEVICE void differentiate_tile(
    const DotAttentionParams& p, const GradientBlock& block, int64_t first, bool plain, bool modified,
    const QueryValues<R> (&own_values)[FmaPlan<R, kHead>::kRowsOfThread],
    R (&product)[FmaPlan<R, kHead>::kRowsOfThread][FmaPlan<R, kHead>::kColumnsOfThread],
    R (&grad)[FmaPlan<R, kHead>::kRowsOfThread][FmaPlan<R, kHead>::kColumnsOfThread]) {
  using P = FmaPlan<R, kHead>;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  if constexpr (kByKeys) {
#pragma unroll
    for (int j = 0; j < P::kColumnsOfThread; ++j) {
      const int64_t q = first + tx + j * kColumnGroups;
      const QueryValues<R> values = query_values<R>(p, block.rows, q);
      const TileRow<R> row = tile_row_of<R>(p, block.rows, modified, q, block.own, P::kRows);
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        differentiate(p, block.rows, row, values, plain, modified, true, q, block.own, ty + i * kRowGroups,
                      product[i][j], grad[i][j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t q = block.own + ty + i * kRowGroups;
      const TileRow<R> row = tile_row_of<R>(p, block.rows, modified, q, first, P::kColumns);
#pragma unroll
      for (int j = 0; j < P::kColumnsOfThread; ++j) {
        differentiate(p, block.rows, row, own_values[i], plain, modified, true, q, first, tx + j * kColumnGroups,
                      product[i][j], grad[i][j]);
      }
    }
  }
}

template <class R, int kHead, bool kByKeys>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_bwd_fma_kernel(DotAttentionParams p) {
  using P = Plan<R, kHead>;
  ATTNFAST_SHARED(shared);
  R* own_first = reinterpret_cast<R*>(shared);                                 // K or Q
  R* own_second = own_first + P::kRows * P::kPitch;                            // V or dO
  R* tile_first = own_second + P::kRows * P::kPitch;                           // Q or K
  R* tile_second = tile_first + (P::kTwoTiles ? P::kColumns * P::kPitch : 0);  // dO or V
  R* weights = tile_second + P::kColumns * P::kPitch;
  R* grads = weights + P::kRows * P::kWeightPitch;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  GradientBlock block = gradient_block<kByKeys>(p, P::kRows, P::kColumns);
  const int64_t b = block.rows.sequence.tensor_batch, kv_head = block.rows.kv_head;
  const bool modified = is_modified(p);

  load_tile<R, kHead>(own_first, kByKeys ? p.key : p.query, b, kByKeys ? kv_head : block.rows.head, block.own, P::kRows,
                      block.own_valid, p.head_size);
  load_tile<R, kHead>(own_second, kByKeys ? p.value : p.grad_out, b, kByKeys ? kv_head : block.rows.head, block.own,
                      P::kRows, block.own_valid, p.value_size);
  QueryValues<R> own_values[P::kRowsOfThread] = {};
  if constexpr (!kByKeys) {
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      own_values[i] = query_values<R>(p, block.rows, block.own + ty + i * kRowGroups);
    }
  }
  FmaSum<R, kHead> sum_first, sum_second;  // dK or dQ; dV
  sum_first.clear();
  sum_second.clear();

  for (int64_t head = 0; head < block.heads; ++head, ++block.rows.head) {
    for (int64_t first = block.begin; first < block.end; first += P::kColumns) {
      const bool plain = enter_tile<kByKeys>(block, first, P::kRows, P::kColumns, modified);
      const int64_t tile_head = kByKeys ? block.rows.head : kv_head;
      const int64_t tile_end = kByKeys ? block.rows.sequence.queries : block.rows.sequence.keys;
      const auto load_first = [&] {
        return load_tile<R, kHead>(tile_first, kByKeys ? p.query : p.key, b, tile_head, first, P::kColumns, tile_end,
                                   p.head_size);
      };
      const auto load_second = [&] {
        return load_tile<R, kHead>(tile_second, kByKeys ? p.grad_out : p.value, b, tile_head, first, P::kColumns,
                                   tile_end, p.value_size);
      };
      __syncthreads();  // the tiles before are no longer read
      bool strange = load_first();
      if constexpr (P::kTwoTiles) strange = load_second() || strange;
      __syncthreads();
      R product[P::kRowsOfThread][P::kColumnsOfThread], grad[P::kRowsOfThread][P::kColumnsOfThread];
      multiply_tiles<R, kHead>(own_first, tile_first, p.head_size, product);
      if constexpr (!P::kTwoTiles) {
        __syncthreads();
        strange = load_second() || strange;
        __syncthreads();
      }
      multiply_tiles<R, kHead>(own_second, tile_second, p.value_size, grad);
      differentiate_tile<R, kHead, kByKeys>(p, block, first, plain, modified, own_values, product, grad);
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
#pragma unroll
        for (int j = 0; j < P::kColumnsOfThread; ++j) {
          const int at = (ty + i * kRowGroups) * P::kWeightPitch + tx + j * kColumnGroups;
          if constexpr (kByKeys) weights[at] = product[i][j];
          grads[at] = grad[i][j];
        }
      }
      // What is hidden may hold anything, and zero times that is not zero: then each product is selected.
      const bool select = __syncthreads_or(strange && !plain);
      if constexpr (kByKeys) sum_second.add(weights, tile_second, select);
      if constexpr (!P::kTwoTiles) {
        __syncthreads();
        load_first();
        __syncthreads();
      }
      sum_first.add(grads, tile_first, select);
    }
  }

  const R scale = static_cast<R>(p.scale);
  if constexpr (kByKeys) {
    if (p.grad_key.data) sum_first.store(p.grad_key, b, kv_head, block.own, block.own_end, p.head_size, scale);
    if (p.grad_value.data) sum_second.store(p.grad_value, b, kv_head, block.own, block.own_end, p.value_size, R(1));
  } else {
    const int64_t head = block.rows.head - block.heads;  // as it was before the loop
    sum_first.store(p.grad_query, b, head, block.own, block.own_end, p.head_size, scale);
  }
}

template <class R, int kHead, bool kByKeys>
void launch_pass(const DotAttentionParams& p, Stream stream) {
  using P = Plan<R, kHead>;
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_bwd_fma<float>" : "dot_attention_bwd_fma<double>";
  constexpr size_t kBytes = P::kSharedElements * sizeof(R);
  const unsigned blocks = kByKeys ? blocks_of(p, p.key_tokens, P::kRows, p.kv_heads, kName)
                                  : blocks_of(p, p.query_tokens, P::kRows, p.heads, kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_fma_kernel<R, kHead, kByKeys>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_fma_kernel<R, kHead, kByKeys>), blocks, kFmaThreads, kBytes, stream, p);
  check_launched(kName, p);
}

template <class R, int kHead>
void launch(const DotAttentionParams& p, Stream stream) {
  if (p.grad_key.data || p.grad_value.data) launch_pass<R, kHead, true>(p, stream);
  if (p.grad_query.data) launch_pass<R, kHead, false>(p, stream);
}

template <class R>
void launch_by_size(const DotAttentionParams& p, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<R, 64>(p, stream);
  else if (size <= 128)
    launch<R, 128>(p, stream);
  else
    launch<R, 256>(p, stream);
}

}  // namespace

void dot_attention_fma_bwd(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
