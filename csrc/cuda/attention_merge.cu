// The second half of a forward of either core whose keys were split: one block a row adds up what the ranges found, in
// their order.
#include "cuda/attention_merge.h"

#include "cuda/launch.h"
#include "cuda/parts.cuh"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128;

template <class R>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(AttentionParams p, Parts parts) {
  const int64_t row = blockIdx.x, slots = parts.splits * parts.rows;
  const R* partial = static_cast<const R*>(parts.partial);
  const R *maxima = partial + slots * p.value_size, *sums = maxima + slots;
  Rows r = {};
  const int64_t q = row % p.query_tokens;
  r.head = row / p.query_tokens % p.heads;
  r.sequence.tensor_batch = row / p.query_tokens / p.heads;

  R maximum = negative_infinity<R>(), sum = R(0);
  for (int64_t slot = row; slot < slots; slot += parts.rows) {
    if (sums[slot] != R(0)) maximum = fmax(maximum, maxima[slot]);
  }
  for (int64_t slot = row; slot < slots; slot += parts.rows) {
    if (sums[slot] != R(0)) sum += sums[slot] * exp2_of(maxima[slot] - maximum);
  }
  const R scale = close_row_of(p, r, q, maximum, sum, threadIdx.x == 0);
  const int64_t to = query_offset(r, p.out) + q * p.out.stride[2];
  for (int64_t c = threadIdx.x; c < p.value_size; c += kThreads) {
    R x = R(0);
    for (int64_t slot = row; slot < slots; slot += parts.rows) {
      if (sums[slot] != R(0)) x += partial[slot * p.value_size + c] * exp2_of(maxima[slot] - maximum);
    }
    store_element(p.out.data, p.out.dtype, to + c * p.out.stride[3], x * scale);
  }
}

template <class R>
void launch(const AttentionParams& p, const Parts& parts, Stream stream) {
  constexpr const char* kName = "attention_merge";
  ATTNFAST_LAUNCH((attention_merge_kernel<R>), checked_grid(p, parts.rows, kName), kThreads, 0, stream, p, parts);
  check_launched(kName, p);
}

}  // namespace

void attention_merge(const AttentionParams& p, const Parts& parts, void* stream) {
  if (p.query.dtype == DType::kFloat64)
    launch<double>(p, parts, static_cast<Stream>(stream));
  else
    launch<float>(p, parts, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
