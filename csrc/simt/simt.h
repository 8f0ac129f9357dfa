// SIMT emulator: runs CUDA kernels on the CPU, one fiber for each CUDA thread, and reports what a GPU would not.
//
// A kernel is ordinary C++ here. Its threads run one at a time and give way only at barriers and warp operations, in an
// order that a seed chooses; a wrong program shows under some order, as a wrong result, as a report of the emulator
// (class Failure) or as one of AddressSanitizer, UBSan or ThreadSanitizer, to which each fiber is a thread. What it
// proves and what not: docs/cuda.md. Tests only: nothing of this is in attnfast._C.
//
// This header is what a launch and a test see; device.h is what a kernel sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace attnfast::simt {

struct Dim3 {
  constexpr Dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
  unsigned x, y, z;
};

// Where in the kernel's source a lane stands.
struct Place {
  const char* file;
  int line;
};

// A kernel did what no correct kernel does: deadlock, divergence within a warp operation, a bad mask or address, ...
// The message names kernel, block, lanes and lines.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The order in which blocks and threads run. `seed % 4` is the kind of schedule and the rest its random numbers:
//   0  in order: every thread in turn, up to where it waits
//   1  reversed
//   2  shuffled anew in every round
//   3  greedy: one warp runs as long as it can, which lets it overtake the others by as much as barriers allow
// Blocks run in order with 0 and shuffled otherwise.
void set_seed(uint32_t seed);
uint32_t seed();

// What the launches of this process have done since reset_counters().
struct Counters {
  uint64_t launches = 0, blocks = 0, switches = 0, barriers = 0, mma = 0, ldmatrix = 0, async_copies = 0;
  uint64_t bank_conflicts = 0;  // of ldmatrix and load_shared_x4: further passes over shared memory
};
const Counters& counters();
void reset_counters();

// Runs `body` once for each thread of each block. Throws Failure; what the kernel owned is then lost, so it may own
// nothing. One launch at a time: a second caller waits.
void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Notes the block of a kernel that is about to be launched. Where the environment names a file in
// ATTNFAST_SIMT_LAUNCHES the notes are written to it when the process ends: tools/cuda_budget.py reads there which
// kernels have run and how much shared memory each asks for, which a compiler does not know.
void note_launch(const void* kernel, Dim3 block, size_t shared_bytes);

template <class Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace attnfast::simt
