// Register-tiled products on packed scratch: the only loops that do the heavy arithmetic.
//
// Scores are kept transposed, S^T[key][query], with queries in lanes. So keys and values are read in place and
// broadcast element by element, every softmax step is vertical, and P^T (dS^T) is itself the broadcast operand of the
// second products. Accumulators are fresh for every tile and added to memory once: one long chain of additions over
// thousands of keys would cost digits.
#pragma once

#include "tile_io.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

template <int N>
using Int = std::integral_constant<int, N>;

template <class A>
ATTNFAST_INLINE auto load_step(const A* p) {
  if constexpr (std::is_same_v<A, BFloat16>)
    return load_pair(p);
  else
    return *p;
}
template <class R>
ATTNFAST_INLINE void multiply_add(Vec<R>& c, Vec<R> a, Vec<R> b) {
  c += a * b;
}
#if ATTNFAST_PAIRS
template <class R>
ATTNFAST_INLINE void multiply_add(VecF& c, U32 a, U32 b) {
  c = dot_pairs(c, a, b);
}
#endif

// c[i][j] += sum_k a(i, k) * B[k][lane], M rows, N vectors; a(i, k) = A[k * sa + i] if TRANSPOSED, else
// A[i * sa + k * kStep].
template <class R, int M, int N, bool TRANSPOSED, class A>
ATTNFAST_INLINE void multiply(int64_t depth, const A* a, int64_t sa, const Packed<A>* B, int64_t sb,
                              Vec<R> (&c)[M][N]) {
  auto at = [&](int64_t k, int i)
                ATTNFAST_LAMBDA { return splat(load_step(TRANSPOSED ? a + k * sa + i : a + i * sa + k * kStep<A>)); };
  int64_t k = 0;
  if constexpr (N == 1 && M <= 2) {
    // One or two accumulators would wait for themselves at every step: a few partial sums keep the processor busy.
    constexpr int kParts = 4 / M;
    Vec<R> part[kParts][M] = {};
    for (; k + kParts <= depth; k += kParts) {
      ATTNFAST_UNROLL for (int j = 0; j < kParts; j++) {
        auto b = load(B + (k + j) * sb);
        ATTNFAST_UNROLL for (int i = 0; i < M; i++) multiply_add<R>(part[j][i], at(k + j, i), b);
      }
    }
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
      ATTNFAST_UNROLL for (int j = 1; j < kParts; j++) part[0][i] += part[j][i];
      c[i][0] += part[0][i];
    }
  }
  auto step = [&]() ATTNFAST_LAMBDA {
    Vec<Packed<A>> b[N];
    ATTNFAST_UNROLL for (int j = 0; j < N; j++) b[j] = load(B + k * sb + kLanes<R> * j);
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) {
      auto x = at(k, i);
      ATTNFAST_UNROLL for (int j = 0; j < N; j++) multiply_add<R>(c[i][j], x, b[j]);
    }
  };
  if constexpr (std::is_same_v<A, R>) {
#pragma GCC unroll 4
    for (; k < depth; k++) step();
  } else {
    // Unrolled, GCC 12 spills the accumulators that inline assembly updates.
#pragma GCC unroll 1
    for (; k < depth; k++) step();
  }
}

// f(Int<M>, first row) over `rows` rows in blocks of kTileRows; what is left goes in blocks of 4, 2 and 1 (a block for
// every remainder would double the code and its compile time).
template <class F>
ATTNFAST_INLINE void for_row_blocks(int rows, F f) {
  int r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f(Int<kTileRows>(), r);
  if (rows - r >= 4) {
    f(Int<4>(), r);
    r += 4;
  }
  if (rows - r >= 2) {
    f(Int<2>(), r);
    r += 2;
  }
  if (rows - r >= 1) f(Int<1>(), r);
}
// f(Int<N>, first vector) over the vectors [begin, end) in strips of kTileCols, then halves of it.
template <class F>
ATTNFAST_INLINE void for_strips(int begin, int end, F f) {
  int j = begin;
  for (; j + kTileCols <= end; j += kTileCols) f(Int<kTileCols>(), j);
  if constexpr (kTileCols > 2) {
    if (end - j >= 2) {
      f(Int<2>(), j);
      j += 2;
    }
  }
  if (end - j >= 1) f(Int<1>(), j);
}

// Which lanes (queries of a panel) see each key of a tile, by position: those outside [begin, end) do not.
struct LaneBands {
  int32_t begin[kKeyTile], end[kKeyTile];

  // The smallest range that holds the lanes of `count` keys from `key`; begin >= end if there are none.
  ATTNFAST_LAMBDA inline void hull(int key, int count, int& first, int& last) const {
    first = begin[key];
    last = end[key];
    for (int i = key + 1; i < key + count; i++) {
      first = begin[i] < first ? begin[i] : first;
      last = end[i] > last ? end[i] : last;
    }
  }
};

