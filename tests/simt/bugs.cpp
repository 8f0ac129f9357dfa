// Proof that the checkers check: small kernels, each compiled right and with one bug, and what must report the bug.
//
//   attnfast_simt_bugs list            every bug, its seeds and what must report it under each build
//   attnfast_simt_bugs sound           the kernels without their bugs, under every schedule: nothing may be reported
//   attnfast_simt_bugs NAME            the kernel with its bug
//
// Exit status: 0 nothing found, 1 the result is wrong, 2 the emulator reported, 3 both; the sanitizers end the process
// with statuses of their own (tools/simt_tests.py sets and expects them). What a bug needs to be found is in kBugs
// below.
#include <cmath>
#include <memory>

#include "check.h"
#include "simt/sanitizer.h"

namespace attnfast::simt {
namespace {

constexpr uint32_t kSeeds = 12;
constexpr int kN = 64;  // threads of most blocks

// Shared memory written by one thread is read by another.
template <bool BUG>
__global__ void missing_barrier(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  if (!BUG) __syncthreads();
  out[t] = shared[kN - 1 - t];
}

// The buffer is filled again while others may still read it.
template <bool BUG>
__global__ void missing_second_barrier(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    shared[t] = in[t] + i;
    __syncthreads();
    sum += shared[kN - 1 - t];
    if (!BUG) __syncthreads();
  }
  out[t] = sum;
}

// Lanes of a warp are not in step: without __syncwarp one may read before another writes.
template <bool BUG>
__global__ void missing_syncwarp(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  if (!BUG) __syncwarp();
  out[t] = shared[t ^ 31];
}

// A named barrier for fewer threads than take part lets some through early.
template <bool BUG>
__global__ void small_named_barrier(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  ptx::barrier_sync(1, BUG ? 32 : 64);
  out[t] = shared[kN - 1 - t];
}

// A barrier that half of the block does not reach, because the other half waits for something else.
template <bool BUG>
__global__ void barrier_in_branch(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (BUG ? t < 40 : true)
    __syncthreads();
  else
    ptx::barrier_sync(1, 64);
  out[t] = in[kN - 1 - t];
}

// Two tiles are on their way; the one that is used must have arrived.
template <bool BUG>
__global__ void wrong_wait_group(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  ptx::copy_async_4(shared + t, in + t, true);
  ptx::copy_async_commit();
  ptx::copy_async_4(shared + kN + t, in + kN - 1 - t, true);
  ptx::copy_async_commit();
  if (BUG)
    ptx::copy_async_wait<2>();
  else
    ptx::copy_async_wait<1>();
  out[t] = shared[t];
  ptx::copy_async_wait<0>();
}

// Waiting for one's own copies says nothing about those of others.
template <bool BUG>
__global__ void copy_without_barrier(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  ptx::copy_async_4(shared + t, in + t, true);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  if (!BUG) __syncthreads();
  out[t] = shared[kN - 1 - t];
}

template <bool BUG>
__global__ void copy_never_waited_for(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  ptx::copy_async_4(shared + t, in + t, true);
  ptx::copy_async_commit();
  if (!BUG) ptx::copy_async_wait<0>();
  out[t] = in[kN - 1 - t];
}

// Only in[0 .. kN - 1] exist.
template <bool BUG>
__global__ void missing_bounds_check(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  const volatile int* from = in;  // the load stays, whatever becomes of its value
  const int x = BUG || t < kN ? from[t] : 0;
  if (t < kN) out[kN - 1 - t] = x;
}

template <bool BUG>
__global__ void output_overrun(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  if (BUG || t < kN) out[kN - 1 - t + (t < kN ? 0 : 2 * t - kN + 1)] = t < kN ? in[t] : 0;
}

// One row of padding too many is written, read nowhere.
template <bool BUG>
__global__ void shared_overrun(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  shared[t + (BUG ? 2 * kN : kN)] = 0;
  __syncthreads();
  out[t] = shared[kN - 1 - t];
}

template <bool BUG>
__global__ void uninitialised_shared(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  float* sums = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  if (!BUG) sums[t] = 0;
  sums[t] += static_cast<float>(in[kN - 1 - t]);
  out[t] = std::isnan(sums[t]) ? -1 : static_cast<int>(sums[t]);
}

// The lanes outside of the branch are in the mask and never come.
template <bool BUG>
__global__ void wrong_lane_mask(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  int x = in[kN - 1 - t];
  if (t % 32 < 16) x += __shfl_xor_sync(BUG ? 0xFFFFFFFFu : 0xFFFFu, x, 1);
  out[t] = x;
}

// The caller is not in its own mask.
template <bool BUG>
__global__ void lane_not_in_mask(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  int x = in[kN - 1 - t];
  x += __shfl_xor_sync(BUG ? 0xFFFFu : 0xFFFFFFFFu, x, 1);
  out[t] = x;
}

// Four bytes past a 16-byte boundary; most CPUs forgive it, no GPU does.
struct alignas(16) Four {
  int x[4];
};
template <bool BUG>
__global__ void misaligned_access(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= kN / 4) return;
  const Four* from = reinterpret_cast<const Four*>(in + (BUG ? 1 : 0)) + (t < kN / 4 - 1 ? t : 0);
  const Four four = *from;
  for (int i = 0; i < 4; ++i) {
    const int at = t < kN / 4 - 1 ? 4 * t + i : kN - 4 + i;
    out[kN - 1 - at] = t < kN / 4 - 1 ? four.x[i] - (BUG ? 1 : 0) : in[at];
  }
}

