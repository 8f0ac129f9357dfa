// Attention weights on request, as a second pass over the scores with the finished log-sum-exp, after prior and
// dropout: the full matrix, its column sums, or its row maxima. By fused multiply-adds in float32 (float64) for every
// dtype.
//
// Threads and tiles are those of device/fma_tiles.cuh, 64 features at a time. A block of rows passes over the keys that
// they may see; a block of columns sums over the queries in their order, each thread over its own, and then the
// threads' sums in order: no atomics.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class R>
using Shape = FmaForwardPlan<R, 64>;
template <class R>
using Scores = typename Shape<R>::Products;
template <class R>
constexpr int kSharedElements = (Shape<R>::kRows + Shape<R>::kColumns) * Shape<R>::kPitch;

// A block's tiles in shared memory, its rows there too, because registers are short, and a thread's place among them.
template <class R>
struct Tiles {
  R *queries, *keys;
  Rows* rows;
  int tx, ty;
};
template <class R>
ATTNFAST_DEVICE Tiles<R> tiles_in(unsigned char* shared) {
  R* queries = reinterpret_cast<R*>(shared);
  R* keys = queries + Shape<R>::kRows * Shape<R>::kPitch;
  Rows* rows = reinterpret_cast<Rows*>(queries + kSharedElements<R>);
  const int thread = static_cast<int>(threadIdx.x);
  return {queries, keys, rows, thread % kColumnGroups, thread / kColumnGroups};
}
// Every thread of the block comes here.
template <class R>
ATTNFAST_DEVICE const Rows& share_rows(const Tiles<R>& tiles, const Rows& found) {
  if (threadIdx.x == 0) *tiles.rows = found;
  __syncthreads();
  return *tiles.rows;
}

// Scores, base 2, of the rows from q0 and the keys from `key` on.
template <class R>
ATTNFAST_DEVICE void form_scores(const DotAttentionParams& p, const Rows& rows, const Tiles<R>& tiles, int64_t q0,
                                 int64_t key, Scores<R>& score) {
  const bool modified = is_modified(p);
#pragma unroll
  for (int i = 0; i < Shape<R>::kRowsOfThread; ++i)
#pragma unroll
    for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) score[i][j] = R(0);
  const FmaRows query_rows = {p.query, query_offset(rows, p.query), rows.sequence.query_rows, p.head_size};
  const FmaRows key_rows = {p.key, key_offset(rows, p.key), rows.sequence.keys, p.head_size};
  add_products_of<Shape<R>>(query_rows, q0, key_rows, key, tiles.queries, tiles.keys, score);
#pragma unroll
  for (int i = 0; i < Shape<R>::kRowsOfThread; ++i) {
    const TileRow<R> row = tile_row_of<R>(p, rows, modified, q0 + tiles.ty + i * kRowGroups, key, Shape<R>::kColumns);
#pragma unroll
    for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) {
      score[i][j] = score_of(p, row, modified, tiles.tx + j * kColumnGroups, score[i][j]);
    }
  }
}

// The log-sum-exp of a thread's rows in two terms: a weight is exp2(score - base - rest).
template <class R>
struct Bases {
  R base[Shape<R>::kRowsOfThread], rest[Shape<R>::kRowsOfThread];
};

// A row whose biases are all finfo.min has lse = maximum + log2(sum) near -3e38, where the second term is lost. If a
// block has such a row, it forms both terms of its rows again. Every thread of the block comes here.
template <class R>
ATTNFAST_DEVICE Bases<R> bases_of(const DotAttentionParams& p, const Rows& rows, const Tiles<R>& tiles, int64_t q0) {
  constexpr int kMine = Shape<R>::kRowsOfThread;
  Bases<R> to;
  bool huge = false;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int64_t q = q0 + tiles.ty + i * kRowGroups;
    const bool valid = q < rows.sequence.queries;
    const R lse = valid ? static_cast<const R*>(p.lse)[row_index(p, rows.sequence, rows.head, q)] : R(0);
    to.base[i] = lse == negative_infinity<R>() ? R(0) : lse;  // that row sees nothing
    to.rest[i] = R(0);
    huge = huge || (fabs(to.base[i]) > R(0x1p20) && fabs(to.base[i]) <= largest_finite<R>());
  }
  if (!__syncthreads_or(huge)) return to;

  R maximum[kMine], sum[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    maximum[i] = negative_infinity<R>();
    sum[i] = R(0);
  }
