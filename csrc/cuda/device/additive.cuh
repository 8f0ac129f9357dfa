// What the kernels of the additive core share: the tiles of a block, the scores s = sum_d w_d tanh(a_d + k_d) of a
// tile, a = query + score_bias, and the sums over a tile that its gradient needs.
//
// With A = e^2a and B = e^2k, formed once a tile and token, tanh(a + k) = 1 - 2 / x where x = 1 + A B: one FMA a
// triple, and four dimensions share a reciprocal. Half of the four weights is taken off each quotient, so that what is
// summed is -w tanh / 2, as small as the terms themselves and exact where tanh is +-1. The dimensions of a tile come in
// chunks; each chunk takes one of four ways, by its elements:
//   near    |a|, |k| <= 5/16: tanh is a short polynomial, exact to the relative precision of its argument;
//   fast    a and k so small that x cannot pass 2^30: as above;
//   clamped |a|, |k| <= 43, so that A and B are finite: x is cut at 2^30, where 1 / x no longer counts;
//   direct  anything else, NaN and infinity too: tanh itself. Nothing there is shared between queries, keys or
//           dimensions, so a NaN stays in its own row.
// float64 goes the direct way always. Forward and backward cut a call into the same tiles and chunks, and so form the
// same scores.
#pragma once

#include "cuda/device/additive_call.cuh"
#include "cuda/device/gradients.cuh"

namespace attnfast::cuda {

constexpr int kAdditiveThreads = 128;
constexpr int kNear = 0, kFast = 1, kClamped = 2, kDirect = 3;
constexpr float kNearLimit = 0.3125f;             // twice that: the polynomial's range
constexpr float kFastLimit = 5.195f;              // e^(2 * 2 * 5.195) < 2^30
constexpr float kExponentialLimit = 43.0f;        // e^(2 * 43) is finite, and so is its inverse
constexpr float kLargestX = 1073741824.0f;        // 2^30: the product of four stays finite
constexpr float kLargestWeight = 68719476736.0f;  // 2^36: times three x, too

// 32 keys and `kRows` queries; kColumnGroups threads next to each other own a row.
template <class R, bool NARROW>
struct AdditivePlan {
  using Real = R;
  using Vector = typename VectorOf<R>::Type;
  static constexpr int kWidth = Vector::kSize;
  static constexpr int kKeys = 32, kRows = NARROW ? kNarrowRows : sizeof(R) == 4 ? 32 : 16;
  static constexpr int kColumnGroups = NARROW ? 32 : 16, kRowGroups = kAdditiveThreads / kColumnGroups;
  static constexpr int kRowsOfThread = kRows / kRowGroups, kKeysOfThread = kKeys / kColumnGroups;
  // Dimensions of a chunk, and how many threads share one of them.
  static constexpr int kChunk = sizeof(R) == 4 ? 64 : 32, kDimGroups = kAdditiveThreads / kChunk;
  // Rows in shared memory are 16 bytes longer than a multiple of 128: eight neighbours start in different banks.
  static constexpr int kPitch = kChunk + kWidth, kKeyPitch = kKeys + kWidth, kRowPitch = kRows + kWidth;
  // Queries, keys, weights, and a word for each warp.
  static constexpr int kOperandElements = (kRows + kKeys) * kPitch + kChunk + kAdditiveThreads / 32;
};

// A chunk of the operands of a tile in shared memory; `level`: a word for each warp.
template <class P>
struct AdditiveOperands {
  using R = typename P::Real;
  R *queries, *keys, *weights;
  int* level;

