// Moving tiles between tensors of any dtype and stride and the packed scratch that kernels compute on.
#pragma once

#include "simd.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

constexpr int kPanelBytes = 256;  // a panel is one row of queries: 64 floats or 32 doubles
template <class R>
constexpr int kPanel = kPanelBytes / int(sizeof(R));
template <class R>
constexpr int kPanelVectors = kPanel<R> / kLanes<R>;
template <class R>
constexpr DType kRealType = sizeof(R) == 8 ? DType::kFloat64 : DType::kFloat32;
constexpr int kKeyTile = 64;        // keys a tile
constexpr int kPanelsPerBlock = 4;  // panels that share one pass over keys and values

template <class R>
static inline int64_t padded(int64_t n) {
  return (n + kLanes<R> - 1) / kLanes<R> * kLanes<R>;
}

// The stored types of a table whose arithmetic is in R.
template <class R, class F>
static inline void visit_table(DType dtype, F f) {
  if constexpr (std::is_same_v<R, double>) {
    f(double{});
  } else {
    switch (dtype) {
      case DType::kFloat32:
        return f(float{});
      case DType::kBFloat16:
        return f(BFloat16{});
      case DType::kFloat16:
        return f(Float16{});
      case DType::kInt8:
        return f(int8_t{});
      default:
        return;
    }
  }
}

// kLanes<R> consecutive stored elements as R, for every pair of types.
template <class R, class T>
ATTNFAST_INLINE Vec<R> load_lanes(const T* p) {
  if constexpr (std::is_same_v<R, T> || (std::is_same_v<R, float> && !std::is_same_v<T, double>)) {
    return load_as<R>(p);
  } else {
    Vec<R> v;
    for (int i = 0; i < kLanes<R>; i++) v[i] = load_one<R>(p + i);
    return v;
  }
}
template <class R, class T>
ATTNFAST_INLINE void store_lanes(T* p, Vec<R> v) {
  if constexpr (std::is_same_v<R, T> || (std::is_same_v<R, float> && !std::is_same_v<T, double>)) {
    store_as(p, v);
  } else {
    for (int i = 0; i < kLanes<R>; i++) store_one<R>(p + i, v[i]);
  }
}

// One row of `count` elements to dst[padded(count)], the tail filled with zeros.
template <class R, class T>
ATTNFAST_INLINE void load_row(const T* src, int64_t stride, int64_t count, R* dst) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<R> <= count; i += kLanes<R>) store(dst + i, load_lanes<R>(src + i));
    if (i < count) {
      if constexpr (std::is_same_v<R, T> || (std::is_same_v<R, float> && !std::is_same_v<T, double>)) {
        store(dst + i, load_partial<R>(src + i, int(count - i)));
      } else {
        alignas(64) T tail[kLanes<R>] = {};
        for (int64_t j = i; j < count; j++) tail[j - i] = src[j];
        store(dst + i, load_lanes<R>(tail));
      }
    }
    return;
  }
  for (; i < count; i++) dst[i] = load_one<R>(src + i * stride);
  for (; i < padded<R>(count); i++) dst[i] = R(0);
}

// rows x cols of a strided tensor, from element `offset`, to dst[rows][dst_stride] as R, padded with zero columns.
template <class R>
static void load_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols, R* dst, int64_t dst_stride) {
  visit_dtype<R>(t.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* src = static_cast<const T*>(t.data) + offset;
    for (int64_t i = 0; i < rows; i++) load_row<R>(src + i * t.stride[2], t.stride[3], cols, dst + i * dst_stride);
  });
}

// One row of R to a strided row of any floating dtype, times `scale`.
template <class R>
static void store_row(const Tensor4& t, int64_t offset, int64_t cols, const R* src, R scale) {
  visit_dtype<R>(t.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, bool>) {
      T* dst = static_cast<T*>(t.data) + offset;
      int64_t stride = t.stride[3], i = 0;
      if (stride == 1) {
        for (; i + kLanes<R> <= cols; i += kLanes<R>) store_lanes<R>(dst + i, load(src + i) * scale);
        if constexpr (std::is_same_v<R, T>) {
          if (i < cols) store_partial(dst + i, load_partial<R>(src + i, int(cols - i)) * scale, int(cols - i));
          return;
        }
      }
      for (; i < cols; i++) store_one<R>(dst + i * stride, src[i] * scale);
    }
  });
}
template <class R>
static void store_zero_row(const Tensor4& t, int64_t offset, int64_t cols) {
  visit_dtype<R>(t.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < cols; i++) static_cast<T*>(t.data)[offset + i * t.stride[3]] = T{};
  });
}
template <class R>
static void store_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols, const R* src, int64_t src_stride,
                       R scale) {
  for (int64_t i = 0; i < rows; i++) store_row<R>(t, offset + i * t.stride[2], cols, src + i * src_stride, scale);
}