#pragma unroll 1
  for (int64_t key = 0; key < rows.sequence.keys; key += Shape<R>::kColumns) {
    Scores<R> score;
    form_scores(p, rows, tiles, q0, key, score);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) {
        const R x = score[i][j];
        if (x == negative_infinity<R>()) continue;
        const R larger = fmax(maximum[i], x);
        sum[i] = sum[i] * exp2_of(maximum[i] - larger) + exp2_of(x - larger);
        maximum[i] = larger;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
#pragma unroll
    for (int step = 1; step < kColumnGroups; step *= 2) {
      const R maximum2 = __shfl_xor_sync(0xFFFFFFFFu, maximum[i], step);
      const R sum2 = __shfl_xor_sync(0xFFFFFFFFu, sum[i], step);
      const R larger = fmax(maximum[i], maximum2), shift = larger == negative_infinity<R>() ? R(0) : larger;
      sum[i] = sum[i] * exp2_of(maximum[i] - shift) + sum2 * exp2_of(maximum2 - shift);
      maximum[i] = larger;
    }
    if (maximum[i] == negative_infinity<R>()) continue;
    if (p.sink) {
      const R sink = static_cast<const R*>(p.sink)[rows.head] * static_cast<R>(kLog2e);
      sum[i] += exp2_of(sink - maximum[i]);
    }
    to.base[i] = maximum[i];
    to.rest[i] = log2(sum[i]);
  }
  return to;
}

// The weights of the rows from q0 and the keys from `key` on; what is hidden is -0.
template <class R>
ATTNFAST_DEVICE void form_weights(const DotAttentionParams& p, const Rows& rows, const Tiles<R>& tiles,
                                  const Bases<R>& bases, int64_t q0, int64_t key, Scores<R>& weight) {
  form_scores(p, rows, tiles, q0, key, weight);
  const bool factored = has_factor(p);
#pragma unroll
  for (int i = 0; i < Shape<R>::kRowsOfThread; ++i) {
    const int64_t q = q0 + tiles.ty + i * kRowGroups;
    const RowPrior<R> prior = prior_row_of<R>(p, rows, q, key);
#pragma unroll
    for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) {
      R& x = weight[i][j];
      if (x == negative_infinity<R>()) {
        x = R(-0.0);
        continue;
      }
      x = exp2_of(x - bases.base[i] - bases.rest[i]);
      if (factored) x = apply_factor(p, rows, prior, q, key, tiles.tx + j * kColumnGroups, x);
    }
  }
}

// Full matrix and row maxima: a block has rows.
template <class R>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_row_weights_kernel(DotAttentionParams p) {
  constexpr int kMine = Shape<R>::kRowsOfThread, kKeys = Shape<R>::kColumns;
  ATTNFAST_SHARED(shared);
  const Tiles<R> tiles = tiles_in<R>(shared);
  const Rows& rows = share_rows(tiles, rows_of_block(p, Shape<R>::kRows));
  if (rows.first >= rows.last) return;
  const bool full = p.weights_mode == WeightsMode::kFull;
  const int64_t begin = rows.key_begin / kKeys * kKeys;
  const int64_t tiles_end = begin + (rows.key_end - begin + kKeys - 1) / kKeys * kKeys;
  const int64_t end = tiles_end < rows.sequence.keys ? tiles_end : rows.sequence.keys;
  const int64_t to = offset4(p.weights, rows.sequence.tensor_batch, rows.head, rows.sequence.query_begin, 0);

  if (full) {  // what no tile has; of packed sequences that is all other sequences' keys too
    const int64_t low = rows.sequence.key_begin + begin, high = rows.sequence.key_begin + end;
    for (int64_t q = rows.first + threadIdx.x / 32; q < rows.last; q += kFmaThreads / 32) {
      const int64_t row = to + q * p.weights.stride[2];
      for (int64_t k = threadIdx.x % 32; k < p.key_tokens; k += 32) {
        if (k < low || k >= high) store_element(p.weights.data, p.weights.dtype, row + k * p.weights.stride[3], R(0));
      }
    }
  }
  R largest[kMine];
  int64_t index[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    largest[i] = R(0);
    index[i] = -1;
  }
  const Bases<R> bases = bases_of(p, rows, tiles, rows.first);
  for (int64_t key = begin; key < rows.key_end; key += kKeys) {
    Scores<R> weight;
    form_weights(p, rows, tiles, bases, rows.first, key, weight);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t q = rows.first + tiles.ty + i * kRowGroups;
#pragma unroll
      for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) {
        const int64_t k = key + tiles.tx + j * kColumnGroups;
        const R x = weight[i][j];
        if (full) {
          if (q >= rows.last || k >= end) continue;
          const int64_t at = to + q * p.weights.stride[2] + (rows.sequence.key_begin + k) * p.weights.stride[3];
          store_element(p.weights.data, p.weights.dtype, at, is_hidden(x) ? R(0) : x);
        } else if (!is_hidden(x) && (index[i] < 0 || x > largest[i] || (x != x && largest[i] == largest[i]))) {
          largest[i] = x;
          index[i] = k;
        }
      }
    }
  }
  if (full) return;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    // NaN is the largest; among equals the lowest key.
