// Forward of the additive core, by tiles of queries and keys with an online softmax in base 2: nothing of T_q x T_k is
// held, let alone of T_q x T_k x D. Any D, any D_v, any strides.
//
// A block has 128 threads. 16 of them next to each other (all 32 of a warp where there are few queries) own a row of
// the tile: scores at every 16th key and 16 bytes of every group of value columns, so that a row's maximum is a
// shuffle. For each tile of keys: scores in registers (device/additive.cuh), online softmax, weights to shared memory,
// V over the operands of the scores, weights times V. Columns of V beyond 256 are another block's (blockIdx.z), which
// forms the scores again. When there are few blocks the keys are split as well (blockIdx.y): a split leaves its sums in
// the workspace, and the kernel of attention_merge.cu adds them up in order.
#include "cuda/additive_attention.h"
#include "cuda/device/additive.cuh"
#include "cuda/launch.h"
#include "cuda/parts.cuh"

namespace attnfast::cuda {
namespace {

template <class R, bool NARROW, int VALUES>
struct ForwardPlan : AdditivePlan<R, NARROW> {
  using Base = AdditivePlan<R, NARROW>;
  static constexpr int kValues = VALUES, kValuePitch = VALUES + Base::kWidth;
  static constexpr int kGroups = VALUES / (Base::kColumnGroups * Base::kWidth);  // of value columns
  static constexpr int kValueElements = Base::kKeys * kValuePitch;
  static constexpr int kTileElements =
      kValueElements > Base::kOperandElements ? kValueElements : Base::kOperandElements;
  static constexpr int kSharedElements = Base::kRows * Base::kKeyPitch + kTileElements;  // and the rows behind them
};

// Columns [column, column + kValues) of the values of a tile, zero where there is none. Returns whether this thread has
// met something that is not finite.
template <class P>
ATTNFAST_DEVICE bool load_values(const AdditiveCall& p, const Rows& r, int64_t key, int64_t column,
                                 typename P::Real* to) {
  using R = typename P::Real;
  const int64_t offset = key_offset(r, p.value) + key * p.value.stride[2] + column * p.value.stride[3];
  bool finite = true;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < P::kKeys; row += kAdditiveThreads / 32) {
    for (int c = static_cast<int>(threadIdx.x) % 32; c < P::kValues; c += 32) {
      R x = R(0);
      if (key + row < r.sequence.keys && column + c < p.value_size) {
        x = load_element<R>(p.value.data, p.value.dtype, offset + row * p.value.stride[2] + c * p.value.stride[3]);
      }
      to[row * P::kValuePitch + c] = x;
      finite = finite && x - x == R(0);
    }
  }
  return !finite;
}

template <class R, bool NARROW, int VALUES>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_fwd_kernel(AdditiveCall p, Parts parts) {
  using P = ForwardPlan<R, NARROW, VALUES>;
  using Vector = typename P::Vector;
  ATTNFAST_SHARED(shared);
  R* weights = reinterpret_cast<R*>(shared);
  R* tile = weights + P::kRows * P::kKeyPitch;
  const AdditiveOperands<P> operands(tile);
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  Rows& rows = *reinterpret_cast<Rows*>(weights + P::kSharedElements);
  share_rows(rows, rows_of_block(p, P::kRows));
  if (rows.first >= rows.last) return;  // a tile that no sequence has
  const bool modified = is_modified(p), factored = has_factor(p);
  const int64_t first_column = static_cast<int64_t>(blockIdx.z) * P::kValues;

  R out[P::kRowsOfThread][P::kGroups][P::kWidth] = {};
  R maximum[P::kRowsOfThread], sum[P::kRowsOfThread];
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    maximum[i] = negative_infinity<R>();
    sum[i] = R(0);
  }
  const KeySpan span = keys_of_split<P>(rows, parts.splits);
  for (int64_t key = span.begin; key < span.end; key += P::kKeys) {
    R score[P::kRowsOfThread][P::kKeysOfThread];
    score_tile<P>(p, rows, key, operands, score);
    const bool plain = !modified && sees_all(rows, key, P::kKeys);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int row_of_tile = ty + i * P::kRowGroups;
      const int64_t q = rows.first + row_of_tile;
      const TileRow<R> row = tile_row_of<R>(p, rows, modified, q, key, P::kKeys);
      const RowPrior<R> prior = prior_row_of<R>(p, rows, q, key);
      R largest = maximum[i];
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        score[i][j] = final_score(p, row, modified, tx + j * P::kColumnGroups, score[i][j]);
        largest = fmax(largest, score[i][j]);
      }
#pragma unroll
      for (int step = 1; step < P::kColumnGroups; step *= 2) {
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
        const int column = tx + j * P::kColumnGroups;
        if (factored && !hidden) weight = apply_factor(p, rows, prior, q, key, column, weight);
        weights[row_of_tile * P::kKeyPitch + column] = weight;
      }
#pragma unroll
      for (int g = 0; g < P::kGroups; ++g)
#pragma unroll
        for (int e = 0; e < P::kWidth; ++e) out[i][g][e] *= shrink;
    }

    __syncthreads();  // the operands of the scores are no longer read
    const bool strange = load_values<P>(p, rows, key, first_column, tile);
    // A hidden value may hold anything, and zero times that is not zero: then each product is selected.
    const bool select = __syncthreads_or(strange && !plain);
