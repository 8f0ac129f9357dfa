// Threads and scratch memory for the kernels: torch's own pool behind one function.
// Plain functions and no standard header but the integer types: kernel files, compiled once per ISA, include this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnfast {

// Runs task(ctx, i) once for every i in [0, tasks). Threads take the next index when they are free, so which thread
// runs an index is not fixed and a task must not depend on it. serial = true runs all in the calling thread.
// The first exception of a task is rethrown here when every thread has ended; indices not yet begun are skipped.
void parallel_tasks(int64_t tasks, bool serial, void (*task)(void* ctx, int64_t index), void* ctx);

// Uninitialised memory of the calling thread, aligned to 64 bytes; one buffer per slot, kept until the thread ends
// or the next request for the same slot. A buffer beyond 16 MiB is returned at the next smaller request.
// Slots are 0 to 4. Throws std::bad_alloc.
void* scratch(int slot, size_t bytes);

// The pool: calls callback(first, last, ctx) on disjoint ranges covering [begin, end), on several threads, and returns
// when all ended; non-zero is an error. torch's exported `torch_parallel_for` is one. Null: everything runs inline.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*callback)(int64_t, int64_t, void*),
                            void* ctx);
void set_parallel_for(ParallelFor pool);

}  // namespace attnfast