template <bool BUG>
__global__ void misaligned_copy(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 8) ptx::copy_async_16(shared + 4 * t, in + 4 * t + (BUG ? 2 : 0), true);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  out[t] = in[kN - 1 - t];
}

// A row number times a stride beyond 2^31 elements.
template <bool BUG>
__global__ void offset_overflow(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x), stride = 100'000'000;
  const int64_t offset = BUG ? int64_t{t * stride} : int64_t{t} * stride;
  out[t] = offset / stride == t ? in[kN - 1 - t] : -1;
}

// Two blocks add to one element.
template <bool BUG>
__global__ void blocks_race(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (BUG)
    out[t] += static_cast<int>(blockIdx.x) * in[kN - 1 - t];
  else
    atomicAdd(&out[t], static_cast<int>(blockIdx.x) * in[kN - 1 - t]);
}

// A block waits for what another writes; blocks may run in any order, or at once.
template <bool BUG>
__global__ void blocks_depend(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x), b = static_cast<int>(blockIdx.x);
  if (b == 0) out[t] = in[kN - 1 - t];
  if (b == 1) out[kN + t] = BUG ? out[t] : in[kN - 1 - t];
}

// The product of two 16 x 16 matrices (as half of one), B given as [k][n]: without .trans its fragment is that of B^T.
// And C as it would lie if lanes counted down the columns.
template <bool WRONG_TRANSPOSE, bool WRONG_MAP>
__device__ void product(const int* in, int* out) {
  ATTNFAST_SHARED(raw);
  auto* a = reinterpret_cast<uint16_t*>(raw);
  uint16_t* b = a + 256;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    a[i] = static_cast<uint16_t>(ptx::pack_bf16(static_cast<float>((in[i % kN] + i) % 11), 0));
    b[i] = static_cast<uint16_t>(ptx::pack_bf16(static_cast<float>((in[i % kN] * 3 + i) % 7), 0));
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  float d[4] = {0, 0, 0, 0};
  ptx::ldmatrix_x4(fa, a + lane % 16 * 16 + lane / 16 * 8);
  if (WRONG_TRANSPOSE)
    ptx::ldmatrix_x4(fb, b + lane % 16 * 16 + lane / 16 * 8);
  else
    ptx::ldmatrix_x4_trans(fb, b + lane % 16 * 16 + lane / 16 * 8);
  ptx::mma_bf16(d, fa, fb);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    out[WRONG_MAP ? column * 16 + row : row * 8 + column] = static_cast<int>(d[i]);
  }
}
template <bool BUG>
__global__ void missing_transpose(const int* in, int* out) {
  product<BUG, false>(in, out);
}
template <bool BUG>
__global__ void wrong_fragment_map(const int* in, int* out) {
  product<false, BUG>(in, out);
}

// ---- What each must give ---------------------------------------------------------------------------------------

// An array on the heap of exactly its size, aligned as CUDA's allocations are.
class Array {
 public:
  explicit Array(int count) : count_(count), data_(static_cast<int*>(std::aligned_alloc(256, bytes()))) {
    for (int i = 0; i < count; ++i) data_.get()[i] = 0;
#if defined(ATTNFAST_SIMT_ASAN)
    __asan_poison_memory_region(data_.get() + count, bytes() - static_cast<size_t>(count) * sizeof(int));
#endif
  }
  ~Array() {
#if defined(ATTNFAST_SIMT_ASAN)
    __asan_unpoison_memory_region(data_.get(), bytes());
#endif
  }
  int* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(int* pointer) const { std::free(pointer); }
  };
  size_t bytes() const { return (static_cast<size_t>(count_) * sizeof(int) + 255) / 256 * 256 + 256; }
  int count_;
  std::unique_ptr<int, Free> data_;
};

int input(int i) { return 100 + i; }

int reversed(int i) { return input(kN - 1 - i % kN); }
int three_times(int i) { return 3 * reversed(i) + 3; }
int with_neighbour(int i) { return i % 32 < 16 ? reversed(i) + reversed(i ^ 1) : reversed(i); }
int with_every_neighbour(int i) { return reversed(i) + reversed(i ^ 1); }
int third_of_blocks(int i) { return 3 * reversed(i); }
int in_order(int i) { return input(i); }
int entry_of_product(int i) {
  int sum = 0;
  for (int k = 0; k < 16; ++k) {
    const int a = i / 8 * 16 + k, b = k * 16 + i % 8;
    sum += (input(a % kN) + a) % 11 * ((input(b % kN) * 3 + b) % 7);
  }
  return sum;
}

