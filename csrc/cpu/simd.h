// The only file with CPU intrinsics: vectors, exp2, tanh, half conversions, transposes.
//
// Vectors are GCC/Clang vector extensions, so one source serves every architecture; intrinsics appear only where an
// instruction is known to beat what the compiler finds. Each kernel file is compiled once per instruction set, with
// ATTNFAST_ISA naming the namespace; everything here has internal linkage (see core/host_device.h for the reason).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../core/params.h"

#ifndef ATTNFAST_ISA
#define ATTNFAST_ISA baseline
#endif

#define ATTNFAST_INLINE __attribute__((always_inline)) static inline
#define ATTNFAST_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define ATTNFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ATTNFAST_UNROLL _Pragma("GCC unroll 64")
#endif

namespace attnfast::ATTNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileCols = 4;  // vectors per micro-tile row: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileCols = 2;  // 6 x 2 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileCols = 2;
#endif
constexpr int kTileRows = 6;

// Storage types of the half formats; arithmetic is done after widening.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class R>
using MaskInt = std::conditional_t<sizeof(R) == 8, int64_t, int32_t>;
template <class R>
constexpr int kLanes = kVectorBytes / int(sizeof(R));

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint8_t ByteVec __attribute__((vector_size(kVectorBytes / 4)));
typedef uint8_t ByteVecUnaligned __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
typedef int8_t SignedByteVecUnaligned __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
typedef int16_t SignedHalfBits __attribute__((vector_size(kVectorBytes / 2)));
using U32 = Vec<uint32_t>;
using I32 = Vec<int32_t>;
using VecF = Vec<float>;

template <class R>
ATTNFAST_INLINE Vec<R> splat(R x) {
  return x - Vec<R>{};
}
template <class R>
ATTNFAST_INLINE Vec<R> zero() {
  return Vec<R>{};
}
template <class T>
ATTNFAST_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
ATTNFAST_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
// A whole vector to memory past the caches; p is aligned to kVectorBytes. Other threads see it after a fence.
template <class R>
ATTNFAST_INLINE void store_past_caches(R* p, Vec<R> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);  // an ordinary store where there is no other
#endif
}
ATTNFAST_INLINE void fence_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#else
  __atomic_thread_fence(__ATOMIC_RELEASE);
#endif
}
template <class R>
ATTNFAST_INLINE R infinity() {
  return std::is_same_v<R, double> ? R(__builtin_inf()) : R(__builtin_inff());
}
template <class R>
ATTNFAST_INLINE R sum_lanes(Vec<R> v) {
  R s = 0;
  for (int i = 0; i < kLanes<R>; i++) s += v[i];
  return s;
}
template <class R>
ATTNFAST_INLINE Vec<R> iota() {
  Vec<R> v;
  for (int i = 0; i < kLanes<R>; i++) v[i] = R(i);
  return v;
}
// `yes` in the lanes whose bit is set, `no` in the others.
template <class R>
ATTNFAST_INLINE Vec<R> select_bits(uint64_t bits, Vec<R> yes, Vec<R> no) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    return (Vec<R>)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)no, (__m512d)yes);
  else
    return (Vec<R>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)no, (__m512)yes);
#else
  using U = std::make_unsigned_t<MaskInt<R>>;
  Vec<U> lane = (Vec<U>{} + U(1)) << reinterpret_cast<Vec<U>>(iota<MaskInt<R>>());
  return ((Vec<U>{} + U(bits)) & lane) != U(0) ? yes : no;
#endif
}
// Bit i is set where lane i of `x` is -infinity.
template <class R>
ATTNFAST_INLINE uint64_t minus_infinity_bits(Vec<R> x) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(-infinity<double>()), _CMP_EQ_OQ);
  else
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-infinity<float>()), _CMP_EQ_OQ);
#elif defined(__AVX2__)
  auto hidden = x == -infinity<R>();
  if constexpr (sizeof(R) == 8)
    return uint64_t(_mm256_movemask_pd((__m256d)hidden));
  else
    return uint64_t(_mm256_movemask_ps((__m256)hidden));
