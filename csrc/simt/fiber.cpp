#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/sanitizer.h"

namespace attnfast::simt {

#if defined(ATTNFAST_SIMT_TSAN)
static int g_scheduler_unobserved = 0;
int* g_unobserved = &g_scheduler_unobserved;
#endif

namespace {

// Sanitizers enlarge frames. The memory is reserved, not used, until a kernel needs it; below it lies a page that
// stops what overruns it.
constexpr size_t kStackBytes = size_t{256} << 10;
const size_t kGuardBytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));

}  // namespace

#if !defined(ATTNFAST_SIMT_UCONTEXT)
// Saves the registers that a call must preserve on this stack, stores where, and takes them from the other stack.
extern "C" void attnfast_simt_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.type attnfast_simt_switch, @function
attnfast_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attnfast_simt_switch, .-attnfast_simt_switch
)");
#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + kGuardBytes;
}

Fiber::~Fiber() {
#if defined(ATTNFAST_SIMT_TSAN)
  if (thread_ != nullptr) __tsan_destroy_fiber(thread_);
#endif
#if defined(ATTNFAST_SIMT_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::start(void (*entry)(), [[maybe_unused]] const char* name) {
  entry_ = entry;
  fake_stack_ = nullptr;
#if defined(ATTNFAST_SIMT_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
#if defined(ATTNFAST_SIMT_TSAN)
  // Mapped anew, the stack is forgotten: its last owner and the next are not ordered, and both write to it.
  mmap(stack_, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (thread_ != nullptr) __tsan_destroy_fiber(thread_);
  thread_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(thread_, name);
  scheduler_thread_ = __tsan_get_current_fiber();
#endif
#if defined(ATTNFAST_SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // As if `entry` had been called: an unused return address under a 16-byte boundary, then what the switch pops.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  stack_pointer_ = top;
#endif
}

__attribute__((noinline)) void Fiber::resume() {
#if defined(ATTNFAST_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, kStackBytes);
#endif
#if defined(ATTNFAST_SIMT_TSAN)
  g_unobserved = &unobserved_;
  __tsan_switch_to_fiber(thread_, 1);  // 1: the switch itself orders nothing
#endif
#if defined(ATTNFAST_SIMT_UCONTEXT)
  swapcontext(&scheduler_, &context_);
#else
  attnfast_simt_switch(&scheduler_pointer_, stack_pointer_);
#endif
#if defined(ATTNFAST_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::begun() {
#if defined(ATTNFAST_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
}

__attribute__((noinline)) void Fiber::leave([[maybe_unused]] bool last) {
#if defined(ATTNFAST_SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, scheduler_bottom_, scheduler_size_);
#endif
#if defined(ATTNFAST_SIMT_TSAN)
  g_unobserved = &g_scheduler_unobserved;
  __tsan_switch_to_fiber(scheduler_thread_, 1);
#endif
#if defined(ATTNFAST_SIMT_UCONTEXT)
  swapcontext(&context_, &scheduler_);
#else
  attnfast_simt_switch(&stack_pointer_, scheduler_pointer_);
#endif
#if defined(ATTNFAST_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom_, &scheduler_size_);
#endif
}

void Fiber::abandon() {
#if defined(ATTNFAST_SIMT_TSAN)
  // What the fiber did comes before what the scheduler does from now on: to ThreadSanitizer, one switch with an edge.
  __tsan_switch_to_fiber(thread_, 1);
  g_unobserved = &unobserved_;
  while (unobserved_ > 0) end_unobserved();
  g_unobserved = &g_scheduler_unobserved;
  __tsan_switch_to_fiber(scheduler_thread_, 0);
#endif
}

void Fiber::pause() { leave(false); }

void Fiber::finish() {
  leave(true);
  std::abort();  // a finished fiber was resumed
}

}  // namespace attnfast::simt
