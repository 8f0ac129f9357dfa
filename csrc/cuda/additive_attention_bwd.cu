// Backward of the additive core. Weights are formed again from the scores and the log-sum-exp, a tile of queries and
// keys at a time, in passes whose blocks each own what they add to, so that nothing is added atomically:
//   delta        a warp a row: rowsum(grad_out * out) + delta_shift;
//   bases        additive_attention_weights.cu: the log-sum-exp in two terms;
//   queries      additive_attention_bwd_query.cu: dQ, dw, d score_bias, the centres of the prior;
//   keys         additive_attention_bwd_key.cu: dK, dV;
//   bias         additive_attention_bwd_bias.cu;
//   sink         a block a head.
// With dS the gradient of a score, dq_d = w_d sum_k dS (1 - tanh^2), dk_d the same over queries, dw_d the sum of
// dS tanh: device/additive.cuh forms them from the exponentials of the scores. D may be anything: the sums of a tile go
// to the workspace, chunk by chunk, and only the thread that owns an element of it touches it.
#include "cuda/additive_attention.h"
#include "cuda/device/additive_gradients.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kSinkThreads = 256;

template <class R>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_delta_kernel(AdditiveCall p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t rows = plane_size(p);
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
    static_cast<R*>(p.delta)[kDeltaPlane * rows + row] =
        sum + (p.delta_shift ? static_cast<const R*>(p.delta_shift)[row] : R(0));
  }
}

// d sink[h] = -sum over rows of exp(sink - lse) * delta, the log-sum-exp in its two terms
template <class R>
__global__ void __launch_bounds__(kSinkThreads) additive_attention_bwd_sink_kernel(AdditiveCall p) {
  ATTNFAST_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int64_t head = blockIdx.x;
  const R sink = static_cast<const R*>(p.sink)[head] * static_cast<R>(kLog2e);
  const int64_t batches = p.cu_seqlens_q ? 1 : p.batch, plane = plane_size(p);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < batches * p.query_tokens; i += kSinkThreads) {
    const int64_t row = (i / p.query_tokens * p.heads + head) * p.query_tokens + i % p.query_tokens;
    const R* const values = static_cast<const R*>(p.delta) + row;
    const R base = values[kBasePlane * plane];
    if (base == negative_infinity<R>()) continue;
    sum -= static_cast<double>(exp2_of(sink - base - values[kLogPlane * plane])) *
           static_cast<double>(values[kDeltaPlane * plane]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kSinkThreads; ++i) sum += sums[i];
  static_cast<R*>(p.grad_sink)[head] = static_cast<R>(sum);
}

template <class R>
void launch_delta(const AdditiveCall& p, Stream stream) {
  const char* name = "additive_attention_delta";
  constexpr int64_t kRowsOfBlock = kAdditiveThreads / 32;
  const unsigned grid = checked_grid(p, (plane_size(p) + kRowsOfBlock - 1) / kRowsOfBlock, name);
  ATTNFAST_LAUNCH((additive_attention_delta_kernel<R>), grid, kAdditiveThreads, 0, stream, p);
  check_launched(name, p);
}

template <class R>
void launch_sink(const AdditiveCall& p, Stream stream) {
  const char* name = "additive_attention_bwd_sink";
  ATTNFAST_LAUNCH((additive_attention_bwd_sink_kernel<R>), checked_grid(p, p.heads, name), kSinkThreads,
                  kSinkThreads * sizeof(double), stream, p);
  check_launched(name, p);
}

}  // namespace

int64_t additive_attention_bwd_workspace(const AdditiveAttentionParams& p) {
  const int64_t splits = additive_attention_splits(p), rows = additive_attention_rows(p);
  return p.query.dtype == DType::kFloat64 ? layout_of<double>(p, splits, rows).end
                                          : layout_of<float>(p, splits, rows).end;
}

void additive_attention_bwd_launch(const AdditiveCall& p, void* stream) {
  const bool wide = p.query.dtype == DType::kFloat64;
  const auto queue = static_cast<Stream>(stream);
  if (plane_size(p) > 0 && p.batch > 0) {
    wide ? launch_delta<double>(p, queue) : launch_delta<float>(p, queue);
    additive_attention_bases(p, stream);
  }
  additive_attention_query_bwd(p, stream);
  if (p.grad_key.data || p.grad_value.data) additive_attention_key_bwd(p, stream);
  for (int i = 0; i < 2; ++i)
    if (p.grad_bias[i].data) additive_attention_bias_bwd(p, i, stream);
  if (p.grad_sink && p.heads > 0) wide ? launch_sink<double>(p, queue) : launch_sink<float>(p, queue);
}

}  // namespace attnfast::cuda