#endif
  for (int i = 0; i < kLanes<R>; i++) bits |= uint64_t(x[i] == -infinity<R>()) << i;
  return bits;
}
// x where it is larger, else y; y too where either is NaN.
template <class R>
ATTNFAST_INLINE Vec<R> larger(Vec<R> x, Vec<R> y) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, double>)
    return (Vec<R>)_mm512_max_pd((__m512d)x, (__m512d)y);
  else
    return (Vec<R>)_mm512_max_ps((__m512)x, (__m512)y);
#else
  return x > y ? x : y;
#endif
}
ATTNFAST_INLINE VecF square_root(VecF x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < kLanes<float>; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
// Bit i is set where lane i of a comparison's result is.
template <class I>
ATTNFAST_INLINE uint64_t lane_bits(Vec<I> x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(I) == 8)
    return _mm512_movepi64_mask((__m512i)x);
  else
    return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(I) == 8)
    return uint64_t(_mm256_movemask_pd((__m256d)x));
  else
    return uint64_t(_mm256_movemask_ps((__m256)x));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<I>; i++) bits |= uint64_t(x[i] != 0) << i;
  return bits;
#endif
}
// Bit i is set unless x <= y in lane i: where x is larger or either is NaN.
template <class R>
ATTNFAST_INLINE uint64_t not_at_most_bits(Vec<R> x, Vec<R> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_NLE_UQ);
  else
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ);
#else
  return lane_bits<MaskInt<R>>(~(x <= y));
#endif
}
// Whether that holds anywhere in M rows against one row of N vectors.
template <class R, int M, int N>
ATTNFAST_INLINE bool any_not_at_most(const Vec<R> (&x)[M][N], const Vec<R> (&y)[N]) {
#if defined(__AVX512F__)
  unsigned any = 0;
  ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int j = 0; j < N; j++) any |=
      unsigned(not_at_most_bits<R>(x[i][j], y[j]));
  return any != 0;
#else
  Vec<MaskInt<R>> all = ~Vec<MaskInt<R>>{};
  ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int j = 0; j < N; j++) all &= x[i][j] <= y[j];
  return lane_bits<MaskInt<R>>(~all) != 0;
#endif
}
// The lanes whose bit is set, one after the other from p on; returns their number. All kLanes<I> elements from p on may
// be overwritten.
template <class I>
ATTNFAST_INLINE int compress_store(I* p, uint64_t bits, Vec<I> x) {
#if defined(__AVX512F__)
  // Packed in a register: compressing into memory is microcode on some processors.
  if constexpr (sizeof(I) == 8)
    store(p, (Vec<I>)_mm512_maskz_compress_epi64(__mmask8(bits), (__m512i)x));
  else
    store(p, (Vec<I>)_mm512_maskz_compress_epi32(__mmask16(bits), (__m512i)x));
  return __builtin_popcountll(bits);
#else
  alignas(64) I lane[kLanes<I>];
  store(lane, x);
  int count = 0;
  for (; bits != 0; bits &= bits - 1) p[count++] = lane[__builtin_ctzll(bits)];
  return count;
#endif
}
// Bit i is set where byte i of 64 is not zero.
ATTNFAST_INLINE uint64_t nonzero_byte_bits(const uint8_t* p) {
#if defined(__AVX512BW__)
  __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(x, x);
#elif defined(__AVX2__)
  uint64_t zero = 0;
  for (int i = 0; i < 2; i++) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    zero |= uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256())))) << 32 * i;
  }
  return ~zero;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t x;
    __builtin_memcpy(&x, p + i, 8);
    // The top bit of each byte is made to say "not zero"; a multiplication gathers the eight.
    constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
    x = ((((x & kLow) + kLow) | x) & ~kLow) >> 7;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bits |= (x * 0x0102040810204080) >> 56 << i;
#else
    bits |= (x * 0x8040201008040201) >> 56 << i;
