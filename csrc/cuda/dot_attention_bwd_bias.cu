// Gradients of a bias of the dot core: dS after the soft cap, summed over the dimensions that the bias broadcasts over.
// By fused multiply-adds, 16-bit operands widened to float32.
//
// A block owns a tile of the gradient and goes through everything that adds to it, always in the same order: samples,
// heads, tiles of queries and of keys, as far as the bias broadcasts over them. Within a tile each thread keeps the
// sums of its places; over a broadcast dimension these are added up at the end. Packed sequences share the gradient's
// rows and columns: a tile of it goes through the sequences that it meets, each of which may begin in its middle.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/device/gradients.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class P>
constexpr int kSharedElements = (2 * P::kRows + P::kColumns) * P::kPitch + P::kRows * P::kWeightPitch;

// How the blocks share a gradient: a dimension that is broadcast is one unit, which its block goes through.
struct BiasUnits {
  int64_t batches, heads, rows, columns;
};
ATTNFAST_HD BiasUnits bias_units(const AttentionParams& p, const Tensor4& grad, int64_t rows, int64_t columns) {
  return {grad.stride[0] != 0 && !p.cu_seqlens_q ? p.batch : 1, grad.stride[1] != 0 ? p.heads : 1,
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

// The same of tokens, counted from the first of a sequence of `count`: a tile may begin before it.
ATTNFAST_DEVICE Extent in_sequence(const Extent& tokens, bool whole, int64_t begin, int64_t count) {
  if (whole) return {0, count};
  return {tokens.begin - begin, tokens.end - begin < count ? tokens.end - begin : count};
}

// The sequences that have a token of an extent, as far as they are among `known`.
ATTNFAST_DEVICE Extent sequences_of(const int64_t* offsets, int64_t sequences, const Extent& tokens,
                                    const Extent& known) {
  const int64_t begin = packed_sequence(offsets, sequences, tokens.begin);
  const int64_t end = packed_sequence(offsets, sequences, tokens.end - 1) + 1;
  return {begin > known.begin ? begin : known.begin, end < known.end ? end : known.end};
}

template <class R, int kHead, bool kLarge>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_bwd_bias_kernel(DotAttentionParams p, int which) {
  using P = FmaGradientPlan<R, kHead>;
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
  Extent batches = extent_of(unit / units.heads, 1, p.batch, units.batches == 1);
  const Extent rows = extent_of(row_unit, P::kRows, p.query_tokens, !by_row);
  const Extent columns = extent_of(column_unit, P::kColumns, p.key_tokens, !by_column);
  const int64_t own_batch = p.cu_seqlens_q ? 0 : batches.begin;
  if (p.cu_seqlens_q && by_row) batches = sequences_of(p.cu_seqlens_q, p.batch, rows, batches);
  if (p.cu_seqlens_q && by_column) batches = sequences_of(p.cu_seqlens_k, p.batch, columns, batches);

  R sum[P::kRowsOfThread][P::kColumnsOfThread] = {};
  R center[P::kRowsOfThread] = {};  // not looked at
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      Rows seen = rows_of_head(p, b, h, 1);
      const Sequence sequence = seen.sequence;
      const Extent own = in_sequence(rows, !by_row, sequence.query_begin, sequence.query_rows);
      const Extent other = in_sequence(columns, !by_column, sequence.key_begin, sequence.keys);
      const FmaRows query_rows = {p.query, query_offset(seen, p.query), sequence.queries, p.head_size};
      const FmaRows grad_rows = {p.grad_out, query_offset(seen, p.grad_out), sequence.queries, p.value_size};
      const FmaRows key_rows = {p.key, key_offset(seen, p.key), sequence.keys, p.head_size};
      const FmaRows value_rows = {p.value, key_offset(seen, p.value), sequence.keys, p.value_size};
      for (int64_t first = own.begin; first < own.end; first += P::kRows) {
        seen = rows_at(p, b, h, first, P::kRows);
        const int64_t begin = seen.key_begin > other.begin ? seen.key_begin : other.begin;
        const int64_t end = seen.key_end < other.end ? seen.key_end : other.end;
        if (begin >= end) continue;
        if constexpr (!kLarge) {
          __syncthreads();
          load_rows<P>(queries, query_rows, first, P::kRows);
          load_rows<P>(grad_out, grad_rows, first, P::kRows);
        }
        QueryValues<R> values[P::kRowsOfThread];
#pragma unroll
        for (int i = 0; i < P::kRowsOfThread; ++i) {
          values[i] = query_values<R>(p, seen, first + ty + i * kRowGroups);
        }
        const int64_t skipped = (begin - other.begin) / P::kColumns * P::kColumns;
        for (int64_t key = other.begin + skipped; key < end; key += P::kColumns) {
          const bool plain = !modified && sees_all(seen, key, P::kColumns);
          typename P::Products product = {}, grad = {};
          if constexpr (kLarge) {
            add_products_of<P>(query_rows, first, key_rows, key, queries, tile, product);
            add_products_of<P>(grad_rows, first, value_rows, key, grad_out, tile, grad);
          } else {
            __syncthreads();  // values of the tile before are no longer read
            load_rows<P>(tile, key_rows, key, P::kColumns);
            __syncthreads();
            add_products<P>(queries, tile, static_cast<int>(p.head_size), product);
            __syncthreads();
            load_rows<P>(tile, value_rows, key, P::kColumns);
            __syncthreads();
            add_products<P>(grad_out, tile, static_cast<int>(p.value_size), grad);
          }
#pragma unroll
          for (int i = 0; i < P::kRowsOfThread; ++i) {
            const int64_t q = first + ty + i * kRowGroups;
            const TileRow<R> row = tile_row_of<R>(p, seen, modified, q, key, P::kColumns);
#pragma unroll
            for (int j = 0; j < P::kColumnsOfThread; ++j) {
              differentiate(p, seen, row, values[i], plain, modified, false, q, key, tx + j * kColumnGroups,
                            product[i][j], grad[i][j], center[i]);
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
    static_cast<R*>(to.data)[offset4(to, own_batch, heads.begin, q, k)] = total;
  }
}

template <class R, int kHead, bool kLarge = false>
void launch(const DotAttentionParams& p, int which, Stream stream) {
  using P = FmaGradientPlan<R, kHead>;
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_bwd_bias<float>" : "dot_attention_bwd_bias<double>";
  constexpr size_t kBytes = kSharedElements<P> * sizeof(R);
  const BiasUnits units = bias_units(p, p.grad_bias[which], P::kRows, P::kColumns);
  const unsigned blocks = checked_grid(p, units.batches * units.heads * units.rows * units.columns, kName);
  if (blocks == 0) return;
  allow_shared(dot_attention_bwd_bias_kernel<R, kHead, kLarge>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_bwd_bias_kernel<R, kHead, kLarge>), blocks, kFmaThreads, kBytes, stream, p, which);
  check_launched(kName, p);
}

template <class R>
void launch_by_size(const DotAttentionParams& p, int which, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<R, 64>(p, which, stream);
  else if (size <= 128)
    launch<R, 128>(p, which, stream);
  else if (size <= 256)
    launch<R, 256>(p, which, stream);
  else
    launch<R, 256, true>(p, which, stream);
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
