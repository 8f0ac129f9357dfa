// What the emulator's tests share: a count of failures, exact-size buffers and a launch that returns what was reported.
#pragma once

#include <cstdio>
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

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace attnfast::simt