  ATTNFAST_DEVICE explicit AdditiveOperands(R* base) {
    queries = base;
    keys = queries + P::kRows * P::kPitch;
    weights = keys + P::kKeys * P::kPitch;
    level = reinterpret_cast<int*>(weights + P::kChunk);
  }
};

// The rows of a block, in shared memory, because registers are short. Every thread of the block comes here; what was
// there before is no longer read.
ATTNFAST_DEVICE void share_rows(Rows& to, const Rows& found) {
  __syncthreads();
  if (threadIdx.x == 0) to = found;
  __syncthreads();
}

// Whether any of the rows sees any of the keys [key, key + keys) by position.
ATTNFAST_DEVICE bool meets(const Rows& r, int64_t key, int64_t keys) {
  return key < r.key_end && key + keys > r.key_begin;
}

// The keys of split blockIdx.y of a block of rows: whole tiles, of all that the sequence has, whatever the rows see.
struct KeySpan {
  int64_t begin, end;
};
template <class P>
ATTNFAST_DEVICE KeySpan keys_of_split(const Rows& r, int64_t splits) {
  const int64_t tiles = (r.sequence.keys + P::kKeys - 1) / P::kKeys;
  const int64_t share = (tiles + splits - 1) / splits * P::kKeys, low = blockIdx.y * share, high = low + share;
  const int64_t first = r.key_begin / P::kKeys * P::kKeys;
  return {first > low ? first : low, r.key_end < high ? r.key_end : high};
}

// ---- Functions ------------------------------------------------------------------------------------------------------
// e^2x for |x| <= kExponentialLimit. The multiple of ln(2) / 2 is taken off in two parts: the rounding of 2 x log2(e)
// alone would cost ten times as much as exp2_fast does.
ATTNFAST_DEVICE float exp_twice(float x) {
  const float n = rint(x * 0x1.715476p+1f);
  const float y = fma(x, 0x1.4ae0c0p-25f, fma(x, 0x1.715476p+1f, -n));
  const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return ptx::exp2_fast(y) * power;
}
ATTNFAST_DEVICE float tanh_near_zero(float x) {
  const float u = x * x;
  float p = fma(u, 0x1.2c869ep-9f, -0x1.116acap-7f);
  p = fma(p, u, 0x1.64a996p-6f);
  p = fma(p, u, -0x1.ba08c8p-5f);
  p = fma(p, u, 0x1.1110eap-3f);
  p = fma(p, u, -0x1.555556p-2f);
  return fma(x * u, p, x);
}
ATTNFAST_DEVICE double tanh_near_zero(double x) { return tanh(x); }

template <class R>
ATTNFAST_DEVICE int level_of(R x) {
  const R size = fabs(x);
  if (!(size <= R(kExponentialLimit))) return kDirect;
  if (x > R(kFastLimit)) return kClamped;
  return size > R(kNearLimit) ? kFast : kNear;
}

// ---- Operands -------------------------------------------------------------------------------------------------------
// Dimensions [d0, d0 + kChunk) of the rows and of the keys from `key` on, as they are or as e^2x; returns the way that
// the chunk takes. Every thread of the block calls it; what was there before is no longer read.
template <class P>
ATTNFAST_DEVICE int load_operands(const AdditiveCall& p, const Rows& r, int64_t key, int64_t d0,
                                  const AdditiveOperands<P>& to) {
  using R = typename P::Real;
  const int thread = static_cast<int>(threadIdx.x), column = thread % P::kChunk;
  const int64_t b = r.sequence.tensor_batch, d = d0 + column;
  const bool inside = d < p.head_size;
  int level = sizeof(R) == 8 ? kDirect : kNear;
  __syncthreads();
  const R shift = inside && p.score_bias
                      ? static_cast<const R*>(p.score_bias)[(p.score_bias_by_head ? r.head * p.head_size : 0) + d]
                      : R(0);
  const int64_t query_offset = offset4(p.query, b, r.head, r.sequence.query_begin + r.first, d);
#pragma unroll 4
  for (int row = thread / P::kChunk; row < P::kRows; row += P::kDimGroups) {
    R x = R(0);
    if (inside && r.first + row < r.sequence.queries) {
      x = load_element<R>(p.query.data, p.query.dtype, query_offset + row * p.query.stride[2]) + shift;
    }
    to.queries[row * P::kPitch + column] = x;
    const int its = level_of(x);
    level = its > level ? its : level;
  }
  const int64_t key_offset = offset4(p.key, b, r.kv_head, r.sequence.key_begin + key, d);
#pragma unroll 4
  for (int row = thread / P::kChunk; row < P::kKeys; row += P::kDimGroups) {
    R x = R(0);
    if (inside && key + row < r.sequence.keys) {
      x = load_element<R>(p.key.data, p.key.dtype, key_offset + row * p.key.stride[2]);
    }
    to.keys[row * P::kPitch + column] = x;
    const int its = level_of(x);
    level = its > level ? its : level;
  }
  if (thread < P::kChunk) {
    const R weight = inside ? static_cast<const R*>(p.weight)[(p.weight_by_head ? r.head * p.head_size : 0) + d] : R(0);
    to.weights[thread] = weight;
    if (!(fabs(weight) <= R(kLargestWeight))) level = kDirect;
  }
  if constexpr (sizeof(R) == 8) {
    __syncthreads();
    return kDirect;
  } else {
    level = __reduce_max_sync(0xFFFFFFFFu, level);
    if (thread % 32 == 0) to.level[thread / 32] = level;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kAdditiveThreads / 32; ++i) level = to.level[i] > level ? to.level[i] : level;
    if (level == kNear || level == kDirect) return level;
#pragma unroll 4
    for (int row = thread / P::kChunk; row < P::kRows + P::kKeys;
         row += P::kDimGroups) {  // the keys follow the queries
      R* x = to.queries + row * P::kPitch + column;
      *x = exp_twice(*x);
    }
    __syncthreads();
    return level;
  }
}

