// The pass by queries of the additive core's backward: a block owns a tile of queries, passes over the keys (or over
// its split of them), and leaves its parts of dQ, dw, d score_bias and the gradient of the prior's centres in the
// workspace; two further kernels add these in order.
#include "cuda/additive_attention.h"
#include "cuda/device/additive_gradients.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kReduceThreads = 256;

template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_query_kernel(AdditiveCall p) {
  using P = BackwardPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const int column = static_cast<int>(threadIdx.x) % P::kChunk, group = static_cast<int>(threadIdx.x) / P::kChunk;
  Rows& rows = tiles.rows;
  share_rows(rows, rows_of_block(p, P::kRows));
  const BackwardLayout at = layout_of<R>(p, p.splits, P::kRows);
  const int64_t split = blockIdx.y, all_rows = plane_size(p);
  const int64_t first = split * all_rows + row_index(p, rows.sequence, rows.head, rows.first);
  R* const to = static_cast<R*>(p.workspace) + at.query + first * p.head_size;
  R* const center = p.grad_center ? static_cast<R*>(p.workspace) + at.center + first : nullptr;
  R* const part = static_cast<R*>(p.workspace) + at.weight +
                  ((split * gridDim.x + blockIdx.x) * P::kDimGroups + group) * 2 * p.head_size;
  const int own_rows = static_cast<int>(rows.last - rows.first);
  for (int64_t d = column; d < p.head_size; d += P::kChunk) {
    for (int row = group; row < own_rows; row += P::kDimGroups) to[row * p.head_size + d] = R(0);
    part[d] = R(0);
  }

  // By the threads that add to it.
  for (int row = ty; center && tx == 0 && row < own_rows; row += P::kRowGroups) center[row] = R(0);

  const KeySpan span = keys_of_split<P>(rows, p.splits);
  for (int64_t key = span.begin; key < span.end; key += P::kKeys) {
    R gradient[P::kRowsOfThread][P::kKeysOfThread];
    const int level = gradient_tile<P, true>(p, key, tiles, gradient, center, [](int, int, R) {}, [](int64_t, bool) {});
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        tiles.tile[(ty + i * P::kRowGroups) * P::kKeyPitch + tx + j * P::kColumnGroups] = gradient[i][j];
      }
    __syncthreads();
    add_slopes_of_tile<P, true>(p, key, level, tiles, to, part);
  }

  for (int64_t d = column; d < p.head_size; d += P::kChunk) {
    R sum = R(0);
    for (int row = group; row < own_rows; row += P::kDimGroups) sum += to[row * p.head_size + d];
    part[p.head_size + d] = sum;
  }
}

// dQ of one row, and the gradient of its centre: the splits in order.
template <class R>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_bwd_finish_kernel(AdditiveCall p) {
  const int64_t rows = plane_size(p), row = blockIdx.x;
  const int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  // Where these parts lie does not depend on the tiles.
  const BackwardLayout at = layout_of<R>(p, p.splits, 1);
  if (p.grad_center && threadIdx.x == 0) {
    const R* from = static_cast<const R*>(p.workspace) + at.center + row;
    R sum = R(0);
    for (int64_t i = 0; i < p.splits; ++i) sum += from[i * rows];
    const R rate = fmin(R(1) / static_cast<R>(p.prior_sigma), largest_finite<R>());
    static_cast<R*>(p.grad_center)[row] = sum * rate;
  }
  if (!p.grad_query.data) return;
  const R* from = static_cast<const R*>(p.workspace) + at.query;
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
  const int64_t batches = p.cu_seqlens_q ? 1 : p.batch;
  const int64_t per_head =
      p.batch == 0 || p.heads == 0 ? 0 : gradient_blocks<false>(p, tile_rows) / batches / p.heads * kGroups;
  const int64_t heads = by_head ? 1 : p.heads, parts = p.splits * batches * heads * per_head;
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
void launch(const AdditiveCall& p, Stream stream) {
  using P = BackwardPlan<R, NARROW>;
  const bool dimensions = p.grad_query.data || p.grad_weight || p.grad_score_bias;
  const int64_t rows = p.batch == 0 ? 0 : plane_size(p);
  if (rows > 0 && (dimensions || p.grad_center)) {
    const char* name = "additive_attention_bwd_query";
    const dim3 grid(grid_of(p, P::kRows, name), static_cast<unsigned>(p.splits));
    ATTNFAST_LAUNCH((additive_attention_bwd_query_kernel<R, NARROW>), grid, kAdditiveThreads, P::kBytes, stream, p);
    check_launched(name, p);
  }
  if (rows > 0 && ((p.head_size > 0 && p.grad_query.data) || p.grad_center)) {
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
      ATTNFAST_LAUNCH((additive_attention_bwd_weight_kernel<R>), grid, kReduceThreads, kReduceThreads * sizeof(double),
                      stream, p, static_cast<int64_t>(P::kRows));
      check_launched(name, p);
    }
  }
}

}  // namespace

void additive_attention_query_bwd(const AdditiveCall& p, void* stream) {
  with_plan(p, [&](auto real, auto narrow) { launch<decltype(real), narrow.value>(p, static_cast<Stream>(stream)); });
}

}  // namespace attnfast::cuda
