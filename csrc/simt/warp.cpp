// Operations that the lanes of a warp carry out together, and tensor-core instructions with their fragment maps (PTX
// ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8"). With g = lane / 4 and t = lane % 4, register element i
// of a lane is
//   16 bits:  A row g + 8 ((i / 2) % 2), column 2 t + i % 2 + 8 (i / 4);  B row 2 t + i % 2 + 8 (i / 2), column g
//   tf32:     A row g + 8 (i % 2), column t + 4 (i / 2);                  B row t + 4 i, column g
//   C and D:  row g + 8 (i / 2), column 2 t + i % 2
#include <algorithm>
#include <cmath>

#include "simt/block.h"

namespace attnfast::simt {
namespace {

template <class T>
T& slot(Lane* const* warp, int lane) {
  return *static_cast<T*>(warp[lane]->slot);
}

struct ShuffleSlot {
  uint64_t value, result;
  Shuffle kind;
  int operand, width;
};

struct BallotSlot {
  bool predicate;
  uint32_t result;
};

struct ReduceSlot {
  uint32_t value, result;
  Reduce kind;
  bool is_signed;
};

struct MmaSlot {
  MmaType type;
  float* d;
  const uint32_t *a, *b;
};

struct LdmatrixSlot {
  int count;
  bool transposed;
  const void* address;
  uint16_t row[8];
  uint16_t result[8];
};

constexpr uint32_t kCanonicalNaN = 0x7FFFFFFFu;  // PTX's, in 32 bits

uint16_t half_of(const uint32_t* registers, int i) { return static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)); }

float widen(MmaType type, uint16_t bits) {
  return type == MmaType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// A float32 register as tf32. The low 13 bits must be zero, or the number what cvt makes of a NaN: what a tensor core
// does with them is not defined.
float tf32_of(uint32_t bits, const Lane& lane) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  if ((bits & 0x1FFFu) != 0 && bits != kCanonicalNaN) {
    char text[64];
    std::snprintf(text, sizeof(text), "0x%08X has not been rounded to tf32", bits);
    fail(describe(lane) + " in " + lane.operation + ": " + text);
  }
  return x;
}

void do_mma(Lane* const* warp, uint32_t) {
  const MmaType type = slot<MmaSlot>(warp, 0).type;
  const int inner = type == MmaType::kTf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaSlot& mine = slot<MmaSlot>(warp, lane);
    const int g = lane / 4, t = lane % 4;
    if (type == MmaType::kTf32) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32_of(mine.a[i], *warp[lane]);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32_of(mine.b[i], *warp[lane]);
      continue;
    }
    for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = widen(type, half_of(mine.a, i));
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = widen(type, half_of(mine.b, i));
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaSlot& mine = slot<MmaSlot>(warp, lane);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < inner; ++k) sum += a[row][k] * b[k][column];
      mine.d[i] += sum;
    }
  }
  ++g_block.counters.mma;
}

// Eight rows of 16 bytes, which are read at once, fill the 32 banks once; two different rows in the same four banks
// need another pass.
template <class Address>
void count_conflicts(Address address) {
  uintptr_t rows[8];  // without those that are there already
  int count = 0, passes = 1;
  for (int i = 0; i < 8; ++i) {
    const auto mine = reinterpret_cast<uintptr_t>(address(i));
    if (std::find(rows, rows + count, mine) != rows + count) continue;
    const auto in_same_banks = [&](uintptr_t other) { return other / 16 % 8 == mine / 16 % 8; };
    passes = std::max(passes, 1 + static_cast<int>(std::count_if(rows, rows + count, in_same_banks)));
    rows[count++] = mine;
  }
  g_block.counters.bank_conflicts += static_cast<uint64_t>(passes - 1);
}

void do_load_shared_x4(Lane* const* warp, uint32_t) {
  for (int quarter = 0; quarter < kWarpSize; quarter += 8) {
    count_conflicts([&](int i) { return slot<const void*>(warp, quarter + i); });
  }
}

void do_ldmatrix(Lane* const* warp, uint32_t) {
  const int count = slot<LdmatrixSlot>(warp, 0).count;
  const bool transposed = slot<LdmatrixSlot>(warp, 0).transposed;
  ++g_block.counters.ldmatrix;
  for (int m = 0; m < count; ++m) {
    count_conflicts([&](int i) { return slot<LdmatrixSlot>(warp, 8 * m + i).address; });
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int e = 0; e < 2; ++e) {
        const int outer = lane / 4, inner = lane % 4 * 2 + e;
        const int row = transposed ? inner : outer, column = transposed ? outer : inner;
        slot<LdmatrixSlot>(warp, lane).result[2 * m + e] = slot<LdmatrixSlot>(warp, 8 * m + row).row[column];
      }
    }
  }
}

