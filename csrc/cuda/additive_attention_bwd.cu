// Backward of the additive core. Weights are formed again from the scores and the log-sum-exp, a tile of queries and
// keys at a time, in passes whose blocks each own what they add to, so that nothing is added atomically:
//   delta        a warp a row: rowsum(grad_out * out) + delta_shift;
//   queries      a block owns a tile of queries, passes over the keys (or over its split of them), and leaves its parts
//                of dQ, dw and d score_bias in the workspace; two further kernels add these in order;
//   keys         a block owns a tile of keys of a key head and passes over the queries of the heads that share it: dK,
//   dV; bias         a block owns a tile of the gradient of a bias and passes over everything that was broadcast there;
//   sink         a block a head.
// With dS the gradient of a score, dq_d = w_d sum_k dS (1 - tanh^2), dk_d the same over queries, dw_d the sum of
// dS tanh: device/additive.cuh forms them from the exponentials of the scores. D may be anything: the sums of a tile go
// to the workspace, chunk by chunk, and only the thread that owns an element of it touches it.
#include "cuda/additive_attention.h"
#include "cuda/device/additive.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kReduceThreads = 256;

// Where in the workspace the parts lie, in elements.
struct BackwardLayout {
  int64_t delta;   // [B H T_q]
  int64_t query;   // [splits][B H T_q][D]
  int64_t key;     // [B H_kv T_k][D]
  int64_t value;   // [B H_kv T_k][D_v]
  int64_t weight;  // [splits][blocks of queries][kDimGroups][2][D]: dw, d score_bias
  int64_t end;
};
template <class R>
ATTNFAST_HD BackwardLayout layout_of(const AttentionParams& p, int64_t splits, int64_t tile_rows) {
  constexpr int64_t kGroups = AdditivePlan<R, false>::kDimGroups;
  const int64_t heads = p.batch * p.heads, rows = heads * p.query_tokens, keys = p.batch * p.kv_heads * p.key_tokens;
  const int64_t blocks = heads * ((p.query_tokens + tile_rows - 1) / tile_rows);
  BackwardLayout at;
  at.delta = 0;
  at.query = rows;
  at.key = at.query + splits * rows * p.head_size;
  at.value = at.key + keys * p.head_size;
  at.weight = at.value + keys * p.value_size;
  at.end = at.weight + splits * blocks * kGroups * 2 * p.head_size;
  return at;
}

template <class R, bool NARROW>
struct BackwardPlan : AdditivePlan<R, NARROW> {
  using Base = AdditivePlan<R, NARROW>;
  static constexpr int kPairElements = (Base::kRows + Base::kKeys) * Base::kPitch;  // grad_out and values
  static constexpr int kByQuery = Base::kRows * Base::kKeyPitch, kByKey = Base::kKeys * Base::kRowPitch;
  static constexpr int kTileElements = kByQuery > kByKey ? kByQuery : kByKey;
  static constexpr int kSharedElements = Base::kOperandElements + kPairElements + kTileElements;
};

// What a block has in shared memory: a chunk of the operands of the scores, one of grad_out and values, and a tile.
template <class P>
struct BackwardTiles {
  using R = typename P::Real;
  AdditiveOperands<P> operands;
  R *grads, *values, *tile;

  ATTNFAST_DEVICE explicit BackwardTiles(R* base)
      : operands(base),
        grads(base + P::kOperandElements),
        values(grads + P::kRows * P::kPitch),
        tile(values + P::kKeys * P::kPitch) {}
};

