// Launches, schedules, barriers, and what is said when a kernel goes wrong.
#include "simt/block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <tuple>

namespace attnfast::simt {

Block g_block;

namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kTailBytes = 1024;  // behind shared memory; nobody may touch it
constexpr unsigned char kTailByte = 0xA5;

uint32_t g_seed = 0;

std::string text(Dim3 x) {
  return "(" + std::to_string(x.x) + "," + std::to_string(x.y) + "," + std::to_string(x.z) + ")";
}

std::string text(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

// Lanes of one warp that stand at the same place share a line.
std::string everybody() {
  std::string report;
  for (int first = 0; first < g_block.threads;) {
    const Lane& lane = *g_block.lanes[first];
    int last = first;
    while (last + 1 < g_block.threads) {
      const Lane& next = *g_block.lanes[last + 1];
      if (next.warp != lane.warp || next.state != lane.state || next.operation != lane.operation ||
          next.place.line != lane.place.line || next.mask != lane.mask) {
        break;
      }
      ++last;
    }
    const std::string lanes = "lanes " + std::to_string(lane.lane) + "-" + std::to_string(lane.lane + last - first);
    report += "\n  warp " + std::to_string(lane.warp) + " " + lanes + ": ";
    report += lane.state == State::kReturned ? "returned"
              : lane.state == State::kReady  ? "running"
                                             : "waiting in " + std::string(lane.operation) + " at " + text(lane.place);
    first = last + 1;
  }
  return report;
}

// All have come: they may go on, and the next generation begins.
void complete(int id) {
  Barrier& barrier = g_block.barriers[id];
  barrier.arrived = 0;
  barrier.waiting_at = {"", 0};
  ++barrier.generation;
  barrier.sum[barrier.generation & 1] = 0;
  for (int i = 0; i < g_block.threads; ++i) {
    Lane& lane = *g_block.lanes[i];
    if (lane.state == State::kAtBarrier && lane.barrier == id) lane.state = State::kReady;
  }
}

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Counts the running lane at a barrier, whether it will wait or not.
void arrive(int id, int threads, const char* operation, Place place) {
  Lane& me = *g_block.running;
  const auto refuse = [&](const std::string& what) {
    fail(describe(me) + " in " + operation + " at " + text(place) + ": " + what);
  };
  Barrier& barrier = g_block.barriers[id];
  if (threads != kAllThreads && (threads < 0 || threads % kWarpSize != 0 || threads > g_block.threads)) {
    refuse("a barrier of " + std::to_string(threads) + " threads, in a block of " + std::to_string(g_block.threads));
  }
  if (barrier.arrived > 0 && barrier.expected != threads) {
    refuse("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, others said " +
           std::to_string(barrier.expected));
  }
  barrier.expected = threads;
  const int wanted = threads == kAllThreads ? g_block.threads - g_block.returned : threads;
  if (++barrier.arrived == wanted) complete(id);
}

// A fiber's whole life.
void run_lane() {
  Lane& me = *g_block.running;
  me.fiber.begun();
  (*g_block.body)();
  {
    const Unobserved unobserved;
    size_t pending = me.open.size();
    for (const auto& group : me.groups) pending += group.size();
    if (pending > 0) fail(describe(me) + " returned with " + std::to_string(pending) + " cp.async not waited for");
    me.state = State::kReturned;
    ++g_block.returned;
    // Others may be waiting at barrier 0 for all that are still there.
    const Barrier& all = g_block.barriers[0];
    const int left = g_block.threads - g_block.returned;
    if (all.arrived > 0 && all.expected == kAllThreads && all.arrived == left) complete(0);
  }
  release(&g_block.end_key);
  me.fiber.finish();
}

// The next lanes to run, in order. Empty: none is ready.
void choose(std::vector<Lane*>& round, int& greedy_warp) {
  round.clear();
  for (int i = 0; i < g_block.threads; ++i) {
    Lane* lane = g_block.lanes[i].get();
    if (lane->state == State::kReady) round.push_back(lane);
  }
  switch (g_seed % 4) {
    case 0:
      break;
    case 1:
      std::reverse(round.begin(), round.end());
      break;
    case 2:
      std::shuffle(round.begin(), round.end(), g_block.random);
      break;
    default: {
      const auto of_warp = [&](const Lane* lane) { return lane->warp == greedy_warp; };
      const bool stay = std::any_of(round.begin(), round.end(), of_warp) && g_block.random() % 64 != 0;
      if (!stay && !round.empty()) greedy_warp = round[g_block.random() % round.size()]->warp;
      round.erase(std::remove_if(round.begin(), round.end(), [&](const Lane* lane) { return !of_warp(lane); }),
                  round.end());
    }
  }
}

void run_block() {
  Block& block = g_block;
  const size_t bytes = (block.shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  struct Memory {
    unsigned char* data;
    ~Memory() { std::free(data); }
  } memory{static_cast<unsigned char*>(std::aligned_alloc(kSharedAlignment, bytes + kTailBytes))};
  if (memory.data == nullptr) throw std::bad_alloc();
  block.shared = memory.data;
  unsigned char* tail = memory.data + block.shared_bytes;
  const size_t tail_bytes = bytes - block.shared_bytes + kTailBytes;
  std::memset(memory.data, 0xFF, block.shared_bytes);  // NaN in every floating type
  std::memset(tail, kTailByte, tail_bytes);
#if defined(ATTNFAST_SIMT_ASAN)
  __asan_poison_memory_region(tail, tail_bytes);
#endif
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  block.warps.assign(static_cast<size_t>((block.threads + kWarpSize - 1) / kWarpSize), Warp());
  block.returned = 0;
  block.failure.clear();
  for (int i = 0; i < block.threads; ++i) {
    Lane& lane = *block.lanes[i];
    lane.state = State::kReady;
    lane.operation = "";
    lane.mask = 0;
    lane.open.clear();
    lane.groups.clear();
    const std::string name = "block " + text(block.index) + " thread " + std::to_string(i);
    lane.fiber.start(&run_lane, name.c_str());
  }

  std::vector<Lane*> round;
  int greedy_warp = 0;
  while (block.returned < block.threads && block.failure.empty()) {
    choose(round, greedy_warp);
    if (round.empty()) {
      block.failure = "deadlock: no thread can go on" + everybody();
      break;
    }
    for (Lane* lane : round) {
      block.running = lane;
      ++block.counters.switches;
      lane->fiber.resume();
      block.running = nullptr;
      if (!block.failure.empty()) break;
    }
  }
  ++block.counters.blocks;
#if defined(ATTNFAST_SIMT_ASAN)
  __asan_unpoison_memory_region(tail, tail_bytes);
#endif
  if (block.failure.empty()) {
    for (size_t i = 0; i < tail_bytes; ++i) {
      if (tail[i] == kTailByte) continue;
      block.failure = "byte " + std::to_string(i) + " behind the " + std::to_string(block.shared_bytes) +
                      " of shared memory was written";
      break;
    }
  }
  if (!block.failure.empty()) {
    for (int i = 0; i < block.threads; ++i) block.lanes[i]->fiber.abandon();
    acquire(&block.end_key);
    throw Failure("kernel " + std::string(block.kernel) + ", block " + text(block.index) + " of " + text(block.grid) +
                  ", seed " + std::to_string(g_seed) + ": " + block.failure);
  }
}

// What has been launched, one line each: the kernel's address, relative to set_seed() because programs are loaded
// anywhere (`nm` of the program tells which kernel that is), threads of a block, bytes of shared memory.
class LaunchNotes {
 public:
  ~LaunchNotes() {
    if (file_ == nullptr) return;
    std::FILE* file = std::fopen(file_, "w");
    if (file == nullptr) return;
    for (const auto& [offset, threads, bytes] : notes_) {
      std::fprintf(file, "%lld %u %llu\n", static_cast<long long>(offset), threads,
                   static_cast<unsigned long long>(bytes));
    }
    std::fclose(file);
  }
  void add(const void* kernel, Dim3 block, size_t shared_bytes) {
    if (file_ == nullptr) return;
    const auto from = reinterpret_cast<intptr_t>(&set_seed);
    const std::lock_guard<std::mutex> lock(mutex_);
    notes_.emplace(reinterpret_cast<intptr_t>(kernel) - from, block.x * block.y * block.z, shared_bytes);
  }

 private:
  const char* const file_ = std::getenv("ATTNFAST_SIMT_LAUNCHES");
  std::mutex mutex_;
  std::set<std::tuple<intptr_t, unsigned, size_t>> notes_;
};

}  // namespace

void set_seed(uint32_t seed) { g_seed = seed; }
void note_launch(const void* kernel, Dim3 block, size_t shared_bytes) {
  static LaunchNotes notes;
  notes.add(kernel, block, shared_bytes);
}
uint32_t seed() { return g_seed; }
const Counters& counters() { return g_block.counters; }
void reset_counters() { g_block.counters = Counters(); }

void launch(const char* kernel, Dim3 grid, Dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Unobserved unobserved;
  Block& block = g_block;
  block.kernel = kernel;
  block.grid = grid;
  block.size = size;
  block.body = &body;
  block.shared_bytes = shared_bytes;
  block.threads = static_cast<int>(size.x * size.y * size.z);
  block.random.seed(g_seed);
  ++block.counters.launches;
  if (block.threads < 1 || block.threads > 1024) {
    throw Failure("kernel " + std::string(kernel) + ": a block of " + std::to_string(block.threads) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) {
    throw Failure("kernel " + std::string(kernel) + ": a grid of " + text(grid) + " blocks");
  }
  while (static_cast<int>(block.lanes.size()) < block.threads) block.lanes.push_back(std::make_unique<Lane>());
  for (int i = 0; i < block.threads; ++i) {
    Lane& lane = *block.lanes[i];
    const unsigned n = static_cast<unsigned>(i);
    lane.thread = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    lane.index = i;
    lane.warp = i / kWarpSize;
    lane.lane = i % kWarpSize;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (g_seed % 4 != 0) std::shuffle(order.begin(), order.end(), block.random);
  for (uint64_t i : order) {
    block.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    run_block();
  }
  // Blocks are ordered after what went before the launch and before what follows it, never among themselves.
  acquire(&block.end_key);
}

// ---- What runs on a lane ---------------------------------------------------------------------------------------

const Dim3& thread_index() { return g_block.running->thread; }
const Dim3& block_index() { return g_block.index; }
const Dim3& block_size() { return g_block.size; }
const Dim3& grid_size() { return g_block.grid; }
int lane_index() { return g_block.running->lane; }
unsigned char* shared_memory() { return g_block.shared; }

std::string describe(const Lane& lane) {
  return "thread " + std::to_string(lane.index) + " (warp " + std::to_string(lane.warp) + " lane " +
         std::to_string(lane.lane) + ")";
}

// The launch ends here: the scheduler sees the message and throws it. This fiber is never resumed.
void fail(const std::string& what) {
  g_block.failure = what;
  g_block.running->fiber.pause();
  std::abort();
}

void wait_as(State state, const char* operation, Place place) {
  Lane& me = *g_block.running;
  me.state = state;
  me.operation = operation;
  me.place = place;
}

static void check_barrier_id(int id, const char* operation) {
  if (id < 0 || id >= kNamedBarriers) fail(std::string(operation) + ": no barrier " + std::to_string(id));
}

int barrier_sync(int id, int threads, int value, const char* operation, Place place) {
  check_barrier_id(id, operation);
  Lane& me = *g_block.running;
  Barrier& barrier = g_block.barriers[id];
  const unsigned parity = barrier.generation & 1;
  release(&barrier.key[parity]);
  {
    const Unobserved unobserved;
    // Two __syncthreads() in the two branches of an if would pair up here and need not on a GPU.
    if (barrier.waiting_at.line != 0 && !same(barrier.waiting_at, place)) {
      fail(describe(me) + " in " + operation + " at " + text(place) + ": divergent barrier" + everybody());
    }
    barrier.waiting_at = place;
    wait_as(State::kAtBarrier, operation, place);
    me.barrier = id;
    ++g_block.counters.barriers;
    barrier.sum[parity] += value;
    arrive(id, threads, operation, place);
    me.fiber.pause();
  }
  acquire(&barrier.key[parity]);
  return barrier.sum[parity];
}

void barrier_arrive(int id, int threads, const char* operation, Place place) {
  check_barrier_id(id, operation);
  release(&g_block.barriers[id].key[g_block.barriers[id].generation & 1]);
  const Unobserved unobserved;
  arrive(id, threads, operation, place);
}

void fence() {
  release(&g_block.fence_key);
  acquire(&g_block.fence_key);
}

void warp_operation(uint32_t mask, const char* operation, Place place, void* slot, WarpWork work) {
  const Unobserved unobserved;
  Lane& me = *g_block.running;
  Warp& warp = g_block.warps[static_cast<size_t>(me.warp)];
  const auto here = [&] { return describe(me) + " in " + operation + " at " + text(place); };
  if ((mask >> me.lane & 1) == 0) fail(here() + ": not in its own mask");
  wait_as(State::kInWarp, operation, place);
  me.mask = mask;
  me.slot = slot;
  ++warp.waiting;
  const int wanted = __builtin_popcount(mask);
  if (warp.waiting >= wanted) {
    Lane* lanes[kWarpSize] = {};
    const int first = me.warp * kWarpSize;
    int here_too = 0;
    for (int l = 0; l < kWarpSize; ++l) {
      if (first + l >= g_block.threads || (mask >> l & 1) == 0) continue;
      Lane* lane = lanes[l] = g_block.lanes[first + l].get();
      if (lane->state != State::kInWarp) continue;
      if (lane->mask != mask || !same(lane->place, place) || std::strcmp(lane->operation, operation) != 0) {
        fail(here() + ": divergent warp operation" + everybody());
      }
      ++here_too;
    }
    if (here_too == wanted) {
      work(lanes, mask);
      for (Lane* lane : lanes)
        if (lane != nullptr) lane->state = State::kReady;
      warp.waiting -= wanted;
    }
  }
  me.fiber.pause();
}

void warp_sync(uint32_t mask, Place place) {
  Warp& warp = g_block.warps[static_cast<size_t>(g_block.running->warp)];
  char* key = &warp.key[warp.generation & 1];
  release(key);
  warp_operation(mask, "__syncwarp", place, nullptr, [](Lane* const* lanes, uint32_t lowest) {
    // Halves of a warp that sync apart share the keys: their edges may be more than a GPU's, never fewer.
    ++g_block.warps[static_cast<size_t>(lanes[__builtin_ctz(lowest)]->warp)].generation;
  });
  acquire(key);
}

void check_shared(const void* address, size_t bytes, size_t alignment, const char* operation, Place place) {
  const auto start = reinterpret_cast<uintptr_t>(address), base = reinterpret_cast<uintptr_t>(g_block.shared);
  const bool inside = start >= base && start + bytes <= base + g_block.shared_bytes;
  if (inside && start % alignment == 0) return;
  const Unobserved unobserved;
  fail(describe(*g_block.running) + " in " + operation + " at " + text(place) + ": " +
       (inside ? "address is misaligned, at byte " + std::to_string(start - base) + " of shared memory"
               : "address is outside of shared memory"));
}

}  // namespace attnfast::simt