// out(Int<M>, x, r, j): the M finished vectors of keys r.. in vector column j,
//   x[i] = init[j] + sum_d A[r + i][d] * bt[d][j], bt packed with panel_stride; `depth` in steps
// The depth is cut so that the packed operand stays in L1; partial sums wait in buf. With bands, vectors that no lane
// of a row block can see are not formed and buf holds `hole` there.
template <class R, class T, class Out>
ATTNFAST_INLINE void score_product(Rows<T> A, int64_t depth, const Packed<T>* bt, const R* init, R* buf, int rows,
                                   int vectors, const LaneBands* bands, R hole, Out out) {
  constexpr int N0 = kLanes<R>, W = kPanel<R>;
  int64_t chunks = depth > 80 ? (depth + 79) / 80 : 1, chunk = (depth + chunks - 1) / chunks;
  for (int64_t piece = 0; piece < chunks; piece++) {
    int64_t d0 = piece * chunk, count = depth - d0 < chunk ? depth - d0 : chunk;
    bool last = piece == chunks - 1;
    for_row_blocks(rows, [&](auto m, int r) ATTNFAST_LAMBDA {
      constexpr int M = decltype(m)::value;
      int j0 = 0, j1 = vectors;
      if (bands) {
        bands->hull(r, M, j0, j1);
        j0 /= N0;
        j1 = (j1 + N0 - 1) / N0 < vectors ? (j1 + N0 - 1) / N0 : vectors;
      }
      const T* a = A.data + r * A.stride + d0 * kStep<T>;
      ATTNFAST_UNROLL for (int i = 0; i < M; i++) {  // the next row block, while this one computes
        const char* next = reinterpret_cast<const char*>(a + (M + i) * A.stride);
        ATTNFAST_UNROLL for (int line = 0; line < 4; line++) prefetch(next + 64 * line);
      }
      for_strips(j0, j1, [&](auto n, int j) ATTNFAST_LAMBDA {
        constexpr int N = decltype(n)::value;
        Vec<R> c[M][N];
        R* b = buf + r * W + N0 * j;
        if (piece == 0) {
          ATTNFAST_UNROLL for (int v = 0; v < N; v++) {
            Vec<R> start = init ? load(init + N0 * (j + v)) : Vec<R>{};
            ATTNFAST_UNROLL for (int i = 0; i < M; i++) c[i][v] = start;
          }
        } else {
          ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++) c[i][v] =
              load(b + i * W + N0 * v);
        }
        int64_t stride = N == 1 && vectors == 1 ? N0 : W;
        multiply<R, M, N, false, T>(count, a, A.stride, bt + d0 * stride + N0 * j, stride, c);
        if (last) {
          ATTNFAST_UNROLL for (int v = 0; v < N; v++) {
            Vec<R> x[M];
            ATTNFAST_UNROLL for (int i = 0; i < M; i++) x[i] = c[i][v];
            out(m, x, r, j + v);
          }
        } else {
          ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++)
              store(b + i * W + N0 * v, c[i][v]);
        }
      });
      if (bands && last) {
        for (int i = 0; i < M; i++) {
          for (int j = 0; j < j0 && j < vectors; j++) store(buf + (r + i) * W + N0 * j, splat(hole));
          for (int j = j1 > 0 ? j1 : 0; j < vectors; j++) store(buf + (r + i) * W + N0 * j, splat(hole));
        }
      }
    });
  }
}

// The products alone: buf[key][query].
template <class R, class T>
__attribute__((noinline)) void raw_scores(Rows<T> A, int64_t depth, const Packed<T>* bt, R* buf, int rows, int vectors,
                                          const LaneBands* bands) {
  score_product<R, T>(A, depth, bt, nullptr, buf, rows, vectors, bands, R(0),
                      [&](auto m, auto& x, int r, int j) ATTNFAST_LAMBDA {
                        ATTNFAST_UNROLL for (int i = 0; i < decltype(m)::value; i++)
                            store(buf + (r + i) * kPanel<R> + kLanes<R> * j, x[i]);
                      });
}

// One row block of C += A B: M rows, `vectors` vectors wide, contraction over `depth`.
template <class R, int M, bool TRANSPOSED, class T>
ATTNFAST_INLINE void multiply_rows(int64_t depth, const T* A, int64_t sa, const Packed<T>* B, int64_t sb, R* C,
                                   int64_t sc, int begin, int end, bool fresh) {
  constexpr int N0 = kLanes<R>;
  for_strips(begin, end, [&](auto n, int j) ATTNFAST_LAMBDA {
    constexpr int N = decltype(n)::value;
    R* c0 = C + N0 * j;
    Vec<R> c[M][N] = {};
    multiply<R, M, N, TRANSPOSED, T>(depth, A, sa, B + N0 * j, sb, c);
    ATTNFAST_UNROLL for (int i = 0; i < M; i++) ATTNFAST_UNROLL for (int v = 0; v < N; v++) {
      R* p = c0 + i * sc + N0 * v;
      store(p, fresh ? c[i][v] : load(p) + c[i][v]);
    }
  });
}

// C[rows][vectors] (+)= A B, where range(Int<M>, r, begin, end) may shorten the contraction [begin, end) of a row
// block. One strip of B at a time stays in L1 while all row blocks pass over it.
template <class R, bool TRANSPOSED, class T, class Range>
ATTNFAST_INLINE void multiply_panel(int rows, int64_t depth, const T* A, int64_t sa, Rows<Packed<T>> B, R* C,
                                    int64_t sc, int vectors, bool fresh, Range range) {
  for (int j = 0; j < vectors; j += kTileCols) {
    int end = j + kTileCols < vectors ? j + kTileCols : vectors;
    for_row_blocks(rows, [&](auto m, int r) ATTNFAST_LAMBDA {
      constexpr int M = decltype(m)::value;
      int64_t k0 = 0, k1 = depth;
      range(m, r, k0, k1);
      if (k0 >= k1 && !fresh) return;
      int64_t n = k1 > k0 ? k1 - k0 : 0;
      const T* a = TRANSPOSED ? A + k0 * sa + r : A + r * sa + k0 * kStep<T>;
      multiply_rows<R, M, TRANSPOSED, T>(n, a, sa, B.data + k0 * B.stride, B.stride, C + r * sc, sc, j, end, fresh);
    });
  }
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA
