// Gradients of the dot core by fused multiply-adds: float64, float32, and 16-bit operands that the tensor-core kernel
// does not take, widened to float32, and head sizes above 256. Any strides.
//
// With P = exp(s - lse), dP = dO V^T plus what arrives at the weights, keep = what prior and dropout make of a weight,
// and delta = rowsum(dO * O) + shift:
//   dS = P * (keep * dP - delta),  dV = (keep * P)^T dO,  dK = scale dS^T Q,  dQ = scale dS K,
//   dcenter = rowsum(P * keep * dP * (k - center)) / sigma^2.
// One kernel, two passes: by queries a block owns Q and dO and walks along K and V for dQ and dcenter; by keys it owns
// K and V and walks along Q and dO for dK and dV. For each tile: the two products in registers, P and dS from them, to
// shared memory, and from there times the tile. Of larger heads both products are formed 256 features at a time, and a
// block has 256 columns of the gradients: the blocks of the others form the same products again.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/device/gradients.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class R, int kHead, bool kLarge>
struct Plan : FmaGradientPlan<R, kHead> {
  using F = FmaGradientPlan<R, kHead>;
  // Else both tiles take turns in one place, and the first comes twice.
  static constexpr bool kTwoTiles = !kLarge && (sizeof(R) == 4 || kHead <= 128);
  static constexpr int kOwnElements = F::kRows * F::kPitch, kTileElements = F::kColumns * F::kPitch;
  static constexpr int kSharedElements =
      (kLarge ? 1 : 2) * kOwnElements + (kTwoTiles ? 2 : 1) * kTileElements + 2 * F::kRows * F::kWeightPitch;
};

// P and dS of a tile from its products, in place.
template <class P, bool kByKeys>
ATTNFAST_DEVICE void differentiate_tile(const DotAttentionParams& p, const GradientBlock& block, int64_t first,
                                        bool plain, bool modified,
                                        const QueryValues<typename P::R> (&own_values)[P::kRowsOfThread],
                                        typename P::Products& product, typename P::Products& grad,
                                        typename P::R (&center)[P::kRowsOfThread]) {
  using R = typename P::R;
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
                      product[i][j], grad[i][j], center[i]);
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
                      product[i][j], grad[i][j], center[i]);
      }
    }
  }
}

// Blocks that share the rows of a large head.
template <bool kByKeys>
ATTNFAST_HD int64_t feature_chunks(const DotAttentionParams& p) {
  const int64_t size = kByKeys && p.value_size > p.head_size ? p.value_size : p.head_size;
  return size > 256 ? (size + 255) / 256 : 1;
}

