// Attention weights of the additive core on request, as a second pass over the scores with the finished log-sum-exp,
// after prior and dropout: the full matrix, its column sums, or its row maxima. Tiles are the forward's, and so are the
// scores.
//
// A block of rows passes over the keys that they may see (or, of the full matrix, over its split of them); a block of
// keys sums over the queries in their order, each thread over its own, and then the threads' sums in order: no atomics.
//
// A log-sum-exp beyond 2^20 has no digits left for the logarithm of the sum. A kernel that runs before forms the two
// terms of such a row again, for this pass and for the backward's.
#include "cuda/additive_attention.h"
#include "cuda/device/additive.cuh"
#include "cuda/device/row_maximum.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

// In shared memory: the operands of a tile, and the rows.
template <class R, bool NARROW>
struct WeightsPlan : AdditivePlan<R, NARROW> {
  static constexpr size_t kBytes = AdditivePlan<R, NARROW>::kOperandElements * sizeof(R) + sizeof(Rows);
};
template <class P>
ATTNFAST_DEVICE Rows& rows_behind(const AdditiveOperands<P>& operands) {
  return *reinterpret_cast<Rows*>(operands.queries + P::kOperandElements);
}

// ---- The log-sum-exp in two terms -----------------------------------------------------------------------------------
template <class R>
ATTNFAST_DEVICE void add_score(SoftmaxState<R>& state, R score) {
  if (score > state.maximum) {
    state.sum = state.sum * exp2_of(state.maximum - score) + R(1);
    state.maximum = score;
  } else if (score != negative_infinity<R>()) {
    state.sum += exp2_of(score - state.maximum);
  }
}

// Both of a pair of lanes find the same bits: sums do not depend on the order of two. Every lane of a warp comes here
// together.
template <class R>
ATTNFAST_DEVICE SoftmaxState<R> join_states(SoftmaxState<R> state, int lanes) {
  for (int step = 1; step < lanes; step *= 2) {
    const SoftmaxState<R> other{__shfl_xor_sync(0xFFFFFFFFu, state.maximum, step),
                                __shfl_xor_sync(0xFFFFFFFFu, state.sum, step)};
    const R largest = fmax(state.maximum, other.maximum);
    if (largest == negative_infinity<R>()) continue;
    state = {largest, state.sum * exp2_of(state.maximum - largest) + other.sum * exp2_of(other.maximum - largest)};
  }
  return state;
}