#pragma unroll 1
    for (int k = 0; k < P::kKeys; k += P::kWidth) {
      Vector weight[P::kRowsOfThread];
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i) {
        weight[i] = *reinterpret_cast<const Vector*>(weights + (ty + i * P::kRowGroups) * P::kKeyPitch + k);
      }
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
#pragma unroll
        for (int g = 0; g < P::kGroups; ++g) {
          const Vector v = *reinterpret_cast<const Vector*>(tile + (k + e) * P::kValuePitch +
                                                            (g * P::kColumnGroups + tx) * P::kWidth);
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
    const int64_t q = rows.first + ty + i * P::kRowGroups;
#pragma unroll
    for (int step = 1; step < P::kColumnGroups; step *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], step);
    if (q >= rows.last) continue;
    // A row that sees nothing has scale 0 and, having met nothing, out 0.
    const Finish<R> to = finish_row(p, rows, parts, blockIdx.y, q, maximum[i], sum[i], tx == 0 && blockIdx.z == 0);
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < P::kWidth; ++e) {
        const int64_t c = first_column + (g * P::kColumnGroups + tx) * P::kWidth + e;
        if (c < p.value_size) store_element(to.data, to.dtype, to.offset + c * to.stride, out[i][g][e] * to.scale);
      }
    }
  }
}

template <class R, bool NARROW, int VALUES>
void launch(const AdditiveCall& p, Stream stream) {
  using P = ForwardPlan<R, NARROW, VALUES>;
  constexpr const char* kName = sizeof(R) == 4 ? "additive_attention_fwd<float>" : "additive_attention_fwd<double>";
  constexpr size_t kBytes = P::kSharedElements * sizeof(R) + sizeof(Rows);
  const int64_t slabs = p.value_size > P::kValues ? (p.value_size + P::kValues - 1) / P::kValues : 1;
  if (slabs > UINT16_MAX) throw std::runtime_error(call_text(kName, p) + ": D_v is too large");
  const dim3 grid(grid_of(p, P::kRows, kName), static_cast<unsigned>(p.splits), static_cast<unsigned>(slabs));
  allow_shared(additive_attention_fwd_kernel<R, NARROW, VALUES>, kBytes, kName, p);
  const Parts parts{1, p.splits, 0, plane_size(p), p.workspace};
  ATTNFAST_LAUNCH((additive_attention_fwd_kernel<R, NARROW, VALUES>), grid, kAdditiveThreads, kBytes, stream, p, parts);
  check_launched(kName, p);
  if (p.splits > 1) attention_merge(p, parts, stream);
}

template <class R>
void launch_by_size(const AdditiveCall& p, Stream stream) {
  if (additive_attention_is_narrow(p))
    launch<R, true, 256>(p, stream);
  else if (p.value_size <= 64)
    launch<R, false, 64>(p, stream);
  else
    launch<R, false, 256>(p, stream);
}

}  // namespace

void additive_attention_fwd_launch(const AdditiveCall& p, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