// Statuses of a run, to be combined; kAddress (with UBSan) and kThread are those of the sanitizers' builds.
enum Found { kWrong = 1, kReport = 2, kAddress = 4, kThread = 8 };

using Kernel = void (*)(const int*, int*);
struct Bug {
  const char* name;
  Kernel sound, buggy;
  unsigned blocks, threads, shared_words;
  int results;
  int (*wanted)(int);
  int found_by;  // all of these must find it; others may
};
#define ATTNFAST_BUG(name) #name, &name<false>, &name<true>
const Bug kBugs[] = {
    {ATTNFAST_BUG(missing_barrier), 1, kN, kN, kN, reversed, kWrong | kThread},
    {ATTNFAST_BUG(missing_second_barrier), 1, kN, kN, kN, three_times, kWrong | kThread},
    {ATTNFAST_BUG(missing_syncwarp), 1, 32, 32, 32, [](int i) { return input(i ^ 31); }, kWrong | kThread},
    {ATTNFAST_BUG(small_named_barrier), 1, kN, kN, kN, reversed, kWrong | kThread},
    {ATTNFAST_BUG(barrier_in_branch), 1, kN, 0, kN, reversed, kReport},
    {ATTNFAST_BUG(wrong_wait_group), 1, kN, 2 * kN, kN, in_order, kWrong},
    {ATTNFAST_BUG(copy_without_barrier), 1, kN, kN, kN, reversed, kWrong | kThread},
    {ATTNFAST_BUG(copy_never_waited_for), 1, kN, kN, kN, reversed, kReport},
    {ATTNFAST_BUG(missing_bounds_check), 2, kN, 0, kN, reversed, kAddress},
    {ATTNFAST_BUG(output_overrun), 2, kN, 0, kN, reversed, kAddress},
    {ATTNFAST_BUG(shared_overrun), 1, kN, 2 * kN, kN, reversed, kReport | kAddress},
    {ATTNFAST_BUG(uninitialised_shared), 1, kN, kN, kN, reversed, kWrong},
    {ATTNFAST_BUG(wrong_lane_mask), 1, kN, 0, kN, with_neighbour, kReport},
    {ATTNFAST_BUG(lane_not_in_mask), 1, kN, 0, kN, with_every_neighbour, kReport},
    {ATTNFAST_BUG(misaligned_access), 1, kN, 0, kN, reversed, kAddress},
    {ATTNFAST_BUG(misaligned_copy), 1, kN, kN, kN, reversed, kReport},
    {ATTNFAST_BUG(offset_overflow), 1, kN, 0, kN, reversed, kWrong | kAddress},
    {ATTNFAST_BUG(blocks_race), 3, kN, 0, kN, third_of_blocks, kThread},
    {ATTNFAST_BUG(blocks_depend), 2, kN, 0, 2 * kN, reversed, kWrong | kThread},
    {ATTNFAST_BUG(missing_transpose), 1, 32, 256, 128, entry_of_product, kWrong},
    {ATTNFAST_BUG(wrong_fragment_map), 1, 32, 256, 128, entry_of_product, kWrong},
};

int run(const Bug& bug, bool sound) {
  int found = 0;
  const Kernel kernel = sound ? bug.sound : bug.buggy;
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    set_seed(seed);
    Array in(kN), out(bug.results);
    for (int i = 0; i < kN; ++i) in.data()[i] = input(i);
    const std::string report = reported([&] {
      ATTNFAST_LAUNCH(kernel, Dim3{bug.blocks}, Dim3{bug.threads}, bug.shared_words * sizeof(int), nullptr, in.data(),
                      out.data());
    });
    if (!report.empty()) {
      if ((found & kReport) == 0) std::printf("%s: %s\n", bug.name, report.c_str());
      found |= kReport;
      continue;
    }
    for (int i = 0; i < bug.results; ++i) {
      if (out.data()[i] == bug.wanted(i)) continue;
      if ((found & kWrong) == 0) {
        std::printf("%s: seed %u, element %d is %d and not %d\n", bug.name, seed, i, out.data()[i], bug.wanted(i));
      }
      found |= kWrong;
      break;
    }
  }
  return found;
}

}  // namespace
}  // namespace attnfast::simt

int main(int count, char** arguments) {
  using namespace attnfast::simt;
  const std::string what = count == 2 ? arguments[1] : "";
  if (what == "list") {
    for (const Bug& bug : kBugs) std::printf("%s %d\n", bug.name, bug.found_by);
    return 0;
  }
  if (what == "sound") {
    int failures = 0;
    for (const Bug& bug : kBugs) failures += run(bug, true) != 0;
    return failures == 0 ? 0 : 1;
  }
  for (const Bug& bug : kBugs)
    if (what == bug.name) return run(bug, false);
  std::fprintf(stderr, "usage: attnfast_simt_bugs list | sound | NAME\n");
  return 64;
}