#endif
  }
  return bits;
#endif
}
ATTNFAST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---------------------------------------------------------------- widening loads and rounding stores
// load_as<R>(p): kLanes<R> elements of the stored type, widened. Half types and booleans widen to float only.
template <class R>
ATTNFAST_INLINE Vec<R> load_as(const R* p) {
  return load(p);
}
template <class R>
ATTNFAST_INLINE Vec<float> load_as(const BFloat16* p) {
  HalfBits h = *reinterpret_cast<const HalfBitsUnaligned*>(p);
  return reinterpret_cast<VecF>(__builtin_convertvector(h, U32) << 16);
}
template <class R>
ATTNFAST_INLINE Vec<float> load_as(const Float16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfBits h = *reinterpret_cast<const HalfBitsUnaligned*>(p);
  U32 w = __builtin_convertvector(h, U32);
  U32 magnitude = (w & 0x7fffu) << 13, sign = (w & 0x8000u) << 16;
  // The exponent field lands 112 too low; the product restores it and is exact for denormals too.
  U32 finite = reinterpret_cast<U32>(reinterpret_cast<VecF>(magnitude) * 0x1p112f);
  U32 special = (w & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite;
  return reinterpret_cast<VecF>(special | sign);
#endif
}
template <class R>
ATTNFAST_INLINE Vec<float> load_as(const bool* p) {  // 1 or 0
  ByteVec b = *reinterpret_cast<const ByteVecUnaligned*>(p);
  return __builtin_convertvector(__builtin_convertvector(b, I32), VecF);
}
template <class R>
ATTNFAST_INLINE Vec<float> load_as(const int8_t* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  // In two steps: GCC takes a wider one element by element.
  SignedHalfBits h = __builtin_convertvector(*reinterpret_cast<const SignedByteVecUnaligned*>(p), SignedHalfBits);
  return __builtin_convertvector(__builtin_convertvector(h, I32), VecF);
#endif
}

// The first `count` elements, widened, and zeros in the lanes above; nothing past them is read. 0 < count < kLanes<R>.
template <class R, class T>
ATTNFAST_INLINE Vec<R> load_partial(const T* p, int count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<T, double>) {
    return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  } else if constexpr (std::is_same_v<T, float>) {
    return (VecF)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else if constexpr (sizeof(T) == 1) {  // bool, int8_t
    alignas(16) T part[kLanes<R>];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm_maskz_loadu_epi8(__mmask16(mask), p));
    return load_as<R>(static_cast<const T*>(part));
  } else {
    alignas(32) T part[kLanes<R>];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(__mmask16(mask), p));
    return load_as<R>(static_cast<const T*>(part));
  }
#else
  alignas(64) T part[kLanes<R>] = {};
  for (int i = 0; i < count; i++) part[i] = p[i];
  return load_as<R>(static_cast<const T*>(part));
#endif
}

// The first `count` lanes, and nothing past them. 0 < count < kLanes<R>.
template <class R>
ATTNFAST_INLINE void store_partial(R* p, Vec<R> v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
  else
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#else
  for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}

ATTNFAST_INLINE void store_as(float* p, VecF v) { store(p, v); }
ATTNFAST_INLINE void store_as(double* p, Vec<double> v) { store(p, v); }
ATTNFAST_INLINE void store_as(BFloat16* p, VecF v) {  // round to nearest even; NaN stays NaN
  U32 u = reinterpret_cast<U32>(v);
  U32 r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  r = v == v ? r : U32{} + 0x7fc0u;
  *reinterpret_cast<HalfBitsUnaligned*>(p) = __builtin_convertvector(r, HalfBits);
}
ATTNFAST_INLINE void store_as(Float16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  U32 u = reinterpret_cast<U32>(v), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  U32 normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last kept bit of a denormal result at the end of the mantissa.
  U32 tiny = reinterpret_cast<U32>(reinterpret_cast<VecF>(a) + 0.5f) - 0x3f000000u;
  U32 r = a < (113u << 23) ? tiny : normal;
  r = a >= 0x477ff000u ? U32{} + 0x7c00u : r;  // 65520 and above round to infinity
  r = a > 0x7f800000u ? U32{} + 0x7e00u : r;
  *reinterpret_cast<HalfBitsUnaligned*>(p) = __builtin_convertvector(r | sign, HalfBits);
#endif
}