// A block a tile of queries. Where none of its rows is huge, the planes are the log-sum-exp and 0.
template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bases_kernel(AdditiveCall p) {
  using P = WeightsPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const AdditiveOperands<P> operands(reinterpret_cast<R*>(shared));
  Rows& rows = rows_behind<P>(operands);
  share_rows(rows, rows_of_block(p, P::kRows));
  if (rows.first >= rows.last) return;
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const bool modified = is_modified(p);
  R base[P::kRowsOfThread];
  bool huge[P::kRowsOfThread], any = false;
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = rows.first + ty + i * P::kRowGroups;
    base[i] = q < rows.last ? static_cast<const R*>(p.lse)[row_index(p, rows.sequence, rows.head, q)] : R(0);
    huge[i] = fabs(base[i]) > static_cast<R>(kHugeLse) && fabs(base[i]) <= largest_finite<R>();
    any = any || huge[i];
  }
  SoftmaxState<R> state[P::kRowsOfThread];
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) state[i] = {negative_infinity<R>(), R(0)};
  if (__syncthreads_or(any)) {
    for (int64_t key = rows.key_begin / P::kKeys * P::kKeys; key < rows.key_end; key += P::kKeys) {
      R score[P::kRowsOfThread][P::kKeysOfThread];
      score_tile<P>(p, rows, key, operands, score);
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        const TileRow<R> row = tile_row_of<R>(p, rows, modified, rows.first + ty + i * P::kRowGroups, key, P::kKeys);
#pragma unroll
        for (int j = 0; j < P::kKeysOfThread; ++j) {
          add_score(state[i], final_score(p, row, modified, tx + j * P::kColumnGroups, score[i][j]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) state[i] = join_states(state[i], P::kColumnGroups);
  }
  R* const planes = static_cast<R*>(p.delta);
  const int64_t plane = plane_size(p);
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = rows.first + ty + i * P::kRowGroups;
    if (q >= rows.last || tx != 0) continue;
    R log = R(0);
    if (huge[i] && state[i].sum != R(0)) {
      base[i] = state[i].maximum;
      const R sink = p.sink ? static_cast<const R*>(p.sink)[rows.head] * static_cast<R>(kLog2e) : R(0);
      log = log2_real(state[i].sum + (p.sink ? exp2_of(sink - base[i]) : R(0)));
    }
    const int64_t row = row_index(p, rows.sequence, rows.head, q);
    planes[kBasePlane * plane + row] = base[i];
    planes[kLogPlane * plane + row] = log;
  }
}

// ---- Weights --------------------------------------------------------------------------------------------------------
// The weights of a tile as values meet them, -0 where the query may not see the key.
template <class P>
ATTNFAST_DEVICE void weight_tile(const AdditiveCall& p, const Rows& r, int64_t key, const AdditiveOperands<P>& operands,
                                 typename P::Real (&weight)[P::kRowsOfThread][P::kKeysOfThread]) {
  using R = typename P::Real;
  const bool factored = has_factor(p);
  probability_tile<P>(p, r, key, operands, weight, [&](int, int, int64_t q, int column, R, R& x) {
    if (factored && !is_hidden(x)) x = apply_factor(p, r, prior_row_of<R>(p, r, q, key), q, key, column, x);
  });
}

// Full matrix and row maxima: a block has rows, and of the full matrix its split of the keys.
template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_row_weights_kernel(AdditiveCall p) {
  using P = WeightsPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const AdditiveOperands<P> operands(reinterpret_cast<R*>(shared));
  Rows& rows = rows_behind<P>(operands);
  share_rows(rows, rows_of_block(p, P::kRows));
  if (rows.first >= rows.last) return;
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const bool full = p.weights_mode == WeightsMode::kFull;
  const int64_t to = offset4(p.weights, rows.sequence.tensor_batch, rows.head, rows.sequence.query_begin, 0);
  const int64_t begin = rows.key_begin / P::kKeys * P::kKeys;
  const int64_t tiles_end = begin + (rows.key_end - begin + P::kKeys - 1) / P::kKeys * P::kKeys;
  const int64_t end = tiles_end < rows.sequence.keys ? tiles_end : rows.sequence.keys;

  if (full) {  // what no tile has; of packed sequences that is all other sequences' keys too
    const int64_t low = rows.sequence.key_begin + begin, high = rows.sequence.key_begin + end;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32;
    for (int64_t q = rows.first + threadIdx.x / 32; q < rows.last; q += kAdditiveThreads / 32) {
      const int64_t row = to + q * p.weights.stride[2];
      for (int64_t k = first; k < p.key_tokens; k += static_cast<int64_t>(gridDim.y) * 32) {
        if (k < low || k >= high) store_element(p.weights.data, p.weights.dtype, row + k * p.weights.stride[3], R(0));
      }
    }
  }
  RowMaximum<R> largest[P::kRowsOfThread];
  const KeySpan span = keys_of_split<P>(rows, gridDim.y);
  for (int64_t key = span.begin; key < span.end; key += P::kKeys) {
    R weight[P::kRowsOfThread][P::kKeysOfThread];
    weight_tile<P>(p, rows, key, operands, weight);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t q = rows.first + ty + i * P::kRowGroups;
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        const int64_t k = key + tx + j * P::kColumnGroups;
        if (!full) {
          largest[i].take(weight[i][j], k);
        } else if (q < rows.last && k < end) {
          const int64_t at = to + q * p.weights.stride[2] + (rows.sequence.key_begin + k) * p.weights.stride[3];
          store_element(p.weights.data, p.weights.dtype, at, is_hidden(weight[i][j]) ? R(0) : weight[i][j]);
        }
      }
    }
  }
  if (full) return;
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    largest[i].join(P::kColumnGroups);
    const int64_t q = rows.first + ty + i * P::kRowGroups;
    if (q >= rows.last || tx != 0) continue;
    store_element(p.weights.data, p.weights.dtype, to + q * p.weights.stride[2], largest[i].weight);
    p.weights_index[row_index(p, rows.sequence, rows.head, q)] =
        largest[i].key < 0 ? largest[i].key : rows.sequence.key_begin + largest[i].key;
  }
}