// Columns [c0, c0 + kChunk) of grad_out and of the values of a tile. Returns whether this thread has met something in
// grad_out that is not finite. Every thread of the block calls it; what was there before is no longer read.
template <class P>
ATTNFAST_DEVICE bool load_pair(const AdditiveCall& p, const Rows& r, int64_t key, int64_t c0,
                               const BackwardTiles<P>& to) {
  using R = typename P::Real;
  const int thread = static_cast<int>(threadIdx.x), column = thread % P::kChunk;
  const int64_t b = r.sequence.tensor_batch, c = c0 + column;
  const bool inside = c < p.value_size;
  bool finite = true;
  __syncthreads();
  const int64_t grad_offset = offset4(p.grad_out, b, r.head, r.first, c);
#pragma unroll 4
  for (int row = thread / P::kChunk; row < P::kRows; row += P::kDimGroups) {
    R x = R(0);
    if (inside && r.first + row < r.sequence.queries) {
      x = load_element<R>(p.grad_out.data, p.grad_out.dtype, grad_offset + row * p.grad_out.stride[2]);
    }
    to.grads[row * P::kPitch + column] = x;
    finite = finite && x - x == R(0);
  }
  const int64_t value_offset = offset4(p.value, b, r.kv_head, key, c);
#pragma unroll 4
  for (int row = thread / P::kChunk; row < P::kKeys; row += P::kDimGroups) {
    R x = R(0);
    if (inside && key + row < r.sequence.keys) {
      x = load_element<R>(p.value.data, p.value.dtype, value_offset + row * p.value.stride[2]);
    }
    to.values[row * P::kPitch + column] = x;
  }
  return !finite;
}

// gradient = dS of the tile, the derivative by the scores that the softmax sees; with SLOPES by the raw scores, before
// the soft cap. applied(row, column, weight) is told each weight, as the forward applies it, before the columns of
// grad_out pass: chunk(first column, met strange ones) for each chunk of them. Returns the way of the last chunk of the
// operands, which stays where it is.
template <class P, bool SLOPES, class Applied, class Chunk>
ATTNFAST_DEVICE int gradient_tile(const AdditiveCall& p, const Rows& r, int64_t key, const BackwardTiles<P>& tiles,
                                  typename P::Real (&gradient)[P::kRowsOfThread][P::kKeysOfThread], Applied applied,
                                  Chunk chunk) {
  using R = typename P::Real;
  using Vector = typename P::Vector;
  const int ty = row_of_thread<P>(), tx = column_of_thread<P>();
  const bool modified = is_modified(p);
  R weight[P::kRowsOfThread][P::kKeysOfThread], factor[P::kRowsOfThread][P::kKeysOfThread];
  const int level = score_tile<P>(p, r, key, tiles.operands, weight);
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int row_of_tile = ty + i * P::kRowGroups;
    const int64_t q = r.first + row_of_tile;
    const TileRow<R> row = tile_row_of<R>(p, r, modified, q, key, P::kKeys);
    const R lse = q < r.last ? static_cast<const R*>(p.lse)[row_index(p, r.sequence, r.head, q)] : R(0);
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      const int column = tx + j * P::kColumnGroups;
      const R raw = weight[i][j], score = score_of(p, row, modified, column, raw);
      const bool hidden = score == negative_infinity<R>();
      weight[i][j] = hidden ? R(-0.0) : exp2_of(score - lse);
      factor[i][j] = hidden || p.dropout_p == 0.0 ? R(1) : drop(p, r, q, key + column, R(1));
      applied(row_of_tile, column, hidden ? R(-0.0) : weight[i][j] * factor[i][j]);
      gradient[i][j] = R(1);  // until the rest is known, the slope of the soft cap
      if (SLOPES && p.softcap > 0.0) {
        const R capped = tanh(raw / static_cast<R>(p.softcap));
        gradient[i][j] = fma(-capped, capped, R(1));
      }
    }
  }
  R product[P::kRowsOfThread][P::kKeysOfThread] = {};
  for (int64_t c0 = 0; c0 < p.value_size; c0 += P::kChunk) {
    const bool strange = __syncthreads_or(load_pair<P>(p, r, key, c0, tiles));
    chunk(c0, strange);
#pragma unroll 2
    for (int c = 0; c < P::kChunk; c += P::kWidth) {
      Vector v[P::kKeysOfThread];
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        v[j] = *reinterpret_cast<const Vector*>(tiles.values + (tx + j * P::kColumnGroups) * P::kPitch + c);
      }
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        const Vector g = *reinterpret_cast<const Vector*>(tiles.grads + (ty + i * P::kRowGroups) * P::kPitch + c);
#pragma unroll
        for (int j = 0; j < P::kKeysOfThread; ++j)
#pragma unroll
          for (int e = 0; e < P::kWidth; ++e) product[i][j] += g.x[e] * v[j].x[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = r.first + ty + i * P::kRowGroups;
    const R delta = q < r.last ? static_cast<const R*>(p.workspace)[row_index(p, r.sequence, r.head, q)] : R(0);
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      // What is hidden may have met anything.
      gradient[i][j] =
          is_hidden(weight[i][j]) ? R(0) : weight[i][j] * (product[i][j] * factor[i][j] - delta) * gradient[i][j];
    }
  }
  return level;
}