#pragma unroll
    for (int step = 1; step < kColumnGroups; step *= 2) {
      const R x = __shfl_xor_sync(0xFFFFFFFFu, largest[i], step);
      const int64_t k = __shfl_xor_sync(0xFFFFFFFFu, index[i], step);
      const bool nan = x != x, nan_here = largest[i] != largest[i];
      const bool equal = x == largest[i] || (nan && nan_here);
      const bool better = equal ? k < index[i] : x > largest[i] || nan;
      if (k >= 0 && (index[i] < 0 || better)) {
        largest[i] = x;
        index[i] = k;
      }
    }
    const int64_t q = rows.first + tiles.ty + i * kRowGroups;
    if (q >= rows.last || tiles.tx != 0) continue;
    store_element(p.weights.data, p.weights.dtype, to + q * p.weights.stride[2], largest[i]);
    p.weights_index[row_index(p, rows.sequence, rows.head, q)] =
        index[i] < 0 ? index[i] : rows.sequence.key_begin + index[i];
  }
}

// Column sums: a block has keys.
template <class R>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_column_weights_kernel(DotAttentionParams p) {
  constexpr int kRows = Shape<R>::kRows, kKeys = Shape<R>::kColumns;
  ATTNFAST_SHARED(shared);
  const Tiles<R> tiles = tiles_in<R>(shared);
  const BlockTile tile = block_tile(p, p.cu_seqlens_k, p.key_tokens, p.heads, kKeys, blockIdx.x);
  const Rows& rows = share_rows(tiles, rows_of_head(p, tile.batch, tile.head, 1));
  const int64_t key = tile.index * kKeys, columns = p.cu_seqlens_k ? rows.sequence.keys : p.key_tokens;
  if (tile.index < 0 || key >= columns) return;
  int64_t begin = 0, end = key < rows.sequence.keys ? rows.sequence.queries : 0;
  if (!rows.bounds.data) {
    begin = clamp_index(first_query(rows.band, key), 0, end);
    end = clamp_index(end_query(rows.band, key + kKeys - 1), 0, end);
  }

  R sum[Shape<R>::kColumnsOfThread] = {};
  for (int64_t q = begin / kRows * kRows; q < end; q += kRows) {
    const Bases<R> bases = bases_of(p, rows, tiles, q);
    Scores<R> weight;
    form_weights(p, rows, tiles, bases, q, key, weight);
#pragma unroll
    for (int i = 0; i < Shape<R>::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) sum[j] += weight[i][j];
  }
  __syncthreads();  // keys are no longer read
  R* sums = tiles.keys;
#pragma unroll
  for (int j = 0; j < Shape<R>::kColumnsOfThread; ++j) sums[tiles.ty * kKeys + tiles.tx + j * kColumnGroups] = sum[j];
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine >= kKeys || key + mine >= columns) return;
  R total = R(0);
  for (int i = 0; i < kRowGroups; ++i) total += sums[i * kKeys + mine];
  const int64_t to = offset4(p.weights, rows.sequence.tensor_batch, rows.head, 0, rows.sequence.key_begin + key + mine);
  store_element(p.weights.data, p.weights.dtype, to, total);
}

template <class R>
void launch(const DotAttentionParams& p, Stream stream) {
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_weights<float>" : "dot_attention_weights<double>";
  constexpr size_t kBytes = kSharedElements<R> * sizeof(R) + sizeof(Rows);
  static_assert(kBytes <= 48 * 1024);
  if (p.weights_mode == WeightsMode::kColumnSum) {
    const int64_t keys = Shape<R>::kColumns;
    const int64_t tiles = p.cu_seqlens_k ? p.key_tokens / keys + p.batch : (p.key_tokens + keys - 1) / keys * p.batch;
    if (tiles == 0) return;
    ATTNFAST_LAUNCH((dot_attention_column_weights_kernel<R>), checked_grid(p, tiles * p.heads, kName), kFmaThreads,
                    kBytes, stream, p);
  } else {
    if (p.query_tokens == 0) return;
    ATTNFAST_LAUNCH((dot_attention_row_weights_kernel<R>), grid_of(p, Shape<R>::kRows, kName), kFmaThreads, kBytes,
                    stream, p);
  }
  check_launched(kName, p);
}

}  // namespace

void dot_attention_weights(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch<double>(p, static_cast<Stream>(stream));
  else
    launch<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
