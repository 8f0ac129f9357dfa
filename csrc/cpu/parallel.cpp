// Dynamic scheduling over a borrowed thread pool, and per-thread scratch buffers.
#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace attnfast {
namespace {

constexpr int kSlots = 5;
constexpr size_t kAlignment = 64;
constexpr size_t kKeepBytes = size_t{16} << 20;
// torch cuts the range into one piece per thread; this only has to exceed any sensible number of threads.
constexpr int64_t kMaxPieces = 1024;

std::atomic<ParallelFor> g_pool{nullptr};

// A forked child inherits the pool's bookkeeping but none of its threads: using it would wait for ever (OpenMP
// runtimes do). The child runs everything in its own thread instead, with the same results.
std::atomic<bool> g_forked{false};

struct Job {
  void (*task)(void* ctx, int64_t index);
  void* ctx;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::mutex lock;
  std::exception_ptr error;  // guarded by lock

  void work() noexcept {
    try {
      for (;;) {
        const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
        if (index >= tasks) return;
        task(ctx, index);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      std::lock_guard<std::mutex> guard(lock);
      if (!error) error = std::current_exception();
    }
  }
};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  void release() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
};

struct Buffers {
  Buffer slot[kSlots];
  ~Buffers() {
    for (Buffer& buffer : slot) buffer.release();
  }
};

thread_local Buffers t_buffers;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExactSize = true;  // so that the sanitizer sees an overrun of the size asked for
#else
constexpr bool kExactSize = false;
#endif

}  // namespace

void set_parallel_for(ParallelFor pool) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });
  if (registered != 0) throw std::runtime_error("pthread_atfork failed");
  g_pool.store(pool);
}

void parallel_tasks(int64_t tasks, bool serial, void (*task)(void* ctx, int64_t index), void* ctx) {
  const ParallelFor pool = g_pool.load(std::memory_order_relaxed);
  if (serial || tasks <= 1 || pool == nullptr || g_forked.load(std::memory_order_relaxed)) {
    for (int64_t index = 0; index < tasks; ++index) task(ctx, index);
    return;
  }
  Job job{task, ctx, tasks, {}, {}, {}};
  // An exception must not cross the pool, which is another library's C function: each thread catches its own.
  const int status = pool(
      0, tasks < kMaxPieces ? tasks : kMaxPieces, 1,
      [](int64_t, int64_t, void* context) { static_cast<Job*>(context)->work(); }, &job);
  if (job.error) std::rethrow_exception(job.error);
  if (status != 0) throw std::runtime_error("the thread pool reported error " + std::to_string(status));
}

void* scratch(int slot, size_t bytes) {
  Buffer& buffer = t_buffers.slot[slot];
  const bool too_small = buffer.bytes < bytes || buffer.data == nullptr;
  const bool too_large = buffer.bytes > kKeepBytes && bytes < buffer.bytes;
  if (!too_small && !too_large && !(kExactSize && buffer.bytes != bytes)) return buffer.data;
  buffer.release();
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
  buffer.data = data;
  buffer.bytes = bytes;
  return data;
}

}  // namespace attnfast