// Adds what a tile gives to this thread's elements of [.., D] at `to`, rows `own` of the tile: chunk by chunk from the
// last, which is in shared memory already. BY_QUERY: rows are queries, and dw goes to `weight_part`; else they are
// keys.
template <class P, bool BY_QUERY>
ATTNFAST_DEVICE void add_slopes_of_tile(const AdditiveCall& p, const Rows& r, int64_t key, int level,
                                        const BackwardTiles<P>& tiles, typename P::Real* to,
                                        typename P::Real* weight_part) {
  using R = typename P::Real;
  const AdditiveOperands<P>& at = tiles.operands;
  const int column = static_cast<int>(threadIdx.x) % P::kChunk;
  const int64_t last = p.head_size > 0 ? (p.head_size - 1) / P::kChunk * P::kChunk : 0;
  for (int64_t d0 = last; d0 >= 0; d0 -= P::kChunk) {
    if (d0 != last) level = load_operands<P>(p, r, key, d0, at);
    const int64_t d = d0 + column;
    const bool inside = d < p.head_size;
    const R weight = at.weights[column];
    // Rows without a token have gradients of 0, and so sums of 0.
    const auto add = [&](int row, R sum) {
      if (inside && sum != R(0)) to[row * p.head_size + d] += weight * sum;
    };
    if constexpr (BY_QUERY) {
      const R tangents = add_slopes<P, P::kRows, P::kKeys>(level, at.queries, at.keys, tiles.tile, P::kKeyPitch, add);
      if (inside) weight_part[d] += tangents;
    } else {
      add_slopes<P, P::kKeys, P::kRows>(level, at.keys, at.queries, tiles.tile, P::kRowPitch, add);
    }
  }
}

// ---- Passes ---------------------------------------------------------------------------------------------------------
template <class R>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_delta_kernel(AdditiveCall p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t rows = p.batch * p.heads * p.query_tokens;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kAdditiveThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp
  const int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  const int64_t grad = offset4(p.grad_out, b, h, q, 0), out = offset4(p.out, b, h, q, 0);
  R sum = R(0);
  bool zero = true;
#pragma unroll 1  // unrolled, it spills on one GPU
  for (int64_t c = lane; c < p.value_size; c += 32) {
    const R x = load_element<R>(p.out.data, p.out.dtype, out + c * p.out.stride[3]);
    sum += x * load_element<R>(p.grad_out.data, p.grad_out.dtype, grad + c * p.grad_out.stride[3]);
    zero = zero && x == R(0);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  // A masked row has output 0; a NaN gradient that arrives there must not come back.
  if (__all_sync(0xFFFFFFFFu, zero) && sum != sum) sum = R(0);
  if (lane == 0) {
    static_cast<R*>(p.workspace)[row] = sum + (p.delta_shift ? static_cast<const R*>(p.delta_shift)[row] : R(0));
  }
}

template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_query_kernel(AdditiveCall p) {
  using P = BackwardPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const int column = static_cast<int>(threadIdx.x) % P::kChunk, group = static_cast<int>(threadIdx.x) / P::kChunk;
  const Rows rows = rows_of_block(p, P::kRows);
  const BackwardLayout at = layout_of<R>(p, p.splits, P::kRows);
  const int64_t split = blockIdx.y, all_rows = p.batch * p.heads * p.query_tokens;
  R* const to = static_cast<R*>(p.workspace) + at.query +
                (split * all_rows + row_index(p, rows.sequence, rows.head, rows.first)) * p.head_size;
  R* const part = static_cast<R*>(p.workspace) + at.weight +
                  ((split * gridDim.x + blockIdx.x) * P::kDimGroups + group) * 2 * p.head_size;
  const int own_rows = static_cast<int>(rows.last - rows.first);
  for (int64_t d = column; d < p.head_size; d += P::kChunk) {
    for (int row = group; row < own_rows; row += P::kDimGroups) to[row * p.head_size + d] = R(0);
    part[d] = R(0);
  }

  const KeySpan span = keys_of_split<P>(rows, p.splits);
  for (int64_t key = span.begin; key < span.end; key += P::kKeys) {
    R gradient[P::kRowsOfThread][P::kKeysOfThread];
    const int level = gradient_tile<P, true>(p, rows, key, tiles, gradient, [](int, int, R) {}, [](int64_t, bool) {});
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        tiles.tile[(ty + i * P::kRowGroups) * P::kKeyPitch + tx + j * P::kColumnGroups] = gradient[i][j];
      }
    __syncthreads();
    add_slopes_of_tile<P, true>(p, rows, key, level, tiles, to, part);
  }

  for (int64_t d = column; d < p.head_size; d += P::kChunk) {
    R sum = R(0);
    for (int row = group; row < own_rows; row += P::kDimGroups) sum += to[row * p.head_size + d];
    part[p.head_size + d] = sum;
  }
}

