// Forward of the dot core by fused multiply-adds: float64, float32, and 16-bit operands that the tensor-core kernel
// does not take (D not a multiple of 8, unusual strides or alignment), widened to float32. Any strides, D and D_v up to
// 256.
//
// A block has 8 x 16 threads. A half-warp owns rows ty, ty + 8, ... of the block's queries: scores at keys tx, tx + 16,
// ... and 16 bytes of every group of value columns, so that a row's maximum is a shuffle among 16 lanes. For each tile
// of keys: K to shared memory, scores in registers, online softmax, weights to shared memory, V over K, weights times
// V. Rows in shared memory are 16 bytes longer than a multiple of 128: eight neighbours then start in different banks.
#include "cuda/device/rows.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kRowGroups = 8, kColumnGroups = 16;

template <class R, int kHead>
struct Plan {
  using Vector = typename VectorOf<R>::Type;
  static constexpr int kWidth = Vector::kSize;
  static constexpr int kRows = sizeof(R) == 4 ? 32 : 16, kKeys = kRows;
  static constexpr int kRowsOfThread = kRows / kRowGroups, kKeysOfThread = kKeys / kColumnGroups;
  static constexpr int kGroups = kHead / (kColumnGroups * kWidth);  // of value columns
  static constexpr int kPitch = kHead + kWidth, kWeightPitch = kKeys + kWidth;
  static constexpr int kSharedElements = (kRows + kKeys) * kPitch + kRows * kWeightPitch;
};

// Rows [first, first + rows) of [T, size] to shared memory, zero where there is none. Returns whether this thread has
// met something that is not finite.
template <class R, int kHead>
ATTNFAST_DEVICE bool load_rows(R* to, const Tensor4& from, int64_t offset, int64_t first, int rows, int64_t end,
                               int64_t size) {
  bool finite = true;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kThreads / 32) {
    for (int d = static_cast<int>(threadIdx.x) % 32; d < kHead; d += 32) {
      R x = R(0);
      if (first + row < end && d < size) {
        x = load_element<R>(from.data, from.dtype, offset + (first + row) * from.stride[2] + d * from.stride[3]);
      }
      to[row * Plan<R, kHead>::kPitch + d] = x;
      finite = finite && x - x == R(0);
    }
  }
  return !finite;
}

template <class R, int kHead>
__global__ void __launch_bounds__(kThreads, 2) dot_attention_fma_kernel(DotAttentionParams p) {
  using P = Plan<R, kHead>;
  using Vector = typename P::Vector;
  ATTNFAST_SHARED(shared);
  R* queries = reinterpret_cast<R*>(shared);
  R* tile = queries + P::kRows * P::kPitch;  // keys, then values
  R* weights = tile + P::kKeys * P::kPitch;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  const Rows rows = rows_of_block(p, P::kRows);
  const int64_t b = rows.sequence.tensor_batch;
  const bool modified = is_modified(p);

  load_rows<R, kHead>(queries, p.query, offset4(p.query, b, rows.head, 0, 0), rows.first, P::kRows, rows.last,
                      p.head_size);
  R out[P::kRowsOfThread][P::kGroups][P::kWidth] = {};
  R maximum[P::kRowsOfThread], sum[P::kRowsOfThread];
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    maximum[i] = negative_infinity<R>();
    sum[i] = R(0);
  }

  for (int64_t key = rows.key_begin / P::kKeys * P::kKeys; key < rows.key_end; key += P::kKeys) {
    __syncthreads();  // values of the tile before are no longer read
    load_rows<R, kHead>(tile, p.key, offset4(p.key, b, rows.kv_head, 0, 0), key, P::kKeys, rows.sequence.keys,
                        p.head_size);
    __syncthreads();
    R score[P::kRowsOfThread][P::kKeysOfThread] = {};
#pragma unroll 2
    for (int d = 0; d < p.head_size; d += P::kWidth) {  // beyond D both factors are zero
      Vector k[P::kKeysOfThread];
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        k[j] = *reinterpret_cast<const Vector*>(tile + (tx + j * kColumnGroups) * P::kPitch + d);
      }
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        const Vector q = *reinterpret_cast<const Vector*>(queries + (ty + i * kRowGroups) * P::kPitch + d);
#pragma unroll
        for (int j = 0; j < P::kKeysOfThread; ++j)
#pragma unroll
          for (int e = 0; e < P::kWidth; ++e) score[i][j] += q.x[e] * k[j].x[e];
      }
    }

    const bool plain = !modified && sees_all(rows, key, P::kKeys);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t q = rows.first + ty + i * kRowGroups;
      const TileRow<R> row = tile_row_of<R>(p, rows, modified, q, key, P::kKeys);
      R largest = maximum[i];
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        score[i][j] = score_of(p, row, modified, tx + j * kColumnGroups, score[i][j]);
        largest = fmax(largest, score[i][j]);
      }
