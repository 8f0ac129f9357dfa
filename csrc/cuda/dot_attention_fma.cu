// Forward of the dot core by fused multiply-adds: float64, float32, 16-bit operands that the tensor-core kernel does
// not take (D not a multiple of 8, unusual strides or alignment), widened to float32, and head sizes above 256. Any
// strides.
//
// Threads and tiles are those of device/fma_tiles.cuh. For each tile of keys: K to shared memory, scores in registers,
// online softmax, weights to shared memory, V over K, weights times V. Of larger heads a tile's scores are formed 256
// features at a time, and a block has 256 value columns: the blocks of the others form the same scores again.
#include "cuda/device/fma_tiles.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"
#include "cuda/parts.cuh"

namespace attnfast::cuda {
namespace {

template <class P>
constexpr int kSharedElements = (P::kRows + P::kColumns) * P::kPitch + P::kRows * P::kWeightPitch;

// Blocks that share the rows of a large head, 256 value columns each.
ATTNFAST_HD int64_t value_chunks(const DotAttentionParams& p) {
  return p.value_size > 256 ? (p.value_size + 255) / 256 : 1;
}

template <class R, int kHead, bool kLarge>
__global__ void __launch_bounds__(kFmaThreads, 2) dot_attention_fma_kernel(DotAttentionParams p, Parts parts) {
  using P = FmaForwardPlan<R, kHead>;
  ATTNFAST_SHARED(shared);
  R* queries = reinterpret_cast<R*>(shared);
  R* tile = queries + P::kRows * P::kPitch;  // keys, then values
  R* weights = tile + P::kColumns * P::kPitch;
  const int tx = static_cast<int>(threadIdx.x) % kColumnGroups, ty = static_cast<int>(threadIdx.x) / kColumnGroups;
  int64_t block = blockIdx.x, value_begin = 0;
  if constexpr (kLarge) {
    const int64_t chunks = value_chunks(p);
    value_begin = block % chunks * kHead;
    block /= chunks;
  }
  // In shared memory, because registers are short in the loop.
  Rows& rows = *reinterpret_cast<Rows*>(weights + P::kRows * P::kWeightPitch);
  const Rows found = rows_of_part(p, P::kRows, parts, block);
  if (threadIdx.x == 0) rows = found;
  __syncthreads();
  const bool modified = is_modified(p), factored = has_factor(p);

  const FmaRows query_rows = {p.query, query_offset(rows, p.query), rows.last, p.head_size};
  const FmaRows key_rows = {p.key, key_offset(rows, p.key), rows.sequence.keys, p.head_size};
  const FmaRows value_rows = {p.value, key_offset(rows, p.value), rows.sequence.keys, p.value_size};
  if constexpr (!kLarge) load_rows<P>(queries, query_rows, rows.first, P::kRows);
  FmaSum<P> out;
  out.clear();
  R maximum[P::kRowsOfThread], sum[P::kRowsOfThread];
#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    maximum[i] = negative_infinity<R>();
    sum[i] = R(0);
  }

  for (int64_t key = rows.key_begin / P::kColumns * P::kColumns; key < rows.key_end; key += P::kColumns) {
    typename P::Products score = {};
    if constexpr (kLarge) {
      add_products_of<P>(query_rows, rows.first, key_rows, key, queries, tile, score);
    } else {
      __syncthreads();  // values of the tile before are no longer read
      load_rows<P>(tile, key_rows, key, P::kColumns);
      __syncthreads();
      add_products<P>(queries, tile, static_cast<int>(p.head_size), score);
    }

    const bool plain = !modified && sees_all(rows, key, P::kColumns);
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i) {
      const int64_t q = rows.first + ty + i * kRowGroups;
      const TileRow<R> row = tile_row_of<R>(p, rows, modified, q, key, P::kColumns);
      const RowPrior<R> prior = prior_row_of<R>(p, rows, q, key);
      R largest = maximum[i];
#pragma unroll
      for (int j = 0; j < P::kColumnsOfThread; ++j) {
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
      for (int j = 0; j < P::kColumnsOfThread; ++j) {
        const bool hidden = score[i][j] == negative_infinity<R>();
        R weight = hidden ? R(-0.0) : exp2_of(score[i][j] - shift);
        sum[i] += weight;
        if (factored && !hidden) weight = apply_factor(p, rows, prior, q, key, tx + j * kColumnGroups, weight);
        weights[(ty + i * kRowGroups) * P::kWeightPitch + tx + j * kColumnGroups] = weight;
      }
      out.multiply_row(i, shrink);
    }

    __syncthreads();  // keys are no longer read
    const bool strange = load_rows<P>(tile, value_rows, key, P::kColumns, value_begin);
    // A hidden value may hold anything, and zero times that is not zero: then each product is selected.
    const bool select = __syncthreads_or(strange && !plain);
    out.add(weights, tile, select);
  }

#pragma unroll
  for (int i = 0; i < P::kRowsOfThread; ++i) {
    const int64_t q = rows.first + ty + i * kRowGroups;
#pragma unroll
    for (int step = 1; step < kColumnGroups; step *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], step);
    if (q >= rows.last) continue;
    const bool writes = tx == 0 && value_begin == 0;
    // A row that sees nothing has scale 0 and, having met nothing, out 0.
    const Finish<R> to = finish_row(p, rows, parts, block, q, maximum[i], sum[i], writes);
    out.store_row(i, to.data, to.dtype, to.offset, to.stride, value_begin, p.value_size, to.scale);
  }
}

template <class R, int kHead, bool kLarge = false>
void launch(const DotAttentionParams& p, const Parts& parts, Stream stream) {
  constexpr const char* kName = sizeof(R) == 4 ? "dot_attention_fma<float>" : "dot_attention_fma<double>";
  using P = FmaForwardPlan<R, kHead>;
  constexpr size_t kBytes = kSharedElements<P> * sizeof(R) + sizeof(Rows);
  const int64_t copies = parts.splits * (kLarge ? value_chunks(p) : 1);
  allow_shared(dot_attention_fma_kernel<R, kHead, kLarge>, kBytes, kName, p);
  ATTNFAST_LAUNCH((dot_attention_fma_kernel<R, kHead, kLarge>), grid_of(p, P::kRows, kName, copies), kFmaThreads,
                  kBytes, stream, p, parts);
  check_launched(kName, p);
}

template <class R>
void launch_by_size(const DotAttentionParams& p, const Parts& parts, Stream stream) {
  const int64_t size = p.head_size > p.value_size ? p.head_size : p.value_size;
  if (size <= 64)
    launch<R, 64>(p, parts, stream);
  else if (size <= 128)
    launch<R, 128>(p, parts, stream);
  else if (size <= 256)
    launch<R, 256>(p, parts, stream);
  else
    launch<R, 256, true>(p, parts, stream);
}

}  // namespace

void dot_attention_fma_fwd(const DotAttentionParams& p, const Parts& parts, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch_by_size<double>(p, parts, static_cast<Stream>(stream));
  else
    launch_by_size<float>(p, parts, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