// dQ of one row: its splits in order.
template <class R>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_bwd_finish_kernel(AdditiveCall p) {
  const int64_t rows = p.batch * p.heads * p.query_tokens, row = blockIdx.x;
  const int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  // The query's parts lie behind delta, whatever the tiles.
  const R* from = static_cast<const R*>(p.workspace) + rows;
  const int64_t offset = offset4(p.grad_query, b, h, q, 0);
  for (int64_t d = threadIdx.x; d < p.head_size; d += kAdditiveThreads) {
    R sum = R(0);
    for (int64_t i = 0; i < p.splits; ++i) sum += from[(i * rows + row) * p.head_size + d];
    store_element(p.grad_query.data, p.grad_query.dtype, offset + d * p.grad_query.stride[3], sum);
  }
}

// 32 dimensions of dw (blockIdx.z 0) or d score_bias (1) of one head or of all: eight warps take turns at the parts,
// and their sums are added in order.
template <class R>
__global__ void __launch_bounds__(kReduceThreads)
    additive_attention_bwd_weight_kernel(AdditiveCall p, int64_t tile_rows) {
  constexpr int kWarps = kReduceThreads / 32, kGroups = AdditivePlan<R, false>::kDimGroups;
  ATTNFAST_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, part = blockIdx.z;
  R* const out = static_cast<R*>(part == 0 ? p.grad_weight : p.grad_score_bias);
  if (out == nullptr) return;  // the whole block
  const bool by_head = part == 0 ? p.weight_by_head : p.score_bias_by_head;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * 32 + lane, head = blockIdx.y;
  if (!by_head && head > 0) return;
  const int64_t per_head = (p.query_tokens + tile_rows - 1) / tile_rows * kGroups;
  const int64_t heads = by_head ? 1 : p.heads, parts = p.splits * p.batch * heads * per_head;
  const R* const from = static_cast<const R*>(p.workspace) + layout_of<R>(p, p.splits, tile_rows).weight;
  double sum = 0.0;
  for (int64_t i = warp; i < parts && d < p.head_size; i += kWarps) {
    // Numbered as they lie: [splits][B][H][per_head], of the one head if it has its own.
    const int64_t rest = i / per_head, h = head + rest % heads, outer = rest / heads;
    sum += static_cast<double>(from[(((outer * p.heads + h) * per_head + i % per_head) * 2 + part) * p.head_size + d]);
  }
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || d >= p.head_size) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i * 32 + lane];
  out[head * p.head_size + d] = static_cast<R>(sum);
}

