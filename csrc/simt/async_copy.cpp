// cp.async: copies to shared memory that a thread issues, commits in groups and waits for. Until it has waited, the
// destination holds NaN, whatever a GPU might have copied by then; and the groups that a wait completes are copied in
// random order.
#include <algorithm>

#include "simt/block.h"

namespace attnfast::simt {

void async_copy(void* destination, const void* source, int bytes, int valid, Place place) {
  check_shared(destination, static_cast<size_t>(bytes), static_cast<size_t>(bytes), "cp.async", place);
  // To ThreadSanitizer the destination is written now and again when the copy completes: it must not be in use.
  record_write(destination, static_cast<size_t>(bytes));
  const Unobserved unobserved;
  if (reinterpret_cast<uintptr_t>(source) % static_cast<uintptr_t>(bytes) != 0) {
    fail(describe(*g_block.running) + " in cp.async at line " + std::to_string(place.line) +
         ": source is not aligned to " + std::to_string(bytes) + " bytes");
  }
  if (valid < 0 || valid > bytes) fail("cp.async: " + std::to_string(valid) + " valid bytes");
  std::memset(destination, 0xFF, static_cast<size_t>(bytes));
  g_block.running->open.push_back({destination, source, bytes, valid});
  ++g_block.counters.async_copies;
}

void async_commit() {
  const Unobserved unobserved;
  Lane& me = *g_block.running;
  me.groups.emplace_back();
  me.groups.back().swap(me.open);
}

void async_wait(int newest) {
  Lane& me = *g_block.running;
  std::vector<AsyncCopy>* copies;
  {
    const Unobserved unobserved;
    copies = new std::vector<AsyncCopy>;
    while (static_cast<int>(me.groups.size()) > newest) {
      copies->insert(copies->end(), me.groups.front().begin(), me.groups.front().end());
      me.groups.erase(me.groups.begin());
    }
    std::shuffle(copies->begin(), copies->end(), g_block.random);
  }
  for (const AsyncCopy& copy : *copies) {
    const auto valid = static_cast<size_t>(copy.valid), bytes = static_cast<size_t>(copy.bytes);
    record_read(copy.source, valid);
    record_write(copy.destination, bytes);
    const Unobserved unobserved;
    if (valid > 0) std::memcpy(copy.destination, copy.source, valid);
    std::memset(static_cast<char*>(copy.destination) + valid, 0, bytes - valid);
  }
  const Unobserved unobserved;
  delete copies;
}

}  // namespace attnfast::simt