// Column sums: a block has keys.
template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_column_weights_kernel(AdditiveCall p) {
  using P = WeightsPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const AdditiveOperands<P> operands(reinterpret_cast<R*>(shared));
  Rows& rows = rows_behind<P>(operands);
  const BlockTile tile = block_tile(p, p.cu_seqlens_k, p.key_tokens, p.heads, P::kKeys, blockIdx.x);
  share_rows(rows, rows_of_head(p, tile.batch, tile.head, 1));
  const int64_t key = tile.index * P::kKeys, columns = p.cu_seqlens_k ? rows.sequence.keys : p.key_tokens;
  if (tile.index < 0 || key >= columns) return;
  const int64_t keys_end = key + P::kKeys < rows.sequence.keys ? key + P::kKeys : rows.sequence.keys;
  KeyRange queries = {0, 0};
  if (key < keys_end) queries = queries_that_see(p, rows, 1, key, keys_end);

  R sum[P::kKeysOfThread] = {};
  for (int64_t q = queries.begin / P::kRows * P::kRows; q < queries.end; q += P::kRows) {
    __syncthreads();  // the rows before are no longer read
    if (threadIdx.x == 0) {
      rows.first = q;
      rows.last = q + P::kRows;
    }
    __syncthreads();
    R weight[P::kRowsOfThread][P::kKeysOfThread];
    weight_tile<P>(p, rows, key, operands, weight);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) sum[j] += weight[i][j];
  }
  __syncthreads();  // the operands are no longer read
  R* const sums = operands.queries;
#pragma unroll
  for (int j = 0; j < P::kKeysOfThread; ++j) {
    sums[row_of_thread<P>() * P::kKeys + column_of_thread<P>() + j * P::kColumnGroups] = sum[j];
  }
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine >= P::kKeys || key + mine >= columns) return;
  R total = R(0);
  for (int i = 0; i < P::kRowGroups; ++i) total += sums[i * P::kKeys + mine];
  const int64_t to = offset4(p.weights, rows.sequence.tensor_batch, rows.head, 0, rows.sequence.key_begin + key + mine);
  store_element(p.weights.data, p.weights.dtype, to, total);
}

// ---- Launches -------------------------------------------------------------------------------------------------------
template <class R, bool NARROW>
void launch_bases(const AdditiveCall& p, Stream stream) {
  const char* name = "additive_attention_bases";
  ATTNFAST_LAUNCH((additive_attention_bases_kernel<R, NARROW>), grid_of(p, WeightsPlan<R, NARROW>::kRows, name),
                  kAdditiveThreads, (WeightsPlan<R, NARROW>::kBytes), stream, p);
  check_launched(name, p);
}

template <class R, bool NARROW>
void launch_weights(const AdditiveCall& p, Stream stream) {
  using P = WeightsPlan<R, NARROW>;
  constexpr const char* kName = "additive_attention_weights";
  static_assert(P::kBytes <= 48 * 1024, "more than a kernel has without asking");
  if (p.query_tokens > 0) additive_attention_bases(p, stream);
  if (p.weights_mode == WeightsMode::kColumnSum) {
    const int64_t tiles =
        p.cu_seqlens_k ? p.key_tokens / P::kKeys + p.batch : (p.key_tokens + P::kKeys - 1) / P::kKeys * p.batch;
    if (p.key_tokens == 0) return;
    ATTNFAST_LAUNCH((additive_attention_column_weights_kernel<R, NARROW>), checked_grid(p, tiles * p.heads, kName),
                    kAdditiveThreads, P::kBytes, stream, p);
  } else {
    if (p.query_tokens == 0) return;
    const int64_t splits = p.weights_mode == WeightsMode::kFull ? p.splits : 1;
    const dim3 grid(grid_of(p, P::kRows, kName), static_cast<unsigned>(splits));
    ATTNFAST_LAUNCH((additive_attention_row_weights_kernel<R, NARROW>), grid, kAdditiveThreads, P::kBytes, stream, p);
  }
  check_launched(kName, p);
}

}  // namespace

void additive_attention_bases(const AdditiveCall& p, void* stream) {
  with_plan(
      p, [&](auto real, auto narrow) { launch_bases<decltype(real), narrow.value>(p, static_cast<Stream>(stream)); });
}

void additive_attention_weights(const AdditiveCall& p, void* stream) {
  with_plan(
      p, [&](auto real, auto narrow) { launch_weights<decltype(real), narrow.value>(p, static_cast<Stream>(stream)); });
}

}  // namespace attnfast::cuda