template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_key_kernel(AdditiveCall p) {
  using P = BackwardPlan<R, NARROW>;
  using Vector = typename P::Vector;
  constexpr int kOwn = P::kKeys / P::kDimGroups;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const int column = static_cast<int>(threadIdx.x) % P::kChunk, group = static_cast<int>(threadIdx.x) / P::kChunk;
  const int64_t key_tiles = (p.key_tokens + P::kKeys - 1) / P::kKeys, block = blockIdx.x;
  const int64_t key = block % key_tiles * P::kKeys, kv_head = block / key_tiles % p.kv_heads;
  const int64_t batch = block / key_tiles / p.kv_heads, heads = p.heads / p.kv_heads;
  const BackwardLayout at = layout_of<R>(p, p.splits, P::kRows);
  const int64_t first_row = (batch * p.kv_heads + kv_head) * p.key_tokens + key;
  R* const keys = static_cast<R*>(p.workspace) + at.key + first_row * p.head_size;
  R* const values = static_cast<R*>(p.workspace) + at.value + first_row * p.value_size;
  const int own = static_cast<int>(p.key_tokens - key < P::kKeys ? p.key_tokens - key : P::kKeys);
  for (int row = group; row < own; row += P::kDimGroups) {
    for (int64_t d = column; d < p.head_size; d += P::kChunk) keys[row * p.head_size + d] = R(0);
    for (int64_t c = column; c < p.value_size; c += P::kChunk) values[row * p.value_size + c] = R(0);
  }

  for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; ++head) {
    for (int64_t first = 0; first < p.query_tokens; first += P::kRows) {
      const Rows rows = rows_at(p, batch, head, first, P::kRows);
      if (!meets(rows, key, P::kKeys)) continue;
      // The weights lie in the tile until dS takes their place.
      const auto applied = [&](int row, int k, R weight) { tiles.tile[k * P::kRowPitch + row] = weight; };
      const auto chunk = [&](int64_t c0, bool strange) {
        if (!p.grad_value.data) return;
        R sum[kOwn] = {};
#pragma unroll 1
        for (int row = 0; row < P::kRows; row += P::kWidth) {
          R grad[P::kWidth];
#pragma unroll
          for (int e = 0; e < P::kWidth; ++e) grad[e] = tiles.grads[(row + e) * P::kPitch + column];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            const Vector weight =
                *reinterpret_cast<const Vector*>(tiles.tile + (group + i * P::kDimGroups) * P::kRowPitch + row);
#pragma unroll
            for (int e = 0; e < P::kWidth; ++e) {
              if (strange && is_hidden(weight.x[e])) continue;
              sum[i] += weight.x[e] * grad[e];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = group + i * P::kDimGroups;
          if (row < own && c0 + column < p.value_size) values[row * p.value_size + c0 + column] += sum[i];
        }
      };
      R gradient[P::kRowsOfThread][P::kKeysOfThread];
      const int level = gradient_tile<P, true>(p, rows, key, tiles, gradient, applied, chunk);
      if (!p.grad_key.data) continue;
      __syncthreads();  // the weights are no longer read
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
        for (int j = 0; j < P::kKeysOfThread; ++j) {
          tiles.tile[(tx + j * P::kColumnGroups) * P::kRowPitch + ty + i * P::kRowGroups] = gradient[i][j];
        }
      __syncthreads();
      add_slopes_of_tile<P, false>(p, rows, key, level, tiles, keys, nullptr);
    }
  }

  const int64_t key_offset = offset4(p.grad_key, batch, kv_head, key, 0);
  const int64_t value_offset = offset4(p.grad_value, batch, kv_head, key, 0);
  for (int row = group; row < own; row += P::kDimGroups) {
    for (int64_t d = column; d < p.head_size && p.grad_key.data; d += P::kChunk) {
      store_element(p.grad_key.data, p.grad_key.dtype,
                    key_offset + row * p.grad_key.stride[2] + d * p.grad_key.stride[3], keys[row * p.head_size + d]);
    }
    for (int64_t c = column; c < p.value_size && p.grad_value.data; c += P::kChunk) {
      store_element(p.grad_value.data, p.grad_value.dtype,
                    value_offset + row * p.grad_value.stride[2] + c * p.grad_value.stride[3],
                    values[row * p.value_size + c]);
    }
  }
}

