// A fiber: a stack of its own and a place to go on from. One runs each CUDA thread; the scheduler resumes them one
// after another on the calling OS thread, so a schedule is a deterministic sequence of switches.
//
// x86-64 switches in a dozen instructions; elsewhere, and with ATTNFAST_SIMT_UCONTEXT, ucontext does it.
// AddressSanitizer is told of every switch, and ThreadSanitizer sees each fiber as a thread that nothing but a barrier
// orders.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(ATTNFAST_SIMT_UCONTEXT)
#define ATTNFAST_SIMT_UCONTEXT 1
#endif
#if defined(ATTNFAST_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace attnfast::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins `entry` on an empty stack. A fiber that was left in the middle is abandoned: its stack is
  // dropped without unwinding, so what runs on a fiber may own nothing. To ThreadSanitizer it is a new thread.
  void start(void (*entry)(), const char* name);
  // From the scheduler: runs the fiber until it pauses or finishes.
  void resume();
  // From the scheduler: the fiber will not be resumed.
  void abandon();
  // From the fiber: back to the scheduler.
  void pause();
  // From the fiber, as its last act.
  [[noreturn]] void finish();
  // From the fiber, before anything else.
  void begun();

 private:
  void leave(bool last);

  char* stack_ = nullptr;
  void (*entry_)() = nullptr;
#if defined(ATTNFAST_SIMT_UCONTEXT)
  ucontext_t context_, scheduler_;
#else
  void* stack_pointer_ = nullptr;
  void* scheduler_pointer_ = nullptr;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's, of this fiber and of the scheduler
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  void* thread_ = nullptr;  // ThreadSanitizer's
  void* scheduler_thread_ = nullptr;
  int unobserved_ = 0;  // see sanitizer.h
};

}  // namespace attnfast::simt