// Bit i is set where the lanes i are equal.
template <class R>
ATTNFAST_INLINE uint64_t equal_bits(Vec<R> a, Vec<R> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
  else
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 8)
    return uint64_t(_mm256_movemask_pd((__m256d)(a == b)));
  else
    return uint64_t(_mm256_movemask_ps((__m256)(a == b)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<R>; i++) bits |= uint64_t(a[i] == b[i]) << i;
  return bits;
#endif
}
// The largest lane. No lane may be NaN.
template <class R>
ATTNFAST_INLINE R max_lanes(Vec<R> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8)
    return _mm512_reduce_max_pd((__m512d)v);
  else
    return _mm512_reduce_max_ps((__m512)v);
#else
  R top = v[0];
  for (int i = 1; i < kLanes<R>; i++) top = v[i] > top ? R(v[i]) : top;
  return top;
#endif
}

// Stored type of each DType: visit(dtype, f) calls f(T{}) so that one lambda serves every dtype.
template <class R, class F>
static inline void visit_dtype(DType dtype, F f) {
  if constexpr (std::is_same_v<R, double>) {
    if (dtype == DType::kFloat64) return f(double{});
  }
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBool:
      return f(bool{});
    case DType::kFloat64:
      return f(double{});
    default:
      return;
  }
}
// One element as R, and one element from R.
template <class R, class T>
ATTNFAST_INLINE R load_one(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>) {
    alignas(64) T block[kVectorBytes / 4] = {};
    block[0] = *p;
    return R(load_as<float>(block)[0]);
  } else {
    return R(*p);
  }
}
template <class R, class T>
ATTNFAST_INLINE void store_one(T* p, R x) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>) {
    alignas(64) T block[kVectorBytes / 4];
    store_as(block, splat(float(x)));
    *p = block[0];
  } else {
    *p = T(x);
  }
}

// x, rounded: what is added to it cannot be contracted with the product that made it.
template <class R>
ATTNFAST_INLINE Vec<R> rounded(Vec<R> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// ---------------------------------------------------------------- exp2 and tanh
// Minimax polynomials of 2^f. The coefficients stay in memory and are used as broadcast operands: GCC 12 otherwise
// keeps them in registers and spills the accumulators of the loop before.
#if defined(__AVX512DQ__)  // f in [0, 1), relative error 7e-8: vreduceps and vscalefps both round down
alignas(64) static const float kExp2Coefficients[6] = {0x1.fffffep-1f, 0x1.62e4f6p-1f, 0x1.ebd5a8p-3f,
                                                       0x1.c95446p-5f, 0x1.26900ep-7f, 0x1.ec320ap-10f};
#else  // f in [-1/2, 1/2], relative error 9e-8
alignas(64) static const float kExp2Coefficients[6] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9bcp-3f,
                                                       0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
#endif
alignas(64) static const double kExp2CoefficientsDouble[14] = {1.0,
                                                               0x1.62e42fefa39efp-1,
                                                               0x1.ebfbdff82c58fp-3,
                                                               0x1.c6b08d704a0c0p-5,
                                                               0x1.3b2ab6fba4e77p-7,
                                                               0x1.5d87fe78a6731p-10,
                                                               0x1.430912f86c787p-13,
                                                               0x1.ffcbfc588b0c7p-17,
                                                               0x1.62c0223a5c824p-20,
                                                               0x1.b5253d395e7c4p-24,
                                                               0x1.e4cf5158b8ecap-28,
                                                               0x1.e8cac7351bb25p-32,
                                                               0x1.c3bd650fc2986p-36,
                                                               0x1.816193166d0f9p-40};

template <class R>
ATTNFAST_INLINE const R* exp2_table() {
  if constexpr (std::is_same_v<R, float>)
    return kExp2Coefficients;
  else
    return kExp2CoefficientsDouble;
}
// x = 2^x; 0 below the range of normal numbers, something huge or infinite above it, NaN -> NaN. `table` comes from
// exp2_table; passing it through an empty asm hides its contents from the optimiser.
template <class R, int M>
ATTNFAST_INLINE void exp2_block(Vec<R> (&x)[M], const R*& table) {
  constexpr int kDegree = sizeof(R) == 4 ? 5 : 13;
#if defined(__AVX512DQ__)
  if constexpr (std::is_same_v<R, float>) {  // f in [0, 1); both instructions know infinities
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
      asm("" : "+r"(table));
      Vec<R> f = (Vec<R>)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF), p = splat(table[kDegree]);
      ATTNFAST_UNROLL for (int k = kDegree - 1; k >= 0; k--) p = p * f + splat(table[k]);
      x[i] = (Vec<R>)_mm512_scalef_ps((__m512)p, (__m512)x[i]);
    }
    return;
  }