// A block has a tile of the gradient of bias `number`, of [B, H, T_q, T_k] with each broadcast dimension (stride 0)
// taken together, and passes over all that is summed there.
template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_bias_kernel(AdditiveCall p, int number) {
  using P = BackwardPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>(), thread = static_cast<int>(threadIdx.x);
  const Tensor4& grad = p.grad_bias[number];
  const int64_t units[4] = {p.batch, p.heads, (p.query_tokens + P::kRows - 1) / P::kRows,
                            (p.key_tokens + P::kKeys - 1) / P::kKeys};
  int64_t begin[4], end[4], block = blockIdx.x;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const bool summed = grad.stride[i] == 0;
    begin[i] = summed ? 0 : block % units[i];
    end[i] = summed ? units[i] : begin[i] + 1;
    if (!summed) block /= units[i];
  }
  R total[P::kRowsOfThread][P::kKeysOfThread] = {};
  for (int64_t b = begin[0]; b < end[0]; ++b)
    for (int64_t h = begin[1]; h < end[1]; ++h)
      for (int64_t i_q = begin[2]; i_q < end[2]; ++i_q) {
        const Rows rows = rows_at(p, b, h, i_q * P::kRows, P::kRows);
        for (int64_t i_k = begin[3]; i_k < end[3]; ++i_k) {
          if (!meets(rows, i_k * P::kKeys, P::kKeys)) continue;
          R gradient[P::kRowsOfThread][P::kKeysOfThread];
          gradient_tile<P, false>(p, rows, i_k * P::kKeys, tiles, gradient, [](int, int, R) {}, [](int64_t, bool) {});
#pragma unroll
          for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
            for (int j = 0; j < P::kKeysOfThread; ++j) total[i][j] += gradient[i][j];
        }
      }

#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      tiles.tile[(ty + i * P::kRowGroups) * P::kKeyPitch + tx + j * P::kColumnGroups] = total[i][j];
    }
  __syncthreads();
  const bool all_rows = grad.stride[2] == 0, all_keys = grad.stride[3] == 0;
  const int64_t q0 = begin[2] * P::kRows, k0 = begin[3] * P::kKeys;
  const int rows = all_rows ? 1 : P::kRows, keys = all_keys ? 1 : P::kKeys;
  for (int at = thread; at < rows * keys; at += kAdditiveThreads) {
    const int row = at / keys, k = at % keys;
    if (q0 + row >= p.query_tokens || k0 + k >= p.key_tokens) continue;
    R sum = R(0);
    for (int i = row; i < (all_rows ? P::kRows : row + 1); ++i)
      for (int j = k; j < (all_keys ? P::kKeys : k + 1); ++j) sum += tiles.tile[i * P::kKeyPitch + j];
    static_cast<R*>(grad.data)[offset4(grad, begin[0], begin[1], q0 + row, k0 + k)] = sum;
  }
}

// d sink[h] = -sum over rows of exp(sink - lse) * delta
template <class R>
__global__ void __launch_bounds__(kReduceThreads) additive_attention_bwd_sink_kernel(AdditiveCall p) {
  ATTNFAST_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int64_t head = blockIdx.x;
  const R sink = static_cast<const R*>(p.sink)[head] * static_cast<R>(kLog2e);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.batch * p.query_tokens; i += kReduceThreads) {
    const int64_t row = (i / p.query_tokens * p.heads + head) * p.query_tokens + i % p.query_tokens;
    const R lse = static_cast<const R*>(p.lse)[row];
    if (lse == negative_infinity<R>()) continue;
    sum -= static_cast<double>(exp2_of(sink - lse)) * static_cast<double>(static_cast<const R*>(p.workspace)[row]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kReduceThreads; ++i) sum += sums[i];
  static_cast<R*>(p.grad_sink)[head] = static_cast<R>(sum);
}