#pragma unroll
      for (int step = 1; step < kColumnGroups; step *= 2) {
        largest = fmax(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
      }
      const R shift = largest == negative_infinity<R>() ? R(0) : largest;
      const R shrink = exp2_of(maximum[i] - shift);
      maximum[i] = largest;
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        const bool hidden = score[i][j] == negative_infinity<R>();
        R weight = hidden ? R(-0.0) : exp2_of(score[i][j] - shift);
        sum[i] += weight;
        if (p.dropout_p > 0.0 && !hidden) weight = drop(p, rows, q, key + tx + j * kColumnGroups, weight);
        weights[(ty + i * kRowGroups) * P::kWeightPitch + tx + j * kColumnGroups] = weight;
      }
#pragma unroll
      for (int g = 0; g < P::kGroups; ++g)
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) out[i][g][e] *= shrink;
    }

    __syncthreads();  // keys are no longer read
    const bool strange = load_rows<R, kHead>(tile, p.value, offset4(p.value, b, rows.kv_head, 0, 0), key, P::kKeys,
                                             rows.sequence.keys, p.value_size);
    // A hidden value may hold anything, and zero times that is not zero: then each product is selected.
    const bool select = __syncthreads_or(strange && !plain);
#pragma unroll 1
    for (int k = 0; k < P::kKeys; k += P::kWidth) {
      Vector weight[P::kRowsOfThread];
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        weight[i] = *reinterpret_cast<const Vector*>(weights + (ty + i * kRowGroups) * P::kWeightPitch + k);
      }
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
#pragma unroll
        for (int g = 0; g < P::kGroups; ++g) {
          const Vector v =
              *reinterpret_cast<const Vector*>(tile + (k + e) * P::kPitch + (g * kColumnGroups + tx) * P::kWidth);
#pragma unroll
          for (int i = 0; i < P::kRowsOfThread; ++i) {
            if (select && is_hidden(weight[i].x[e])) continue;
#pragma unroll
            for (int c = 0; c < P::kWidth; ++c) out[i][g][c] += weight[i].x[e] * v.x[c];
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = rows.first + ty + i * kRowGroups;
#pragma unroll
    for (int step = 1; step < kColumnGroups; step *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], step);
    if (q >= rows.last) continue;
    const R scale = close_row_of(p, rows, q, maximum[i], sum[i], tx == 0);
    const int64_t base = offset4(p.out, b, rows.head, q, 0);
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
        const int c = (g * kColumnGroups + tx) * P::kWidth + e;
        // A row that sees nothing has scale 0 and, having met nothing, out 0.
        if (c < p.value_size) store_element(p.out.data, p.out.dtype, base + c * p.out.stride[3], out[i][g][e] * scale);
      }
    }
  }
}

template <class R, int kHead>
void launch(const DotAttentionParams& p, Stream stream) {
  using P = Plan<R, kHead>;
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_fma<float>" : "dot_attention_fma<double>";
  constexpr size_t kBytes = P::kSharedElements * sizeof(R);
  allow_shared(dot_attention_fma_kernel<R, kHead>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_fma_kernel<R, kHead>), grid_of(p, P::kRows, kName), kThreads, kBytes, stream, p);
  check_launched(kName, p);
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

void dot_attention_fma_fwd(const DotAttentionParams& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