#endif
  // Where a broadcast is an instruction of its own, a few vectors share it, so many that polynomial, fraction and power
  // of each stay in registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
  constexpr int kGroup = 3;
#else
  constexpr int kGroup = 1;
#endif
  using I = MaskInt<R>;
  constexpr R kMagic = sizeof(R) == 4 ? R(0x1.8p23) : R(0x1.8p52);
  constexpr int kShift = sizeof(R) == 4 ? 23 : 52;
  constexpr I kBias = sizeof(R) == 4 ? 127 : 1023;
  constexpr R kMax = R(kBias) + R(0.49), kMin = R(-kBias);
  ATTNFAST_UNROLL for (int first = 0; first < M; first += kGroup) {
    Vec<R> f[kGroup], p[kGroup];
    Vec<I> power[kGroup];
    asm("" : "+r"(table));
    ATTNFAST_UNROLL for (int i = 0; i < kGroup; i++) if (first + i < M) {
      // Comparisons that NaN fails, so that it stays.
      Vec<R> y = x[first + i] > kMax ? splat(kMax) : x[first + i];
      y = y < kMin ? splat(kMin) : y;
      Vec<R> t = y + kMagic;
      f[i] = y - (t - kMagic);
      p[i] = splat(table[kDegree]);
      // The last bits of t are the integer part n; what stands above leaves with the shift. n = -kBias gives the bits
      // of 0.
      power[i] = (reinterpret_cast<Vec<I>>(t) << kShift) + (kBias << kShift);
    }
    ATTNFAST_UNROLL for (int k = kDegree - 1; k >= 0; k--) {
      Vec<R> c = splat(table[k]);
      ATTNFAST_UNROLL for (int i = 0; i < kGroup; i++) if (first + i < M) p[i] = p[i] * f[i] + c;
    }
    ATTNFAST_UNROLL for (int i = 0; i < kGroup; i++) if (first + i < M) x[first + i] =
        p[i] * reinterpret_cast<Vec<R>>(power[i]);
  }
}
template <class R>
ATTNFAST_INLINE Vec<R> exp2v(Vec<R> x, const R*& table) {
  Vec<R> one[1] = {x};
  exp2_block<R, 1>(one, table);
  return one[0];
}
template <class R>
ATTNFAST_INLINE Vec<R> exp2v(Vec<R> x) {
  const R* table = exp2_table<R>();
  return exp2v(x, table);
}