// A block of rows as the kernels read it: in place where the tensor allows, else a copy in scratch.
template <class R>
struct Rows {
  const R* data;
  int64_t stride;

  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};
// `padding`: columns are read in whole vectors, so a ragged row must be copied. Row strides that are a multiple of
// 1 KB map a tile onto few cache sets; copying such a tile costs less than the misses.
template <class R>
static inline bool readable_in_place(const Tensor4& t, int64_t cols, bool padding) {
  if (t.dtype != kRealType<R> || t.stride[3] != 1) return false;
  if (padding && cols % kLanes<R> != 0) return false;
  int64_t row_bytes = t.stride[2] * int64_t(sizeof(R));
  return t.stride[2] == cols ? row_bytes % 4096 != 0 : t.stride[2] > 0 && row_bytes % 1024 != 0;
}
template <class R>
static inline Rows<R> get_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols, bool padding, R* scratch) {
  if (readable_in_place<R>(t, cols, padding)) return {static_cast<const R*>(t.data) + offset, t.stride[2]};
  int64_t stride = padded<R>(cols);
  load_rows<R>(t, offset, rows, cols, scratch, stride);
  return {scratch, stride};
}

// Distance of the rows of a packed panel: one that fits a vector is kept dense, because rows a whole panel apart share
// few cache sets.
template <class R>
constexpr int64_t panel_stride(int64_t queries) {
  return queries <= kLanes<R> ? kLanes<R> : kPanel<R>;
}

// dst[cols][stride] = scale * transpose of rows[count][cols]. The vector that holds the last row is filled with zeros,
// vectors past it are left alone: nothing reads them. `rows` must be readable in whole vectors (padded); columns of dst
// past `cols` up to the padding may be written too.
template <class R>
static void pack_transposed(Rows<R> rows, int64_t count, int64_t cols, R* dst, R scale, int64_t stride = kPanel<R>) {
  constexpr int N = kLanes<R>;
  if (count <= 2) {  // a transpose would move N rows, nearly all of them zeros
    for (int64_t d = 0; d < cols; d++) {
      Vec<R> v{};
      v[0] = rows.data[d] * scale;
      if (count == 2) v[1] = rows.data[rows.stride + d] * scale;
      store(dst + d * stride, v);
    }
    return;
  }
  for (int64_t d = 0; d < cols; d += N)
    for (int q = 0; q < count; q += N) {
      Vec<R> r[N];
      ATTNFAST_UNROLL for (int i = 0; i < N; i++) r[i] =
          q + i < count ? load(rows.data + (q + i) * rows.stride + d) * scale : Vec<R>{};
      transpose<R>(r);
      ATTNFAST_UNROLL for (int i = 0; i < N; i++) store(dst + (d + i) * stride + q, r[i]);
    }
}

// True if any of rows x cols is infinite or NaN: x * 0 is zero for finite x only.
template <class R>
static bool has_nonfinite(Rows<R> rows, int64_t count, int64_t cols) {
  Vec<R> bad{};
  R tail = 0;
  for (int64_t i = 0; i < count; i++) {
    const R* p = rows.data + i * rows.stride;
    int64_t j = 0;
    for (; j + kLanes<R> <= cols; j += kLanes<R>) bad += load(p + j) * R(0);
    for (; j < cols; j++) tail += p[j] * R(0);
  }
  return !(sum_lanes<R>(bad) + tail == R(0));
}

// ---------------------------------------------------------------- pairs of bfloat16
// What a product reads: R itself, or for R = float pairs of bfloat16 that are next to each other along the contraction,
// one step of which then takes two elements. The broadcast operand A is stored as BFloat16 if its pairs lie along the
// rows, as uint32_t (a pair each) if TRANSPOSED; the other operand consists of uint32_t.
template <class A>
constexpr int kStep = std::is_same_v<A, BFloat16> ? 2 : 1;
template <class A>
using Packed = std::conditional_t<std::is_same_v<A, BFloat16>, uint32_t, A>;
template <class A>
static inline int64_t steps_of(int64_t elements) {
  return (elements + kStep<A> - 1) / kStep<A>;
}

