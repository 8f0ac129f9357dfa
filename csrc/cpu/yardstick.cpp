// The two limits of every kernel, measured by the means a kernel has: multiply-adds that depend on nothing but
// registers, and one pass over memory.
#include "yardstick.h"

#include "parallel.h"
#include "simd.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kChains = 12;  // latency times ports is 8 or 10 on current machines; 12 and two operands fit 16 registers
constexpr int64_t kTasks = 64;  // more than threads: one that is interrupted takes fewer
constexpr int64_t kChunk = int64_t{1} << 16;

struct FmaJob {
  int64_t steps;
  float results[kTasks];
};

void fma_task(void* context, int64_t task) {
  FmaJob& job = *static_cast<FmaJob*>(context);
  // Read from memory, so that the compiler cannot see that the chains converge.
  volatile float factor = 0.999f, term = 0.001f;
  const VecF a = splat(float(factor)), b = splat(float(term));
  VecF chain[kChains];
  ATTNFAST_UNROLL for (int i = 0; i < kChains; i++) chain[i] = splat(float(i));
  for (int64_t step = 0; step < job.steps; step++) {
    ATTNFAST_UNROLL for (int i = 0; i < kChains; i++) chain[i] = chain[i] * a + b;
  }
  VecF sum{};
  ATTNFAST_UNROLL for (int i = 0; i < kChains; i++) sum += chain[i];
  job.results[task] = sum_lanes<float>(sum);
}

struct ReadJob {
  const uint8_t* data;
  int64_t bytes;
  uint64_t* sums;  // one per chunk
};

void read_task(void* context, int64_t chunk) {
  const ReadJob& job = *static_cast<const ReadJob*>(context);
  constexpr int kStreams = 4, kStep = kStreams * kVectorBytes;
  const uint8_t* p = job.data + chunk * kChunk;
  const int64_t count = job.bytes - chunk * kChunk < kChunk ? job.bytes - chunk * kChunk : kChunk;
  Vec<uint64_t> sum[kStreams] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    ATTNFAST_UNROLL for (int j = 0; j < kStreams; j++) sum[j] +=
        load(reinterpret_cast<const uint64_t*>(p + i + j * kVectorBytes));
  }
  uint64_t total = 0;
  for (; i < count; i++) total += p[i];
  for (int j = 1; j < kStreams; j++) sum[0] += sum[j];
  for (int j = 0; j < kLanes<uint64_t>; j++) total += sum[0][j];
  job.sums[chunk] = total;
}

}  // namespace

double yardstick_fma(int64_t steps) {
  FmaJob job{(steps + kTasks - 1) / kTasks, {}};
  parallel_tasks(kTasks, false, fma_task, &job);
  volatile float keep = 0;
  for (float result : job.results) keep = keep + result;
  return double(kTasks) * double(job.steps) * 2.0 * kChains * kLanes<float>;
}

uint64_t yardstick_read(const void* data, int64_t bytes) {
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  ReadJob job{static_cast<const uint8_t*>(data), bytes,
              static_cast<uint64_t*>(scratch(2, size_t(chunks) * sizeof(uint64_t)))};
  parallel_tasks(chunks, false, read_task, &job);
  uint64_t total = 0;
  for (int64_t i = 0; i < chunks; i++) total += job.sums[i];
  return total;
}

}  // namespace attnfast::ATTNFAST_ISA
