// The state of the launch under way, for the emulator's own files.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "simt/fiber.h"
#include "simt/lane.h"
#include "simt/sanitizer.h"

namespace attnfast::simt {

constexpr int kWarpSize = 32;
constexpr int kNamedBarriers = 16;

enum class State : uint8_t { kReady, kInWarp, kAtBarrier, kReturned };

struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, valid;
};

// One CUDA thread.
struct Lane {
  Fiber fiber;
  Dim3 thread;
  int index = 0, warp = 0, lane = 0;
  State state = State::kReady;
  // What it waits for, if it does.
  const char* operation = "";
  Place place{"", 0};
  int barrier = 0;
  uint32_t mask = 0;
  void* slot = nullptr;  // operands and result of a warp operation, on the lane's own stack
  // cp.async: the open group, then those committed and not yet waited for, oldest first.
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> groups;
};

struct Barrier {
  int arrived = 0, expected = 0;
  unsigned generation = 0;
  Place waiting_at{"", 0};  // of those that wait; line 0: nobody
  // By parity of the generation: who runs ahead to the next one must not be mistaken for having been at this one.
  char key[2] = {0, 0};
  int sum[2] = {0, 0};
};

struct Warp {
  int waiting = 0;
  char key[2] = {0, 0};  // as a barrier's
  unsigned generation = 0;
};

struct Block {
  const char* kernel = "";
  Dim3 grid, size, index;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Lane>> lanes;  // the fibers are kept from block to block and launch to launch
  int threads = 0, returned = 0;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Lane* running = nullptr;
  std::mt19937 random;
  std::string failure;
  char end_key = 0, fence_key = 0;
  Counters counters;
};

extern Block g_block;

// The current lane waits in `state` until somebody makes it ready.
void wait_as(State state, const char* operation, Place place);

// Runs `work` on the lanes of a warp once all of `mask` have come to the same operation at the same place.
using WarpWork = void (*)(Lane* const* warp, uint32_t mask);
void warp_operation(uint32_t mask, const char* operation, Place place, void* slot, WarpWork work);

// Fails unless [address, address + bytes) lies in the block's shared memory and is aligned to `alignment`.
void check_shared(const void* address, size_t bytes, size_t alignment, const char* operation, Place place);

std::string describe(const Lane& lane);

}  // namespace attnfast::simt
