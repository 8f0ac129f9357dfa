// What the emulator's tests share: a count of failures, exact-size buffers and a launch that returns what was reported.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace attnfast::simt {

inline int g_failures = 0;

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED (seed %u): %s\n", seed(), what.c_str());
  ++g_failures;
}

// The message of the Failure that `body` throws, or "".
template <class Body>
std::string reported(Body body) {
  try {
    body();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

// Which random calls a program makes: --cases N from --first N on. Sanitizers are slow, ThreadSanitizer most of all: it
// has `under_tsan` of them.
struct Cases {
  int64_t count, first = 0;
};
inline Cases cases_of(int count, char** arguments, [[maybe_unused]] int64_t otherwise,
                      [[maybe_unused]] int64_t under_tsan) {
#if defined(__SANITIZE_THREAD__)
  Cases cases{under_tsan};
#else
  Cases cases{otherwise};
#endif
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string option = arguments[i];
    if (option == "--cases") cases.count = std::atoll(arguments[i + 1]);
    if (option == "--first") cases.first = std::atoll(arguments[i + 1]);
  }
  return cases;
}

// Says how it went; the program's exit status.
inline int finish(const char* program, int64_t cases) {
  std::printf("simt %s: %lld cases, %d failures\n", program, static_cast<long long>(cases), g_failures);
  return g_failures == 0 ? 0 : 1;
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace attnfast::simt