// ---- Scores ---------------------------------------------------------------------------------------------------------
// Where the calling thread's part of a tile lies: rows row + i * kRowGroups, keys column + j * kColumnGroups.
template <class P>
ATTNFAST_DEVICE int row_of_thread() {
  return static_cast<int>(threadIdx.x) / P::kColumnGroups;
}
template <class P>
ATTNFAST_DEVICE int column_of_thread() {
  return static_cast<int>(threadIdx.x) % P::kColumnGroups;
}

template <class P, bool NEAR>
ATTNFAST_DEVICE void add_tangents(const AdditiveOperands<P>& from, int size,
                                  typename P::Real (&score)[P::kRowsOfThread][P::kKeysOfThread]) {
  using R = typename P::Real;
  const int ty = row_of_thread<P>(), tx = column_of_thread<P>();
#pragma unroll 1
  for (int d = 0; d < size; ++d) {
    const R weight = from.weights[d];
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        const R x = from.queries[(ty + i * P::kRowGroups) * P::kPitch + d] +
                    from.keys[(tx + j * P::kColumnGroups) * P::kPitch + d];
        score[i][j] = fma(weight, NEAR ? tanh_near_zero(x) : tanh(x), score[i][j]);
      }
  }
}

template <class P, bool CLAMP>
ATTNFAST_DEVICE void add_quotients(const AdditiveOperands<P>& from, int size,
                                   float (&score)[P::kRowsOfThread][P::kKeysOfThread]) {
  const int ty = row_of_thread<P>(), tx = column_of_thread<P>();
#pragma unroll 1
  for (int d = 0; d < size; d += 4) {
    const Float4 w = *reinterpret_cast<const Float4*>(from.weights + d);
    const float half = 0.5f * ((w.x[0] + w.x[1]) + (w.x[2] + w.x[3]));
    Float4 k[P::kKeysOfThread];
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      k[j] = *reinterpret_cast<const Float4*>(from.keys + (tx + j * P::kColumnGroups) * P::kPitch + d);
    }
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const Float4 q = *reinterpret_cast<const Float4*>(from.queries + (ty + i * P::kRowGroups) * P::kPitch + d);
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[e] = fma(q.x[e], k[j].x[e], 1.0f);
          if (CLAMP) x[e] = fmin(x[e], kLargestX);
        }
        const float low = fma(x[0], w.x[1], x[1] * w.x[0]), high = fma(x[2], w.x[3], x[3] * w.x[2]);
        const float first = x[0] * x[1], second = x[2] * x[3];
        const float sum = fma(low, second, high * first);
        score[i][j] += fma(sum, ptx::reciprocal_fast(first * second), -half);
      }
    }
  }
}

// The raw scores of a tile. The last chunk of its operands stays in `operands`, and the way that it took is returned.
template <class P>
ATTNFAST_DEVICE int score_tile(const AdditiveCall& p, const Rows& r, int64_t key, const AdditiveOperands<P>& operands,
                               typename P::Real (&score)[P::kRowsOfThread][P::kKeysOfThread]) {
  using R = typename P::Real;
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) score[i][j] = R(0);
  int level;
  int64_t d0 = 0;
  do {  // a chunk without dimensions has scores of 0
    level = load_operands<P>(p, r, key, d0, operands);
    const int size = static_cast<int>(p.head_size - d0 < P::kChunk ? p.head_size - d0 : P::kChunk);
    // A fresh sum for each chunk: one chain of additions over all dimensions would cost digits.
    R part[P::kRowsOfThread][P::kKeysOfThread] = {};
    R factor = R(1);
    if constexpr (sizeof(R) == 4) {
      if (level == kFast) add_quotients<P, false>(operands, size, part);
      if (level == kClamped) add_quotients<P, true>(operands, size, part);
      if (level == kNear) add_tangents<P, true>(operands, size, part);
      if (level == kFast || level == kClamped) factor = R(-2);
    }
    if (level == kDirect) add_tangents<P, false>(operands, size, part);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) score[i][j] = fma(part[i][j], factor, score[i][j]);
    d0 += P::kChunk;
  } while (d0 < p.head_size);
  return level;
}

