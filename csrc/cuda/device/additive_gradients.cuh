// What the passes of the additive core's backward share: where in the workspace their parts lie, what a block has in
// shared memory, the gradient dS of the scores of a tile, and what this gives to queries or keys.
#pragma once

#include "cuda/device/additive.cuh"

namespace attnfast::cuda {

// Where in the workspace the parts lie, in elements; the planes of device/gradients.cuh come first. B is 1 and T_k the
// total where sequences are packed.
struct BackwardLayout {
  int64_t center;  // [splits][B H T_q]
  int64_t query;   // [splits][B H T_q][D]
  int64_t key;     // [B H_kv T_k][D]
  int64_t value;   // [B H_kv T_k][D_v]
  int64_t weight;  // [splits][tiles of queries][kDimGroups][2][D]: dw, d score_bias
  int64_t end;
};
template <class R>
ATTNFAST_HD BackwardLayout layout_of(const AttentionParams& p, int64_t splits, int64_t tile_rows) {
  constexpr int64_t kGroups = AdditivePlan<R, false>::kDimGroups;
  const int64_t rows = plane_size(p), keys = (p.cu_seqlens_k ? 1 : p.batch) * p.kv_heads * p.key_tokens;
  BackwardLayout at;
  at.center = kQueryPlanes * rows;
  at.query = at.center + splits * rows;
  at.key = at.query + splits * rows * p.head_size;
  at.value = at.key + keys * p.head_size;
  at.weight = at.value + keys * p.value_size;
  at.end = at.weight + splits * gradient_blocks<false>(p, tile_rows) * kGroups * 2 * p.head_size;
  return at;
}

template <class R, bool NARROW>
struct BackwardPlan : AdditivePlan<R, NARROW> {
  using Base = AdditivePlan<R, NARROW>;
  static constexpr int kPairElements = (Base::kRows + Base::kKeys) * Base::kPitch;  // grad_out and values
  static constexpr int kByQuery = Base::kRows * Base::kKeyPitch, kByKey = Base::kKeys * Base::kRowPitch;
  static constexpr int kTileElements = kByQuery > kByKey ? kByQuery : kByKey;
  static constexpr int kSharedElements = Base::kOperandElements + kPairElements + kTileElements;
  static constexpr size_t kBytes = kSharedElements * sizeof(R) + sizeof(Rows);
  static_assert(kBytes <= 48 * 1024, "more than a kernel has without asking");
};

// What a block has in shared memory: a chunk of the operands of the scores, one of grad_out and values, a tile, and its
// rows.
template <class P>
struct BackwardTiles {
  using R = typename P::Real;
  AdditiveOperands<P> operands;
  R *grads, *values, *tile;
  Rows& rows;

  ATTNFAST_DEVICE explicit BackwardTiles(R* base)
      : operands(base),
        grads(base + P::kOperandElements),
        values(grads + P::kRows * P::kPitch),
        tile(values + P::kKeys * P::kPitch),
        rows(*reinterpret_cast<Rows*>(base + P::kSharedElements)) {}
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
  const int64_t grad_offset = offset4(p.grad_out, b, r.head, r.sequence.query_begin + r.first, c);
#pragma unroll 4
  for (int row = thread / P::kChunk; row < P::kRows; row += P::kDimGroups) {
    R x = R(0);
    if (inside && r.first + row < r.sequence.queries) {
      x = load_element<R>(p.grad_out.data, p.grad_out.dtype, grad_offset + row * p.grad_out.stride[2]);
    }
    to.grads[row * P::kPitch + column] = x;
    finite = finite && x - x == R(0);
  }
  const int64_t value_offset = offset4(p.value, b, r.kv_head, r.sequence.key_begin + key, c);
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
// grad_out pass: chunk(first column, met strange ones) for each chunk of them. `center`: null, or where sums by row of
// the tile are added to of what the prior's centre gets, times sigma. Returns the way of the last chunk of the
// operands, which stays where it is.
template <class P, bool SLOPES, class Applied, class Chunk>
ATTNFAST_DEVICE int gradient_tile(const AdditiveCall& p, int64_t key, const BackwardTiles<P>& tiles,
                                  typename P::Real (&gradient)[P::kRowsOfThread][P::kKeysOfThread],
                                  typename P::Real* center, Applied applied, Chunk chunk) {
  using R = typename P::Real;
  using Vector = typename P::Vector;
  const Rows& r = tiles.rows;
  const int ty = row_of_thread<P>(), tx = column_of_thread<P>();
  const bool factored = has_factor(p);
  R weight[P::kRowsOfThread][P::kKeysOfThread], factor[P::kRowsOfThread][P::kKeysOfThread];
  const int level = probability_tile<P>(
      p, r, key, tiles.operands, weight, [&](int i, int j, int64_t q, int column, R raw, R probability) {
        const bool hidden = is_hidden(probability);
        factor[i][j] = R(1);
        if (factored && !hidden) {
          factor[i][j] = apply_factor(p, r, prior_row_of<R>(p, r, q, key), q, key, column, R(1));
        }
        applied(ty + i * P::kRowGroups, column, hidden ? R(-0.0) : probability * factor[i][j]);
        gradient[i][j] = R(1);  // until the rest is known, the slope of the soft cap
        if (SLOPES && p.softcap > 0.0) {
          const R capped = tanh(raw / static_cast<R>(p.softcap));
          gradient[i][j] = fma(-capped, capped, R(1));
        }
      });
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
    const R delta = query_values<R>(p, r, q).delta;
    const RowPrior<R> prior = prior_row_of<R>(p, r, q, key);
    R sum = R(0);
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      const int column = tx + j * P::kColumnGroups;
      const R probability = weight[i][j];
      // What is hidden may have met anything.
      if (is_hidden(probability)) {
        gradient[i][j] = R(0);
        continue;
      }
      R arrived = product[i][j];
      if (p.grad_weights.data) arrived += weight_gradient<R>(p, r, q, key + column);
      arrived *= factor[i][j];
      if (center && probability != R(0)) {
        sum += probability * arrived * ((prior.first + static_cast<R>(column) - prior.center) * prior.rate);
      }
      gradient[i][j] = probability * (arrived - delta) * gradient[i][j];
    }
    if (!center) continue;
#pragma unroll
    for (int step = 1; step < P::kColumnGroups; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (tx == 0 && q < r.last) center[q - r.first] += sum;
  }
  return level;
}

// Adds what a tile gives to this thread's elements of [.., D] at `to`, rows `own` of the tile: chunk by chunk from the
// last, which is in shared memory already. BY_QUERY: rows are queries, and dw goes to `weight_part`; else they are
// keys.
template <class P, bool BY_QUERY>
ATTNFAST_DEVICE void add_slopes_of_tile(const AdditiveCall& p, int64_t key, int level, const BackwardTiles<P>& tiles,
                                        typename P::Real* to, typename P::Real* weight_part) {
  using R = typename P::Real;
  const AdditiveOperands<P>& at = tiles.operands;
  const int column = static_cast<int>(threadIdx.x) % P::kChunk;
  const int64_t last = p.head_size > 0 ? (p.head_size - 1) / P::kChunk * P::kChunk : 0;
  for (int64_t d0 = last; d0 >= 0; d0 -= P::kChunk) {
    if (d0 != last) level = load_operands<P>(p, tiles.rows, key, d0, at);
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

}  // namespace attnfast::cuda
