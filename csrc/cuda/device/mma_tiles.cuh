// Tiles of the kernels of the dot core that multiply on tensor cores: rows in shared memory, and sums in C fragments.
//
// Elements have 16 bits, or are float32 and rounded to tf32 when they become a fragment; what differs is in
// MmaBFloat16, MmaFloat16 and MmaTf32. Rows are a multiple of 128 bytes, and the 16-byte chunk c of row r lies at chunk
// c ^ (r % 8): eight rows of one column of chunks, which ldmatrix wants at once, are then in different banks. A block
// has kMmaWarps warps unless its type says otherwise, a warp 16 rows of what the block owns; a lane with g = lane / 4
// and t = lane % 4 holds of a C fragment rows g and g + 8, and columns 2 t and 2 t + 1 of every eight.
//
// Of a product of rows, own rows times a tile's, both factors are rows of features, and ldmatrix reads them for tf32 as
// for 16 bits: to it a float32 is two neighbours. Of a sum, weights times the tile's rows, the second factor must be
// transposed, which ldmatrix does to 16-bit elements alone. In tf32 each lane reads 16 bytes of two rows instead:
//   - The weights' C fragments have keys 2 t and 2 t + 1 of eight where A fragments want t and t + 4. Nobody minds the
//     order of keys in a sum, so key 2 t takes the place of t, and 2 t + 1 that of t + 4, and nothing is shuffled.
//   - Of rows 2 t and 2 t + 1 a lane takes chunk g of every eight: four neighbours, one for each of four products. So
//     column g of product j is feature 4 g + j of 32, and a lane's sums are features 8 t to 8 t + 7: two chunks in the
//     end. Eight lanes that read at once, of two g and four t, find chunks g ^ 2 t, which are in different banks.
#pragma once

#include "cuda/device/rows.cuh"

namespace attnfast::cuda {

constexpr int kMmaWarps = 4, kMmaThreads = 32 * kMmaWarps, kMmaRows = 16 * kMmaWarps;

// Elements of 16 bits.
struct MmaHalf {
  using Element = uint16_t;
  using Chunk = Halves8;
  static constexpr int kWarps = kMmaWarps, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kChunk = 8;   // elements of 16 bytes
  static constexpr int kInner = 16;  // of an mma: features of a product, keys of a sum
  // What ldmatrix brought, made into a fragment.
  ATTNFAST_DEVICE static void round(uint32_t*) {}
};
struct MmaBFloat16 : MmaHalf {
  ATTNFAST_DEVICE static void mma(float* d, const uint32_t* a, const uint32_t* b) { ptx::mma_bf16(d, a, b); }
  ATTNFAST_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  ATTNFAST_DEVICE static float widen(uint16_t bits) { return ptx::widen_bf16(bits); }
  ATTNFAST_DEVICE static bool is_strange(uint16_t bits) { return (bits & 0x7F80) == 0x7F80; }
};
struct MmaFloat16 : MmaHalf {
  ATTNFAST_DEVICE static void mma(float* d, const uint32_t* a, const uint32_t* b) { ptx::mma_f16(d, a, b); }
  ATTNFAST_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_f16(low, high); }
  ATTNFAST_DEVICE static float widen(uint16_t bits) { return ptx::widen_f16(bits); }
  ATTNFAST_DEVICE static bool is_strange(uint16_t bits) { return (bits & 0x7C00) == 0x7C00; }
};
struct MmaTf32 {
  using Element = float;
  using Chunk = Float4;
  static constexpr int kWarps = kMmaWarps, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kChunk = 4;
  static constexpr int kInner = 8;
  ATTNFAST_DEVICE static void round(uint32_t* four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = ptx::to_tf32(ptx::as_float(four[i]));
  }
  ATTNFAST_DEVICE static void mma(float* d, const uint32_t* a, const uint32_t* b) { ptx::mma_tf32(d, a, b); }
  ATTNFAST_DEVICE static float widen(float x) { return ptx::as_float(ptx::to_tf32(x)); }
  ATTNFAST_DEVICE static bool is_strange(float x) { return x - x != 0.0f; }
};
// Half the rows and warps, for tiles that shared memory has no place for otherwise.
struct MmaTf32Half : MmaTf32 {
  static constexpr int kWarps = 2, kThreads = 32 * kWarps, kRows = 16 * kWarps;
};