// ---- Launches -------------------------------------------------------------------------------------------------------
unsigned checked_grid(const AdditiveCall& p, int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) throw std::runtime_error(call_text(kernel, p) + ": more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

template <class R, bool NARROW>
void launch(const AdditiveCall& p, Stream stream) {
  using P = BackwardPlan<R, NARROW>;
  constexpr size_t kBytes = P::kSharedElements * sizeof(R), kSumBytes = kReduceThreads * sizeof(double);
  static_assert(kBytes <= 48 * 1024, "more than a kernel has without asking");
  const int64_t rows = p.batch * p.heads * p.query_tokens;
  if (rows > 0) {
    const char* name = "additive_attention_delta";
    constexpr int64_t kRowsOfBlock = kAdditiveThreads / 32;
    const unsigned grid = checked_grid(p, (rows + kRowsOfBlock - 1) / kRowsOfBlock, name);
    ATTNFAST_LAUNCH((additive_attention_delta_kernel<R>), grid, kAdditiveThreads, 0, stream, p);
    check_launched(name, p);
  }
  if (rows > 0 && (p.grad_query.data || p.grad_weight || p.grad_score_bias)) {
    const char* name = "additive_attention_bwd_query";
    const dim3 grid(grid_of(p, P::kRows, name), static_cast<unsigned>(p.splits));
    ATTNFAST_LAUNCH((additive_attention_bwd_query_kernel<R, NARROW>), grid, kAdditiveThreads, kBytes, stream, p);
    check_launched(name, p);
  }
  if (rows > 0 && p.head_size > 0 && p.grad_query.data) {
    const char* name = "additive_attention_bwd_finish";
    ATTNFAST_LAUNCH((additive_attention_bwd_finish_kernel<R>), checked_grid(p, rows, name), kAdditiveThreads, 0, stream,
                    p);
    check_launched(name, p);
  }
  if (p.head_size > 0 && (p.grad_weight || p.grad_score_bias)) {  // zeros where there are no rows
    const char* name = "additive_attention_bwd_weight";
    const bool by_head = p.weight_by_head || p.score_bias_by_head;
    const dim3 grid(static_cast<unsigned>((p.head_size + 31) / 32), by_head ? static_cast<unsigned>(p.heads) : 1u, 2u);
    if (grid.y > 0) {
      ATTNFAST_LAUNCH((additive_attention_bwd_weight_kernel<R>), grid, kReduceThreads, kSumBytes, stream, p,
                      static_cast<int64_t>(P::kRows));
      check_launched(name, p);
    }
  }
  const int64_t key_tiles = (p.key_tokens + P::kKeys - 1) / P::kKeys;
  if (p.grad_key.data || p.grad_value.data) {
    const char* name = "additive_attention_bwd_key";
    const unsigned grid = checked_grid(p, key_tiles * p.kv_heads * p.batch, name);
    if (grid > 0) {
      ATTNFAST_LAUNCH((additive_attention_bwd_key_kernel<R, NARROW>), grid, kAdditiveThreads, kBytes, stream, p);
      check_launched(name, p);
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (!p.grad_bias[i].data || rows == 0 || key_tiles == 0) continue;
    const char* name = "additive_attention_bwd_bias";
    const int64_t units[4] = {p.batch, p.heads, (p.query_tokens + P::kRows - 1) / P::kRows, key_tiles};
    int64_t blocks = 1;
    for (int d = 0; d < 4; ++d) blocks *= p.grad_bias[i].stride[d] == 0 ? 1 : units[d];
    ATTNFAST_LAUNCH((additive_attention_bwd_bias_kernel<R, NARROW>), checked_grid(p, blocks, name), kAdditiveThreads,
                    kBytes, stream, p, i);
    check_launched(name, p);
  }
  if (p.grad_sink && p.heads > 0) {
    const char* name = "additive_attention_bwd_sink";
    ATTNFAST_LAUNCH((additive_attention_bwd_sink_kernel<R>), static_cast<unsigned>(p.heads), kReduceThreads, kSumBytes,
                    stream, p);
    check_launched(name, p);
  }
}

template <class R>
void launch_by_size(const AdditiveCall& p, Stream stream) {
  if (additive_attention_is_narrow(p))
    launch<R, true>(p, stream);
  else
    launch<R, false>(p, stream);
}

}  // namespace

int64_t additive_attention_bwd_workspace(const AdditiveAttentionParams& p) {
  const int64_t splits = additive_attention_splits(p), rows = additive_attention_rows(p);
  return p.query.dtype == DType::kFloat64 ? layout_of<double>(p, splits, rows).end
                                          : layout_of<float>(p, splits, rows).end;
}

void additive_attention_bwd_launch(const AdditiveCall& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