void do_shuffle(Lane* const* warp, uint32_t mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    ShuffleSlot& mine = slot<ShuffleSlot>(warp, lane);
    const int first = lane / mine.width * mine.width, last = first + mine.width - 1;
    int source = lane;
    switch (mine.kind) {
      case Shuffle::kIndex:
        source = first + (mine.operand & (mine.width - 1));
        break;
      case Shuffle::kUp:
        source = lane - mine.operand < first ? lane : lane - mine.operand;
        break;
      case Shuffle::kDown:
        source = lane + mine.operand > last ? lane : lane + mine.operand;
        break;
      case Shuffle::kXor:
        source = (lane ^ mine.operand) > last ? lane : lane ^ mine.operand;
        break;
    }
    if ((mask >> source & 1) == 0) {
      fail(describe(*warp[lane]) + " in " + warp[lane]->operation + ": reads from lane " + std::to_string(source) +
           ", which is not in the mask");
    }
    mine.result = slot<ShuffleSlot>(warp, source).value;
  }
}

void do_ballot(Lane* const* warp, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0 && slot<BallotSlot>(warp, lane).predicate) result |= uint32_t{1} << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    if ((mask >> lane & 1) != 0) slot<BallotSlot>(warp, lane).result = result;
}

uint32_t combine(const ReduceSlot& how, uint32_t x, uint32_t y) {
  const bool less = how.is_signed ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
  switch (how.kind) {
    case Reduce::kAdd:
      return x + y;
    case Reduce::kMin:
      return less ? x : y;
    case Reduce::kMax:
      return less ? y : x;
    case Reduce::kAnd:
      return x & y;
    case Reduce::kOr:
      return x | y;
    default:
      return x ^ y;
  }
}

void do_reduce(Lane* const* warp, uint32_t mask) {
  const int first = __builtin_ctz(mask);
  uint32_t result = slot<ReduceSlot>(warp, first).value;
  for (int lane = first + 1; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0) {
      result = combine(slot<ReduceSlot>(warp, first), result, slot<ReduceSlot>(warp, lane).value);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    if ((mask >> lane & 1) != 0) slot<ReduceSlot>(warp, lane).result = result;
}

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width, const char* operation,
                 Place place) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(describe(*g_block.running) + " in " + operation + ": width " + std::to_string(width));
  }
  ShuffleSlot mine{value, 0, kind, operand, width};
  warp_operation(mask, operation, place, &mine, &do_shuffle);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, const char* operation, Place place) {
  BallotSlot mine{predicate, 0};
  warp_operation(mask, operation, place, &mine, &do_ballot);
  return mine.result;
}

uint32_t reduce(uint32_t mask, uint32_t value, Reduce kind, bool is_signed, const char* operation, Place place) {
  ReduceSlot mine{value, 0, kind, is_signed};
  warp_operation(mask, operation, place, &mine, &do_reduce);
  return mine.result;
}

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Place place) {
  MmaSlot mine{type, d, a, b};
  warp_operation(kWholeWarp, "mma.sync", place, &mine, &do_mma);
}

void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, Place place) {
  const char* operation = transposed ? "ldmatrix.trans" : "ldmatrix";
  LdmatrixSlot mine{count, transposed, row, {}, {}};
  // A lane whose pointer is not used may pass any. The others read their row now, as themselves: a race or an overrun
  // is then reported of the right CUDA thread.
  if (lane_index() < 8 * count) {
    check_shared(row, sizeof(mine.row), sizeof(mine.row), operation, place);
    record_read(row, sizeof(mine.row));
    const Unobserved unobserved;
    std::memcpy(mine.row, row, sizeof(mine.row));
  }
  warp_operation(kWholeWarp, operation, place, &mine, &do_ldmatrix);
  for (int m = 0; m < count; ++m)
    registers[m] = mine.result[2 * m] | static_cast<uint32_t>(mine.result[2 * m + 1]) << 16;
}

void load_shared_x4(uint32_t* registers, const void* from, Place place) {
  constexpr size_t kBytes = 16;
  check_shared(from, kBytes, kBytes, "ld.shared.v4", place);
  record_read(from, kBytes);
  {
    const Unobserved unobserved;
    std::memcpy(registers, from, kBytes);
  }
  warp_operation(kWholeWarp, "ld.shared.v4", place, &from, &do_load_shared_x4);
}

// ---- Conversions -----------------------------------------------------------------------------------------------

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace

float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -small : small;
}

uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7FFF;  // PTX's canonical NaN
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  // Adding a power of two whose last place is the last place of the result rounds to nearest even.
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  const double place = std::ldexp(1.0, exponent - 10);
  const auto units = static_cast<int>(std::nearbyint(static_cast<double>(size) / place));
  return static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)));
}

float to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return float_of(kCanonicalNaN);
  return float_of((bits + 0x1000u) & 0xFFFFE000u);
}

}  // namespace attnfast::simt