template <class T, int kHead>
ATTNFAST_DEVICE int swizzled_at(int row, int chunk) {
  return row * kHead + (chunk ^ (row & 7)) * T::kChunk;
}

// Rows [first, first + rows) of a [T, size] matrix on their way to shared memory, zero from `end` on.
template <class T, int kHead>
ATTNFAST_DEVICE void copy_rows(typename T::Element* to, const typename T::Element* from, int64_t stride, int64_t first,
                               int rows, int64_t end, int64_t size) {
  constexpr int kChunks = kHead / T::kChunk, kRowsAtOnce = T::kThreads / kChunks;
  static_assert(T::kThreads % kChunks == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first_row = static_cast<int>(threadIdx.x) / kChunks;
  const int valid_rows = chunk * T::kChunk < size ? static_cast<int>(clamp_index(end - first, 0, rows)) : 0;
  int64_t offset = (first + first_row) * stride + chunk * T::kChunk;
#pragma unroll 2
  for (int row = first_row; row < rows; row += kRowsAtOnce) {
    const bool valid = row < valid_rows;
    ptx::copy_async_16(to + swizzled_at<T, kHead>(row, chunk), valid ? from + offset : from, valid);
    offset += kRowsAtOnce * stride;
  }
}

// The A fragment of step `step`, of 16 rows from `rows` on.
template <class T, int kHead>
ATTNFAST_DEVICE void own_fragment(const typename T::Element* rows, int step, uint32_t* a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ptx::ldmatrix_x4(a, rows + swizzled_at<T, kHead>(lane % 16, 2 * step + lane / 16));
  T::round(a);
}

// product += a (rows of the tile)^T of one step.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void multiply_step(const uint32_t* a, const typename T::Element* tile, int step, float (*product)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kTile / 8; n += 2) {
    // Rows as they lie are the transposed factor as mma wants it: matrices of 8 rows by 16 bytes of features.
    uint32_t fragment[4];
    ptx::ldmatrix_x4(fragment, tile + swizzled_at<T, kHead>(n * 8 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    T::round(fragment);
    T::mma(product[n], a, fragment);
    T::mma(product[n + 1], a, fragment + 2);
  }
}

template <int kTiles>
ATTNFAST_DEVICE void clear(float (*x)[4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0;
}

// product = own tile^T, for the 16 rows of this warp and kTile rows of the tile.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void multiply_rows(const typename T::Element* own, const typename T::Element* tile,
                                   float (*product)[4]) {
  [[maybe_unused]] constexpr int kStepsAtOnce = kHead <= 128 ? 4 : 1;  // as many as leave the registers to the sums
  clear<kTile / 8>(product);
#pragma unroll kStepsAtOnce
  for (int k = 0; k < kHead / T::kInner; ++k) {
    uint32_t a[4];
    own_fragment<T, kHead>(own, k, a);
    multiply_step<T, kHead, kTile>(a, tile, k, product);
  }
}

// sum += weights tile, the weights rounded as the tile's elements are: their C fragments are then A fragments.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void add_weighted_rows(const float (*weight)[4], const typename T::Element* tile, float (*sum)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (T::kInner == 16) {
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const uint32_t a[4] = {T::pack(weight[2 * k][0], weight[2 * k][1]), T::pack(weight[2 * k][2], weight[2 * k][3]),
                             T::pack(weight[2 * k + 1][0], weight[2 * k + 1][1]),
                             T::pack(weight[2 * k + 1][2], weight[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kHead / 8; n += 2) {
        uint32_t fragment[4];
        ptx::ldmatrix_x4_trans(fragment, tile + swizzled_at<T, kHead>(k * 16 + lane % 16, n + lane / 16));
        T::mma(sum[n], a, fragment);
        T::mma(sum[n + 1], a, fragment + 2);
      }
    }
  } else {  // see the top
    // Above 128 the places of rows in shared memory are computed for each tile: registers are short.
    const int own = kHead > 128 ? ptx::unknown(lane) % 32 : lane, g = own / 4, t = own % 4;
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) {
      uint32_t a[4] = {ptx::as_bits(weight[k][0]), ptx::as_bits(weight[k][2]), ptx::as_bits(weight[k][1]),
                       ptx::as_bits(weight[k][3])};
      T::round(a);
#pragma unroll
      for (int n = 0; n < kHead / 8; n += 4) {
        uint32_t even[4], odd[4];
        ptx::load_shared_x4(even, tile + swizzled_at<T, kHead>(k * 8 + 2 * t, 2 * n + g));
        ptx::load_shared_x4(odd, tile + swizzled_at<T, kHead>(k * 8 + 2 * t + 1, 2 * n + g));
        T::round(even);
        T::round(odd);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t fragment[2] = {even[j], odd[j]};
          T::mma(sum[n + j], a, fragment);
        }
      }
    }
  }
}