// The score, base 2, of row i of the thread's and a column of the tile, from the raw one. Rounded here, so that nothing
// that is done to it is contracted with what formed it: the largest of a row then has the weight exp2(0).
template <class R>
ATTNFAST_DEVICE R final_score(const AdditiveCall& p, const TileRow<R>& row, bool modified, int column, R raw) {
  return ptx::rounded(score_of(p, row, modified, column, raw));
}

// The softmax of a tile, before prior and dropout, -0 where the query may not see the key. seen(i, j, q, column, raw
// score, weight) is told each weight as it comes and may change it. Returns what score_tile does.
template <class P, class Seen>
ATTNFAST_DEVICE int probability_tile(const AdditiveCall& p, const Rows& r, int64_t key,
                                     const AdditiveOperands<P>& operands,
                                     typename P::Real (&weight)[P::kRowsOfThread][P::kKeysOfThread], Seen seen) {
  using R = typename P::Real;
  const int ty = row_of_thread<P>(), tx = column_of_thread<P>();
  const bool modified = is_modified(p);
  const int level = score_tile<P>(p, r, key, operands, weight);
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = r.first + ty + i * P::kRowGroups;
    const TileRow<R> row = tile_row_of<R>(p, r, modified, q, key, P::kKeys);
    const QueryValues<R> values = query_values<R>(p, r, q);
#pragma unroll
    for (int j = 0; j < P::kKeysOfThread; ++j) {
      const int column = tx + j * P::kColumnGroups;
      const R raw = weight[i][j], score = final_score(p, row, modified, column, raw);
      weight[i][j] = score == negative_infinity<R>() ? R(-0.0) : exp2_of(score - values.base - values.log);
      seen(i, j, q, column, raw, weight[i][j]);
    }
  }
  return level;
}

// ---- Sums of the gradient -------------------------------------------------------------------------------------------
// For this thread's dimension d of a chunk and each of its rows of `own` (thread / kChunk, and on in steps of
// kDimGroups): add(row, sum of g (1 - tanh^2)) over the rows of `other`, g being gradient[row * pitch + other]. Returns
// the sum of g tanh over all of them. Where g is 0 nothing is read of what may hold anything.
template <class P, int OWN, int OTHER, class Add>
ATTNFAST_DEVICE typename P::Real add_slopes(int level, const typename P::Real* own, const typename P::Real* other,
                                            const typename P::Real* gradient, int pitch, Add add) {
  using R = typename P::Real;
  constexpr int kOwn = OWN / P::kDimGroups;
  const int d = static_cast<int>(threadIdx.x) % P::kChunk, group = static_cast<int>(threadIdx.x) / P::kChunk;
  R tangents = R(0);
  if constexpr (sizeof(R) == 4) {
    if (level == kFast || level == kClamped) {
      // With r = 1 / x: tanh = 1 - 2 r and 1 - tanh^2 = 4 r (1 - r). Four of the others share a reciprocal.
      float sum[kOwn] = {};
#pragma unroll 1
      for (int o = 0; o < OTHER; o += 4) {
        float b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) b[e] = other[(o + e) * P::kPitch + d];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = group + i * P::kDimGroups;
          const float a = own[row * P::kPitch + d];
          const Float4 g = *reinterpret_cast<const Float4*>(gradient + row * pitch + o);
          float x[4], inverse[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = fmin(fma(a, b[e], 1.0f), kLargestX);
          const float first = x[0] * x[1], second = x[2] * x[3], all = ptx::reciprocal_fast(first * second);
          const float of_first = all * second, of_second = all * first;
          inverse[0] = of_first * x[1];
          inverse[1] = of_first * x[0];
          inverse[2] = of_second * x[3];
          inverse[3] = of_second * x[2];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[i] = fma(g.x[e], fma(-inverse[e], inverse[e], inverse[e]), sum[i]);
            tangents = fma(g.x[e], inverse[e] - 0.5f, tangents);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) add(group + i * P::kDimGroups, 4.0f * sum[i]);
      return -2.0f * tangents;
    }
  }
#pragma unroll 1
  for (int row = group; row < OWN; row += P::kDimGroups) {
    const R a = own[row * P::kPitch + d];
    R sum = R(0);
#pragma unroll 1
    for (int o = 0; o < OTHER; ++o) {
      const R g = gradient[row * pitch + o];
      if (g == R(0)) continue;
      const R x = a + other[o * P::kPitch + d], t = level == kNear ? tanh_near_zero(x) : tanh(x);
      sum = fma(g, fma(-t, t, R(1)), sum);
      tangents = fma(g, t, tangents);
    }
    add(row, sum);
  }
  return tangents;
}

}  // namespace attnfast::cuda
