// Gradients of a bias of the dot core: dS after the soft cap, summed over the dimensions that the bias broadcasts over.
// By fused multiply-adds, 16-bit operands widened to float32.
//
// A block owns a tile of the gradient and goes through everything that adds to it, always in the same order: samples,
// heads, tiles of queries and of keys, as far as the bias broadcasts over them. Within a tile each thread keeps the
// sums of its places; over a broadcast dimension these are added up at the end.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/device/gradients.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class R, int kHead>
struct Plan : FmaPlan<R, kHead> {
  using F = FmaPlan<R, kHead>;
  static constexpr int kSharedElements = (2 * F::kRows + F::kColumns) * F::kPitch + F::kRows * F::kWeightPitch;
};

// How the blocks share a gradient: a dimension that is broadcast is one unit, which its block goes through.
struct BiasUnits {
  int64_t batches, heads, rows, columns;
};
ATTNFAST_HD BiasUnits bias_units(const AttentionParams& p, const Tensor4& grad, int64_t rows, int64_t columns) {
  return {grad.stride[0] != 0 ? p.batch : 1, grad.stride[1] != 0 ? p.heads : 1,
          grad.stride[2] != 0 ? (p.query_tokens + rows - 1) / rows : 1,
          grad.stride[3] != 0 ? (p.key_tokens + columns - 1) / columns : 1};
}

// [begin, end) of a dimension for one of its units.
struct Extent {
  int64_t begin, end;
};
ATTNFAST_DEVICE Extent extent_of(int64_t unit, int64_t size, int64_t count, bool whole) {
  if (whole) return {0, count};
  const int64_t begin = unit * size;
  return {begin, begin + size < count ? begin + size : count};
}

template <class R, int kHead>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_bwd_bias_kernel(DotAttentionParams p, int which) {
  using P = Plan<R, kHead>;
  ATTNFAST_SHARED(shared);
  R* queries = reinterpret_cast<R*>(shared);
  R* grad_out = queries + P::kRows * P::kPitch;
  R* tile = grad_out + P::kRows * P::kPitch;  // keys, then values
  R* sums = tile + P::kColumns * P::kPitch;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  const Tensor4& to = p.grad_bias[which];
  const bool by_row = to.stride[2] != 0, by_column = to.stride[3] != 0, modified = is_modified(p);
  const BiasUnits units = bias_units(p, to, P::kRows, P::kColumns);
  int64_t unit = blockIdx.x;
  const int64_t column_unit = unit % units.columns;
  unit /= units.columns;
  const int64_t row_unit = unit % units.rows;
  unit /= units.rows;
  const Extent heads = extent_of(unit % units.heads, 1, p.heads, to.stride[1] == 0);
  const Extent batches = extent_of(unit / units.heads, 1, p.batch, to.stride[0] == 0);
  const Extent rows = extent_of(row_unit, P::kRows, p.query_tokens, !by_row);
  const Extent columns = extent_of(column_unit, P::kColumns, p.key_tokens, !by_column);

  R sum[P::kRowsOfThread][P::kColumnsOfThread] = {};
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for (int64_t first = rows.begin; first < rows.end; first += P::kRows) {
        const Rows seen = rows_at(p, b, h, first, P::kRows);
        const int64_t begin = seen.key_begin > columns.begin ? seen.key_begin : columns.begin;
        const int64_t end = seen.key_end < columns.end ? seen.key_end : columns.end;
        if (begin >= end) continue;
        __syncthreads();
        load_tile<R, kHead>(queries, p.query, b, h, first, P::kRows, seen.sequence.queries, p.head_size);
        load_tile<R, kHead>(grad_out, p.grad_out, b, h, first, P::kRows, seen.sequence.queries, p.value_size);
        QueryValues<R> values[P::kRowsOfThread];
#pragma unroll
        for (int i = 0; i < P::kRowsOfThread; ++i) {
          values[i] = query_values<R>(p, seen, first + ty + i * kRowGroups);
        }
        for (int64_t key = begin / P::kColumns * P::kColumns; key < end; key += P::kColumns) {
          const bool plain = !modified && sees_all(seen, key, P::kColumns);
          R product[P::kRowsOfThread][P::kColumnsOfThread], grad[P::kRowsOfThread][P::kColumnsOfThread];
          __syncthreads();  // values of the tile before are no longer read
          load_tile<R, kHead>(tile, p.key, b, seen.kv_head, key, P::kColumns, seen.sequence.keys, p.head_size);
          __syncthreads();
          multiply_tiles<R, kHead>(queries, tile, p.head_size, product);
          __syncthreads();
          load_tile<R, kHead>(tile, p.value, b, seen.kv_head, key, P::kColumns, seen.sequence.keys, p.value_size);
          __syncthreads();
          multiply_tiles<R, kHead>(grad_out, tile, p.value_size, grad);
#pragma unroll
          for (int i = 0; i < P::kRowsOfThread; ++i) {
            const int64_t q = first + ty + i * kRowGroups;
            const TileRow<R> row = tile_row_of<R>(p, seen, modified, q, key, P::kColumns);
#pragma unroll
            for (int j = 0; j < P::kColumnsOfThread; ++j) {
              differentiate(p, seen, row, values[i], plain, modified, false, q, key, tx + j * kColumnGroups,
                            product[i][j], grad[i][j]);
              sum[i][j] += grad[i][j];
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
    for (int j = 0; j < P::kColumnsOfThread; ++j) {
      sums[(ty + i * kRowGroups) * P::kWeightPitch + tx + j * kColumnGroups] = sum[i][j];
    }
  __syncthreads();
  // A thread a place of the gradient; places that are summed over are one.
  const int own_rows = by_row ? P::kRows : 1, own_columns = by_column ? P::kColumns : 1;
  for (int i = static_cast<int>(threadIdx.x); i < own_rows * own_columns; i += kFmaThreads) {
    const int row = i / own_columns, column = i % own_columns;
    const int64_t q = rows.begin + row, k = columns.begin + column;
    if ((by_row && q >= p.query_tokens) || (by_column && k >= p.key_tokens)) continue;
    R total = R(0);
    for (int r = row; r < (by_row ? row + 1 : P::kRows); ++r)
      for (int c = column; c < (by_column ? column + 1 : P::kColumns); ++c) total += sums[r * P::kWeightPitch + c];
    static_cast<R*>(to.data)[offset4(to, batches.begin, heads.begin, q, k)] = total;
  }
}

template <class R, int kHead>
void launch(const DotAttentionParams& p, int which, Stream stream) {
  using P = Plan<R, kHead>;
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_bwd_bias<float>" : "dot_attention_bwd_bias<double>";
  constexpr size_t kBytes = P::kSharedElements * sizeof(R);
  const BiasUnits units = bias_units(p, p.grad_bias[which], P::kRows, P::kColumns);
  const unsigned blocks = checked_grid(p, units.batches * units.heads * units.rows * units.columns, kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_bias_kernel<R, kHead>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_bias_kernel<R, kHead>), blocks, kFmaThreads, kBytes, stream, p, which);
  check_launched(kName, p);
}

template <class R>
void launch_by_size(const DotAttentionParams& p, int which, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<R, 64>(p, which, stream);
  else if (size <= 128)
    launch<R, 128>(p, which, stream);
  else
    launch<R, 256>(p, which, stream);
}

}  // namespace

void dot_attention_bias_bwd(const DotAttentionParams& p, int which, void* stream) {
  // A dimension of size 0 may have any stride: nothing is there to add to.
  if (p.batch == 0 || p.heads == 0 || p.query_tokens == 0 || p.key_tokens == 0) return;
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, which, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, which, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