// The feature that a lane (t = lane % 4) has in element `e` (0, 1) of row g, or e + 2 of row g + 8, of tile n of a sum.
template <class T>
ATTNFAST_DEVICE int sum_feature(int t, int n, int e) {
  return T::kInner == 16 ? n * 8 + 2 * t + e : n / 4 * 32 + 8 * t + 4 * e + n % 4;
}

// Row g + 8 r of this lane's sums times `factor`, in the elements' type; those from `size` on, a multiple of kChunk,
// are left out.
template <class T, int kHead>
ATTNFAST_DEVICE void store_sums(typename T::Element* row, int r, const float (*sum)[4], int64_t size, float factor) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  if constexpr (T::kInner == 16) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      const int c = sum_feature<T>(t, n, 0);
      if (c >= size) continue;
      *reinterpret_cast<uint32_t*>(row + c) = T::pack(sum[n][2 * r] * factor, sum[n][2 * r + 1] * factor);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kHead / 8; n += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = sum_feature<T>(t, n, e);
        if (c >= size) continue;
        *reinterpret_cast<Float4*>(row + c) = {sum[n][2 * r + e] * factor, sum[n + 1][2 * r + e] * factor,
                                               sum[n + 2][2 * r + e] * factor, sum[n + 3][2 * r + e] * factor};
      }
    }
  }
}

// What masks, biases and dropout do to an element of C fragments is long, and unrolled for each element it was most of
// a kernel. Yet registers cannot be indexed by a variable. So a loop does it to one pair of elements after the other,
// and looks for the pair in all the places where it may be.
//
// Elements first and first + step of tile n (a variable, like first), of each of kArrays arrays of kTiles tiles.
template <int kTiles, int kArrays, bool kPut>
ATTNFAST_DEVICE void move_pair(float (*x)[4], int n, int first, int step, float (*pair)[kArrays]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // Selected, not branched to: of two places for a store the compiler would make one, by an address.
        const bool here = m == n && i == first + e * step;
#pragma unroll
        for (int a = 0; a < kArrays; ++a) {
          float& place = x[a * kTiles + m][i];
          if constexpr (kPut)
            place = here ? pair[e][a] : place;
          else
            pair[e][a] = here ? place : pair[e][a];
        }
      }
    }
  }
}