// tanh: an odd polynomial near zero (relative error 5e-9 before rounding), 1 - 2 / (1 + e^2x) beyond.
constexpr float kTanhNearZero = 0.625f;
ATTNFAST_INLINE VecF tanh_near_zero(VecF x) {
  VecF u = x * x;
  VecF p = u * 0x1.2c869ep-9f + -0x1.116acap-7f;
  p = p * u + 0x1.64a996p-6f;
  p = p * u + -0x1.ba08c8p-5f;
  p = p * u + 0x1.1110eap-3f;
  p = p * u + -0x1.555556p-2f;
  return x + x * u * p;
}
ATTNFAST_INLINE VecF tanhv(VecF x) {
  VecF u = x * x;
  VecF small = tanh_near_zero(x);
  VecF a = x < 0.0f ? -x : x;
  VecF e = exp2v<float>(a * 0x1.715476p+1f);
  VecF big = 1.0f - 2.0f / (1.0f + e);
  big = x < 0.0f ? -big : big;
  return u < kTanhNearZero * kTanhNearZero ? small : big;  // NaN takes `big`, which is NaN
}
ATTNFAST_INLINE Vec<double> tanhv(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; i++) y[i] = __builtin_tanh(x[i]);
  return y;
}

// tanh as a quotient x P(x^2) / Q(x^2) of degrees 9 and 8, the leading coefficient of Q being 1: relative error 2e-8
// before rounding, 0.65 ulp (root mean square; at most 6) after it. Beyond the limit it is +-1 exactly, with FMA and
// without. Unlike tanhv it needs no exponential and no choice, which is worth it where nothing shares its division.
constexpr float kTanhLimit = 0x1.1fd12p+3f;
alignas(64) static const
    float kTanhNumerator[5] = {0x1.39f1bcp+20f, 0x1.50125cp+17f, 0x1.18f084p+12f, 0x1.a8064p+4f, 0x1.195c7p-6f};
alignas(64) static const float kTanhDenominator[4] = {0x1.39f1bcp+20f, 0x1.255062p+19f, 0x1.03f74p+15f, 0x1.a68138p+8f};
ATTNFAST_INLINE VecF tanh_quotient(VecF x) {
#if defined(__AVX512F__)  // the second operand if either is NaN
  x = (VecF)_mm512_min_ps((__m512)splat(kTanhLimit), (__m512)x);
  x = (VecF)_mm512_max_ps((__m512)splat(-kTanhLimit), (__m512)x);
#elif defined(__AVX2__)
  x = (VecF)_mm256_min_ps((__m256)splat(kTanhLimit), (__m256)x);
  x = (VecF)_mm256_max_ps((__m256)splat(-kTanhLimit), (__m256)x);
#else
  x = x > kTanhLimit ? splat(kTanhLimit) : x;
  x = x < -kTanhLimit ? splat(-kTanhLimit) : x;
#endif
  VecF u = x * x, p = u * kTanhNumerator[4] + kTanhNumerator[3], q = u + kTanhDenominator[3];
  ATTNFAST_UNROLL for (int i = 2; i >= 0; i--) {
    p = p * u + kTanhNumerator[i];
    q = q * u + kTanhDenominator[i];
  }
  return x * p / q;
}
ATTNFAST_INLINE Vec<double> tanh_quotient(Vec<double> x) { return tanhv(x); }

// e^2x for |x| <= kExpTwiceLimit, to 0.7 ulp. The multiple of ln(2) / 2 is taken off exactly, in two parts, with or
// without FMA: the rounding of 2 x log2(e) alone would cost ten times as much. The rest is Taylor's series to y^7.
constexpr float kExpTwiceLimit = 43.0f;
ATTNFAST_INLINE VecF exp_twice(VecF x) {
  constexpr float kMagic = 0x1.8p23f;
  VecF t = x * 0x1.715476p+1f + kMagic, n = t - kMagic;
  VecF y = (x - n * 0x1.62e4p-2f) - n * 0x1.7f7d1cp-21f;
  y += y;
  VecF p = y * (1.0f / 5040) + 1.0f / 720;
  p = p * y + 1.0f / 120;
  p = p * y + 1.0f / 24;
  p = p * y + 1.0f / 6;
  p = p * y + 0.5f;
  VecF e = 1.0f + (y + y * y * p);
  I32 exponent = reinterpret_cast<I32>(t) - reinterpret_cast<I32>(splat(kMagic));
  return reinterpret_cast<VecF>(reinterpret_cast<I32>(e) + (exponent << 23));
}