template <class R, int kHead, bool kByKeys, bool kLarge>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_bwd_fma_kernel(DotAttentionParams p) {
  using P = Plan<R, kHead, kLarge>;
  ATTNFAST_SHARED(shared);
  R* own_first = reinterpret_cast<R*>(shared);                          // K or Q
  R* own_second = own_first + (kLarge ? 0 : P::kOwnElements);           // V or dO
  R* tile_first = own_second + P::kOwnElements;                         // Q or K
  R* tile_second = tile_first + (P::kTwoTiles ? P::kTileElements : 0);  // dO or V
  R* weights = tile_second + P::kTileElements;
  R* grads = weights + P::kRows * P::kWeightPitch;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  int64_t index = blockIdx.x, feature = 0;
  if constexpr (kLarge) {
    const int64_t chunks = feature_chunks<kByKeys>(p);
    feature = index % chunks * kHead;
    index /= chunks;
  }
  // In shared memory, because registers are short in the loop.
  GradientBlock& block = *reinterpret_cast<GradientBlock*>(grads + P::kRows * P::kWeightPitch);
  const GradientBlock found = gradient_block<kByKeys>(p, P::kRows, P::kColumns, index);
  if (threadIdx.x == 0) block = found;
  __syncthreads();
  const Sequence& sequence = block.rows.sequence;
  const bool modified = is_modified(p);
  const auto own_rows = [&](const Tensor4& t, int64_t end, int64_t size) -> FmaRows {
    return {t, kByKeys ? key_offset(block.rows, t) : query_offset(block.rows, t), end, size};
  };
  const auto tile_offset = [&](const Tensor4& t, int64_t head) {
    return kByKeys ? offset4(t, sequence.tensor_batch, head, sequence.query_begin, 0) : key_offset(block.rows, t);
  };
  const FmaRows own_x = own_rows(kByKeys ? p.key : p.query, block.own_valid, p.head_size);
  const FmaRows own_y = own_rows(kByKeys ? p.value : p.grad_out, block.own_valid, p.value_size);
  if constexpr (!kLarge) {
    load_rows<P>(own_first, own_x, block.own, P::kRows);
    load_rows<P>(own_second, own_y, block.own, P::kRows);
  }
  QueryValues<R> own_values[P::kRowsOfThread] = {};
  if constexpr (!kByKeys) {
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      own_values[i] = query_values<R>(p, block.rows, block.own + ty + i * kRowGroups);
    }
  }
  R center[P::kRowsOfThread] = {};
  FmaSum<P> sum_first, sum_second;  // dK or dQ; dV
  sum_first.clear();
  sum_second.clear();

  for (int64_t head = found.rows.head; head < found.rows.head + found.heads; ++head) {
    const int64_t tile_end = kByKeys ? sequence.queries : sequence.keys;
    const FmaRows tile_x = {kByKeys ? p.query : p.key, tile_offset(kByKeys ? p.query : p.key, head), tile_end,
                            p.head_size};
    const FmaRows tile_y = {kByKeys ? p.grad_out : p.value, tile_offset(kByKeys ? p.grad_out : p.value, head), tile_end,
                            p.value_size};
    for (int64_t first = block.begin; first < block.end; first += P::kColumns) {
      if (threadIdx.x == 0) enter_tile<kByKeys>(p, block, head, first, P::kColumns);
      typename P::Products product = {}, grad = {};
      [[maybe_unused]] bool strange = false;
      if constexpr (kLarge) {
        add_products_of<P>(own_x, block.own, tile_x, first, own_first, tile_first, product);
        add_products_of<P>(own_y, block.own, tile_y, first, own_second, tile_second, grad);
      } else {
        __syncthreads();  // the tiles before are no longer read
        strange = load_rows<P>(tile_first, tile_x, first, P::kColumns);
        if constexpr (P::kTwoTiles) strange = load_rows<P>(tile_second, tile_y, first, P::kColumns) || strange;
        __syncthreads();
        add_products<P>(own_first, tile_first, static_cast<int>(p.head_size), product);
        if constexpr (!P::kTwoTiles) {
          __syncthreads();
          strange = load_rows<P>(tile_second, tile_y, first, P::kColumns) || strange;
          __syncthreads();
        }
        add_products<P>(own_second, tile_second, static_cast<int>(p.value_size), grad);
      }
      const bool plain = !modified && sees_tile<kByKeys>(block, first, P::kRows, P::kColumns);
      differentiate_tile<P, kByKeys>(p, block, first, plain, modified, own_values, product, grad, center);
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
      if constexpr (kLarge) {
        if constexpr (kByKeys) {
          __syncthreads();  // the last features of the second product are no longer read
          strange = load_rows<P>(tile_second, tile_y, first, P::kColumns, feature);
          sum_second.add(weights, tile_second, __syncthreads_or(strange && !plain));
        }
        __syncthreads();
        strange = load_rows<P>(tile_first, tile_x, first, P::kColumns, feature);
        sum_first.add(grads, tile_first, __syncthreads_or(strange && !plain));
      } else {
        const bool select = __syncthreads_or(strange && !plain);
        if constexpr (kByKeys) sum_second.add(weights, tile_second, select);
        if constexpr (!P::kTwoTiles) {
          __syncthreads();
          load_rows<P>(tile_first, tile_x, first, P::kColumns);
          __syncthreads();
        }
        sum_first.add(grads, tile_first, select);
      }
    }
  }

  const R scale = static_cast<R>(p.scale);
  if constexpr (kByKeys) {
    if (p.grad_key.data) {
      sum_first.store(own_rows(p.grad_key, block.own_end, p.head_size), block.own, feature, scale);
    }
    if (p.grad_value.data) {
      sum_second.store(own_rows(p.grad_value, block.own_end, p.value_size), block.own, feature, R(1));
    }
  } else {
    if (p.grad_query.data) {
      sum_first.store(own_rows(p.grad_query, block.own_end, p.head_size), block.own, feature, scale);
    }
    if (!p.grad_center || feature != 0) return;
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
#pragma unroll
      for (int step = 1; step < kColumnGroups; step *= 2) center[i] += __shfl_xor_sync(0xFFFFFFFFu, center[i], step);
      const int64_t q = block.own + ty + i * kRowGroups;
      if (tx == 0 && q < block.own_end) store_center(p, block.rows, q, center[i]);
    }
  }
}

template <class R, int kHead, bool kByKeys, bool kLarge>
void launch_pass(const DotAttentionParams& p, Stream stream) {
  using P = Plan<R, kHead, kLarge>;
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_bwd_fma<float>" : "dot_attention_bwd_fma<double>";
  constexpr size_t kBytes = P::kSharedElements * sizeof(R) + sizeof(GradientBlock);
  const int64_t copies = kLarge ? feature_chunks<kByKeys>(p) : 1;
  const unsigned blocks = checked_grid(p, gradient_blocks<kByKeys>(p, P::kRows) * copies, kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_fma_kernel<R, kHead, kByKeys, kLarge>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_fma_kernel<R, kHead, kByKeys, kLarge>), blocks, kFmaThreads, kBytes, stream, p);
  check_launched(kName, p);
}

template <class R, int kHead, bool kLarge = false>
void launch(const DotAttentionParams& p, Stream stream) {
  if (p.grad_key.data || p.grad_value.data) launch_pass<R, kHead, true, kLarge>(p, stream);
  if (p.grad_query.data || p.grad_center) launch_pass<R, kHead, false, kLarge>(p, stream);
}

template <class R>
void launch_by_size(const DotAttentionParams& p, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<R, 64>(p, stream);
  else if (size <= 128)
    launch<R, 128>(p, stream);
  else if (size <= 256)
    launch<R, 256>(p, stream);
  else
    launch<R, 256, true>(p, stream);
}

}  // namespace

void dot_attention_fma_bwd(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
