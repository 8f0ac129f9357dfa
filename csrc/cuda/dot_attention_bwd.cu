// The gradients of the dot core: which kernels take a call, and the two that go over rows only: what each query brings
// to its scores' gradients, and the gradient of the sink.
#include "cuda/device/gradients.cuh"
#include "cuda/dot_attention.h"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kRowsPerBlock = kThreads / 32;

// The maximum of a row's scores and the sum of their powers, base 2, found again.
template <class R>
ATTNFAST_DEVICE SoftmaxState<R> row_state(const DotAttentionParams& p, const Rows& rows, int64_t q) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool modified = is_modified(p);
  const int64_t query = query_offset(rows, p.query) + q * p.query.stride[2], keys = key_offset(rows, p.key);
  SoftmaxState<R> state{negative_infinity<R>(), R(0)};
  for (int64_t key = rows.key_begin + lane; key < rows.key_end; key += 32) {
    const int64_t at = keys + key * p.key.stride[2];
    R product = R(0);
    for (int64_t d = 0; d < p.head_size; ++d) {
      product += load_element<R>(p.query.data, p.query.dtype, query + d * p.query.stride[3]) *
                 load_element<R>(p.key.data, p.key.dtype, at + d * p.key.stride[3]);
    }
    const TileRow<R> row = tile_row_of<R>(p, rows, modified, q, key, 1);
    const R score = ptx::rounded(score_of(p, row, modified, 0, product));
    if (score > state.maximum) {
      state.sum = state.sum * exp2_of(state.maximum - score) + R(1);
      state.maximum = score;
    } else if (score != negative_infinity<R>()) {
      state.sum += exp2_of(score - state.maximum);
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const SoftmaxState<R> other{__shfl_xor_sync(0xFFFFFFFFu, state.maximum, step),
                                __shfl_xor_sync(0xFFFFFFFFu, state.sum, step)};
    const R largest = fmax(state.maximum, other.maximum);
    if (largest == negative_infinity<R>()) continue;
    // Both of a pair of lanes find the same bits: sums do not depend on the order of two.
    state = {largest, state.sum * exp2_of(state.maximum - largest) + other.sum * exp2_of(other.maximum - largest)};
  }
  return state;
}

// A warp a query: the three planes of the workspace (gradients.cuh).
template <class R>
__global__ void __launch_bounds__(kThreads, 4) dot_attention_bwd_rows_kernel(DotAttentionParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + static_cast<int>(threadIdx.x) / 32;
  const int64_t plane = plane_size(p);
  if (row >= plane) return;
  const int64_t q = row % p.query_tokens, h = row / p.query_tokens % p.heads, b = row / p.query_tokens / p.heads;
  const int64_t grad_at = offset4(p.grad_out, b, h, q, 0), out_at = offset4(p.out, b, h, q, 0);
  R sum = R(0);
  bool zero = true;
  for (int64_t d = lane; d < p.value_size; d += 32) {
    const R out = load_element<R>(p.out.data, p.out.dtype, out_at + d * p.out.stride[3]);
    sum += load_element<R>(p.grad_out.data, p.grad_out.dtype, grad_at + d * p.grad_out.stride[3]) * out;
    zero = zero && out == R(0);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  // A masked row has output 0; a NaN gradient that arrives there must not come back.
  if (__all_sync(0xFFFFFFFFu, zero)) sum = R(0);
  if (p.delta_shift) sum += static_cast<const R*>(p.delta_shift)[row];

  R base = static_cast<const R*>(p.lse)[row], log = R(0);
  if (fabs(base) > static_cast<R>(kHugeLse) && base - base == R(0)) {
    const int64_t sequence = p.cu_seqlens_q ? packed_sequence(p.cu_seqlens_q, p.batch, q) : b;
    Rows rows = rows_of_head(p, sequence, h, 1);
    const int64_t own = q - rows.sequence.query_begin;
    if (has_index(own, rows.sequence.queries)) set_rows(rows, own, own + 1);
    const SoftmaxState<R> state = row_state<R>(p, rows, own);
    if (state.sum != R(0)) {
      const R sink = p.sink ? exp2_of(static_cast<const R*>(p.sink)[h] * static_cast<R>(kLog2e) - state.maximum) : R(0);
      base = state.maximum;
      log = log2_real(state.sum + sink);
    }
  }
  if (lane != 0) return;
  R* values = static_cast<R*>(p.delta) + row;
  values[kDeltaPlane * plane] = sum;
  values[kBasePlane * plane] = base;
  values[kLogPlane * plane] = log;
}

// A block a head: d sink = -sum over rows of exp(sink - lse) * delta, each thread its rows, then a tree.
template <class R>
__global__ void __launch_bounds__(kThreads) dot_attention_bwd_sink_kernel(DotAttentionParams p) {
  ATTNFAST_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t h = blockIdx.x;
  const R sink = static_cast<const R*>(p.sink)[h] * static_cast<R>(kLog2e);
  double sum = 0;
  const int64_t rows = plane_size(p) / p.heads;
  for (int64_t i = thread; i < rows; i += kThreads) {
    const int64_t row = (i / p.query_tokens * p.heads + h) * p.query_tokens + i % p.query_tokens;
    const R lse = static_cast<const R*>(p.lse)[row];
    if (lse == negative_infinity<R>()) continue;
    sum -= static_cast<double>(exp2_of(sink - lse)) * static_cast<double>(static_cast<const R*>(p.delta)[row]);
  }
  sums[thread] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step) sums[thread] += sums[thread + step];
  }
  if (thread == 0) static_cast<R*>(p.grad_sink)[h] = static_cast<R>(sums[0]);
}

template <class R>
void rows_and_sink(const DotAttentionParams& p, Stream stream) {
  constexpr const char* kRowsName = "dot_attention_bwd_rows";
  constexpr const char* kSinkName = "dot_attention_bwd_sink";
  if (plane_size(p) > 0) {
    const unsigned blocks = checked_grid(p, (plane_size(p) + kRowsPerBlock - 1) / kRowsPerBlock, kRowsName);
    ATTNFAST_LAUNCH((dot_attention_bwd_rows_kernel<R>), blocks, kThreads, 0, stream, p);
    check_launched(kRowsName, p);
  }
  if (!p.grad_sink || p.heads == 0) return;
  ATTNFAST_LAUNCH((dot_attention_bwd_sink_kernel<R>), checked_grid(p, p.heads, kSinkName), kThreads,
                  kThreads * sizeof(double), stream, p);
  check_launched(kSinkName, p);
}

}  // namespace

const char* dot_attention_bwd_kernel_name(const DotAttentionParams& params) {
  const bool takes = dot_attention_mma_bwd_takes(with_rounded_operands(params));
  return takes ? "dot_attention_bwd_mma" : "dot_attention_bwd_fma";
}

void dot_attention_bwd(const DotAttentionParams& given, void* stream) {
  const DotAttentionParams p = with_rounded_operands(given);
  if (p.query.dtype == DType::kFloat64)
    rows_and_sink<double>(p, static_cast<Stream>(stream));
  else
    rows_and_sink<float>(p, static_cast<Stream>(stream));
  if (dot_attention_mma_bwd_takes(p))
    dot_attention_mma_bwd(p, stream);
  else
    dot_attention_fma_bwd(p, stream);
  for (int i = 0; i < 2; ++i)
    if (p.grad_bias[i].data) dot_attention_bias_bwd(p, i, stream);
}

}  // namespace attnfast::cuda