// The smaller one; `limit` if x is NaN.
ATTNFAST_INLINE VecF smaller(VecF x, VecF limit) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)x, (__m512)limit);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)x, (__m256)limit);
#else
  return x < limit ? x : limit;
#endif
}

// ---------------------------------------------------------------- 32-bit products for the random numbers
using U64 = Vec<uint64_t>;
// The low halves of the 64-bit lanes times m.
ATTNFAST_INLINE U64 multiply_low(U64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// ---------------------------------------------------------------- products of bfloat16 pairs
// AVX512_BF16 multiplies 32-bit words that hold two bfloat16 each: two products and their sum a lane. The file that is
// compiled for AVX-512 must also run where this extension is missing, so the instructions are written out here, where
// no compiler flag can let them appear elsewhere, and only calls with AttentionParams::native_bf16 reach them.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ATTNFAST_PAIRS 1
// c + low(a) * low(b) + high(a) * high(b). Subnormal numbers count as zero. By value: an accumulator that the assembly
// writes where it lies stays in memory.
ATTNFAST_INLINE VecF dot_pairs(VecF c, U32 a, U32 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
// Both vectors rounded to nearest even, one after the other; NaN stays NaN, subnormal numbers become zero.
ATTNFAST_INLINE U32 round_two(VecF first, VecF second) {
  U32 r;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(r) : "v"(first), "v"(second));
  return r;
}
// From round_two's result: lane i holds element i of the first vector (low half) and of the second.
ATTNFAST_INLINE U32 interleave_halves(U32 two) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  Halves h = reinterpret_cast<Halves>(two);
  return reinterpret_cast<U32>(__builtin_shufflevector(h, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                       24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
ATTNFAST_INLINE void store_halves(BFloat16* first, BFloat16* second, U32 two) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256((__m512i)two));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64((__m512i)two, 1));
}
#else
#define ATTNFAST_PAIRS 0
#endif
// Two consecutive elements; the first in the low half. `p` may be odd.
ATTNFAST_INLINE uint32_t load_pair(const BFloat16* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}

// ---------------------------------------------------------------- transposes
template <int S, class R, int... L>
ATTNFAST_INLINE void exchange(Vec<R>& a, Vec<R>& b, std::integer_sequence<int, L...>) {
  constexpr int N = kLanes<R>;
  Vec<R> x = __builtin_shufflevector(a, b, ((L & S) ? N + L - S : L)...);
  b = __builtin_shufflevector(a, b, ((L & S) ? N + L : L + S)...);
  a = x;
}
template <int S, class R>
ATTNFAST_INLINE void transpose_step(Vec<R>* r) {
  constexpr int N = kLanes<R>;
  if constexpr (S < N) {
    ATTNFAST_UNROLL for (int i = 0; i < N; i++) if (!(i & S))
        exchange<S, R>(r[i], r[i + S], std::make_integer_sequence<int, N>());
    transpose_step<S * 2, R>(r);
  }
}
// r[i][j] <-> r[j][i] of kLanes x kLanes elements.
template <class R>
ATTNFAST_INLINE void transpose(Vec<R>* r) {
  transpose_step<1, R>(r);
}

// Lane i of the result is the sum of the lanes of r[i]: each step adds pairs of rows while it interleaves them, which
// takes half the shuffles of a transpose.
template <int S, class R>
ATTNFAST_INLINE Vec<R> sum_of_rows(Vec<R>* r) {
  constexpr int N = kLanes<R>;
  if constexpr (S == N) {
    return r[0];
  } else {
    ATTNFAST_UNROLL for (int i = 0; i < N; i += 2 * S) {
      exchange<S, R>(r[i], r[i + S], std::make_integer_sequence<int, N>());
      r[i] += r[i + S];
    }
    return sum_of_rows<S * 2, R>(r);
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
