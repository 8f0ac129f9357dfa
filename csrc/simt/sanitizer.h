// Which sanitizer the kernels beside the emulator are compiled with, and the entry points of its runtime.
//
// The emulator's own files are compiled without ThreadSanitizer's instrumentation (CMakeLists.txt says so with
// ATTNFAST_SIMT_TSAN): what the scheduler reads and writes on behalf of every CUDA thread must not look like a race.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define ATTNFAST_SIMT_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

#if defined(ATTNFAST_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace attnfast::simt {

// The two halves of a happens-before edge, at a barrier or a launch.
inline void acquire([[maybe_unused]] void* key) {
#if defined(ATTNFAST_SIMT_TSAN)
  __tsan_acquire(key);
#endif
}
inline void release([[maybe_unused]] void* key) {
#if defined(ATTNFAST_SIMT_TSAN)
  __tsan_release(key);
#endif
}

// What one CUDA thread does to memory through an instruction that the emulator carries out.
inline void record_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t size) {
#if defined(ATTNFAST_SIMT_TSAN)
  if (size > 0) __tsan_read_range(const_cast<void*>(address), size);
#endif
}
inline void record_write([[maybe_unused]] void* address, [[maybe_unused]] size_t size) {
#if defined(ATTNFAST_SIMT_TSAN)
  if (size > 0) __tsan_write_range(address, size);
#endif
}

#if defined(ATTNFAST_SIMT_TSAN)
// How many Unobserved the running fiber, or the scheduler, is in. Those of an abandoned fiber are ended for it.
extern int* g_unobserved;
inline void begin_unobserved() {
  ++*g_unobserved;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void end_unobserved() {
  --*g_unobserved;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
inline void begin_unobserved() {}
inline void end_unobserved() {}
#endif

// The emulator at work. malloc, memcpy and templates shared with instrumented files are seen by ThreadSanitizer even
// when called from a file without instrumentation.
class Unobserved {
 public:
  Unobserved() { begin_unobserved(); }
  ~Unobserved() { end_unobserved(); }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace attnfast::simt