// Rows whose pairs can be read: in place where the tensor allows, else a copy, a zero after rows of odd length.
static inline Rows<BFloat16> get_pair_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols,
                                           BFloat16* scratch) {
  const BFloat16* src = static_cast<const BFloat16*>(t.data) + offset;
  int64_t row_bytes = t.stride[2] * 2;
  if (t.stride[3] == 1 && cols % 2 == 0 && row_bytes > 0 &&
      (t.stride[2] == cols ? row_bytes % 4096 != 0 : row_bytes % 1024 != 0))
    return {src, t.stride[2]};
  int64_t stride = 2 * steps_of<BFloat16>(cols);
  for (int64_t i = 0; i < rows; i++) {
    const BFloat16* from = src + i * t.stride[2];
    BFloat16* to = scratch + i * stride;
    for (int64_t j = 0; j < cols; j++) to[j] = from[j * t.stride[3]];
    if (cols % 2 != 0) to[cols] = {};
  }
  return {scratch, stride};
}

// kLanes<float> elements from column d of a row, zeros past `cols`.
ATTNFAST_INLINE VecF load_columns(const BFloat16* row, int64_t stride, int64_t d, int64_t cols) {
  constexpr int N = kLanes<float>;
  if (stride == 1 && d + N <= cols) return load_as<float>(row + d);
  if (d >= cols) return VecF{};
  alignas(64) BFloat16 part[N] = {};
  for (int i = 0; i < N && d + i < cols; i++) part[i] = row[(d + i) * stride];
  return load_as<float>(static_cast<const BFloat16*>(part));
}

#if ATTNFAST_PAIRS
// dst[step][stride] = scale * transpose of count x cols elements, as pairs along a row; `scale` is a power of two.
// `scratch` has room for count rows of padded<uint32_t>(steps) words. See pack_transposed.
[[maybe_unused]] static void pack_pairs(const Tensor4& t, int64_t offset, int64_t count, int64_t cols, uint32_t* dst,
                                        float scale, int64_t stride, uint32_t* scratch) {
  constexpr int N = kLanes<float>;
  int64_t steps = steps_of<BFloat16>(cols), width = padded<uint32_t>(steps);
  for (int64_t i = 0; i < count; i++) {
    const BFloat16* row = static_cast<const BFloat16*>(t.data) + offset + i * t.stride[2];
    for (int64_t d = 0; d < 2 * width; d += 2 * N) {
      VecF low = load_columns(row, t.stride[3], d, cols), high = load_columns(row, t.stride[3], d + N, cols);
      store(scratch + i * width + d / 2, round_two(low * scale, high * scale));
    }
  }
  pack_transposed<uint32_t>({scratch, width}, count, steps, dst, 1u, stride);
}
#endif

// Pairs of rows: words[i / 2][stride] holds rows i (low half) and i + 1, a zero where the last one has no partner.
struct PairRows {
  const uint32_t* words;
  int64_t stride;
  bool finite;  // neither infinite nor NaN

  PairRows from(int64_t row) const { return {words + row / 2 * stride, stride, finite}; }  // an even row
};
[[maybe_unused]] static PairRows interleave_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols,
                                                 uint32_t* words) {
  constexpr int N = kLanes<float>;
  int64_t stride = padded<float>(cols);
  VecF bad{};
  for (int64_t i = 0; i < rows; i += 2) {
    const BFloat16* row = static_cast<const BFloat16*>(t.data) + offset + i * t.stride[2];
    for (int64_t d = 0; d < stride; d += N) {
      VecF low = load_columns(row, t.stride[3], d, cols);
      VecF high = i + 1 < rows ? load_columns(row + t.stride[2], t.stride[3], d, cols) : VecF{};
      bad += low * 0.0f + high * 0.0f;
      store(words + i / 2 * stride + d, reinterpret_cast<U32>(low) >> 16 | reinterpret_cast<U32>(high));
    }
  }
  return {words, stride, sum_lanes<float>(bad) == 0.0f};
}

// The operand of a score product that is broadcast: rows of T, read in place where the tensor allows.
template <class T, class R>
static inline Rows<T> operand_rows(const Tensor4& t, int64_t offset, int64_t rows, int64_t cols, R* scratch) {
  if constexpr (std::is_same_v<T, R>)
    return get_rows<R>(t, offset, rows, cols, false, scratch);
  else
    return get_pair_rows(t, offset, rows, cols, reinterpret_cast<BFloat16*>(scratch));
}
// The packed one: dst = scale * transpose of the rows of a panel. Also returns the rows, unless they are pairs.
template <class T, class R>
static inline Rows<R> pack_panel(const Tensor4& t, int64_t offset, int64_t count, int64_t cols, Packed<T>* dst, R scale,
                                 R* scratch) {
  if constexpr (std::is_same_v<T, R>) {
    Rows<R> rows = get_rows<R>(t, offset, count, cols, true, scratch);
    pack_transposed<R>(rows, count, cols, dst, scale, panel_stride<R>(count));
    return rows;
  } else {
    pack_pairs(t, offset, count, cols, dst, scale, panel_stride<R>(count), reinterpret_cast<uint32_t*>(scratch));
    return {};
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