// begin(r) for each of this lane's two rows, then use(column, values) for each of its elements there: values[a] of
// array a, to be changed in place.
template <int kTiles, int kArrays, class Begin, class Use>
ATTNFAST_DEVICE void for_each_by_rows(float (*x)[4], Begin begin, Use use) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    begin(r);
#pragma unroll 1
    for (int n = 0; n < kTiles; ++n) {
      float pair[2][kArrays] = {};
      move_pair<kTiles, kArrays, false>(x, n, 2 * r, 1, pair);
      use(n * 8 + 2 * t, pair[0]);
      use(n * 8 + 2 * t + 1, pair[1]);
      move_pair<kTiles, kArrays, true>(x, n, 2 * r, 1, pair);
    }
  }
}
// begin(column) for each of this lane's columns, then use(r, values) for both of its elements there.
template <int kTiles, int kArrays, class Begin, class Use>
ATTNFAST_DEVICE void for_each_by_columns(float (*x)[4], Begin begin, Use use) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 1
  for (int i = 0; i < 2 * kTiles; ++i) {
    begin(i / 2 * 8 + 2 * t + i % 2);
    float pair[2][kArrays] = {};
    move_pair<kTiles, kArrays, false>(x, i / 2, i % 2, 2, pair);
    use(0, pair[0]);
    use(1, pair[1]);
    move_pair<kTiles, kArrays, true>(x, i / 2, i % 2, 2, pair);
  }
}

template <class T, int kHead, int kTile>
ATTNFAST_DEVICE bool has_strange_rows(const typename T::Element* tile) {
  bool strange = false;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kHead / T::kChunk; i += T::kThreads) {
    const auto chunk = *reinterpret_cast<const typename T::Chunk*>(tile + T::kChunk * i);
#pragma unroll
    for (int e = 0; e < T::kChunk; ++e) strange = strange || T::is_strange(chunk.x[e]);
  }
  return strange;
}

// Where a tile holds something that is not finite and something in it is hidden: adds what is visible of such a row,
// and clears it for the product that follows. Every warp of the block comes here together.
template <class T, int kHead, int kTile>
ATTNFAST_DEVICE void take_strange_rows(typename T::Element* tile, const float (*weight)[4], float (*sum)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int n = 0; n < kTile / 8; ++n) {
    float of_eight[4] = {};  // this lane's weights of eight rows
#pragma unroll
    for (int m = 0; m < kTile / 8; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_eight[i] = m == n ? weight[m][i] : of_eight[i];
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const int row = ptx::unknown(n * 8 + k);
      bool strange = false;
      for (int d = lane; d < kHead; d += 32) strange = strange || T::is_strange(tile[row * kHead + d]);
      if (!__any_sync(0xFFFFFFFFu, strange)) continue;
      const int holder = lane - lane % 4 + k / 2;  // of the weights of this lane's rows
      const int t = ptx::unknown(lane) % 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float w = __shfl_sync(0xFFFFFFFFu, k % 2 == 0 ? of_eight[2 * r] : of_eight[2 * r + 1], holder);
        if (is_hidden(w)) continue;
#pragma unroll
        for (int c = 0; c < kHead / 8; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int feature = sum_feature<T>(t, c, e);
            const auto* x = tile + swizzled_at<T, kHead>(row, feature / T::kChunk) + feature % T::kChunk;
            sum[c][2 * r + e] += w * T::widen(*x);
          }
        }
      }
    }
  }
  __syncthreads();  // all have taken what they may see
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kTile; row += T::kWarps) {
    bool strange = false;
    for (int d = lane; d < kHead; d += 32) strange = strange || T::is_strange(tile[row * kHead + d]);
    if (!__any_sync(0xFFFFFFFFu, strange)) continue;
    for (int d = lane; d < kHead; d += 32) tile[row * kHead + d] = typename T::Element(0);
  }
  __syncthreads();
}

// Elements of 16 bytes, of the types that tensor cores multiply; else 0.
inline int64_t mma_chunk(DType dtype) {
  return dtype == DType::kTf32 ? 4 : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 8 : 0;
}
inline bool mma_has_sizes(const AttentionParams& p) {
  return p.head_size > 0 && p.value_size > 0 && p.head_size <= 256 && p.value_size <= 256;
}

// Rows that start at multiples of 16 bytes and have no gaps; `chunk` elements are 16 bytes.
inline bool rows_are_aligned(const Tensor4& x, int64_t size, int64_t chunk) {
  bool good = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && size % chunk == 0 && (x.stride[3] == 1 || size == 0);
  for (int i = 0; i < 3; ++i) good = good && x.stride[i] % chunk == 0;
  return good;
}

}  // namespace attnfast::cuda
