// Gradients of a bias of the additive core: dS after the soft cap, summed over the dimensions that the bias broadcasts
// over. A block owns a tile of the gradient and passes over everything that was broadcast there, always in the same
// order: samples, heads, tiles of queries and of keys.
//
// Of packed sequences a block has a tile of one sequence's queries, and its keys one tile after the other; of a bias
// that broadcasts over the queries, a tile of one sequence's keys. What lies between sequences stays as it was.
#include "cuda/additive_attention.h"
#include "cuda/device/additive_gradients.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

// Which dimensions of a gradient have places of their own.
struct Owned {
  bool batch, head, rows, keys;
};
ATTNFAST_HD Owned owned_of(const AttentionParams& p, const Tensor4& grad) {
  return {grad.stride[0] != 0 && !p.cu_seqlens_q, grad.stride[1] != 0, grad.stride[2] != 0, grad.stride[3] != 0};
}
ATTNFAST_HD int64_t tiles_of(int64_t tokens, int64_t size) { return (tokens + size - 1) / size; }

// Tiles [begin, end) of one dimension.
struct Tiles {
  int64_t begin, end;
};

// What a block owns. Of packed sequences `queries` and `keys` hold for one of them; else they are taken of each.
struct BiasBlock {
  Tiles batches, heads, queries, keys;
  bool all_queries, all_keys;
};
template <class P>
ATTNFAST_DEVICE BiasBlock bias_block(const AdditiveCall& p, const Owned& owned) {
  BiasBlock b;
  b.all_queries = !owned.rows;
  b.all_keys = !owned.keys;
  b.batches = {0, p.batch};
  b.heads = {0, p.heads};
  b.queries = b.keys = {0, 0};
  int64_t block = blockIdx.x;
  const auto take = [&](int64_t units) {
    const int64_t unit = block % units;
    block /= units;
    return Tiles{unit, unit + 1};
  };
  if (p.cu_seqlens_q) {
    // Head and tile are numbered as rows_of_block does it.
    const int64_t heads = owned.head ? p.heads : 1;
    if (owned.rows || owned.keys) {
      const BlockTile tile = owned.rows ? block_tile(p, p.cu_seqlens_q, p.query_tokens, heads, P::kRows, block)
                                        : block_tile(p, p.cu_seqlens_k, p.key_tokens, heads, P::kKeys, block);
      b.batches = {tile.batch, tile.batch + 1};
      if (owned.head) b.heads = {tile.head, tile.head + 1};
      const Sequence sequence = rows_of_head(p, tile.batch, tile.head, 1).sequence;
      const int64_t own_tiles =
          owned.rows ? tiles_of(sequence.query_rows, P::kRows) : tiles_of(sequence.keys, P::kKeys);
      const Tiles mine = {tile.index, tile.index + 1}, nothing = {0, 0};
      (owned.rows ? b.queries : b.keys) = tile.index >= 0 && tile.index < own_tiles ? mine : nothing;
      if (owned.rows && owned.keys) b.keys = {0, tiles_of(sequence.keys, P::kKeys)};
    } else if (owned.head) {
      b.heads = take(p.heads);
    }
    return b;
  }
  if (owned.keys) b.keys = take(tiles_of(p.key_tokens, P::kKeys));
  if (owned.rows) b.queries = take(tiles_of(p.query_tokens, P::kRows));
  if (owned.head) b.heads = take(p.heads);
  if (owned.batch) b.batches = take(p.batch);
  return b;
}

template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_bias_kernel(AdditiveCall p, int which) {
  using P = BackwardPlan<R, NARROW>;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  Rows& rows = tiles.rows;
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const Tensor4& grad = p.grad_bias[which];
  const BiasBlock own = bias_block<P>(p, owned_of(p, grad));
  if (!own.all_queries && own.queries.begin == own.queries.end) return;  // a tile that no sequence has
  const Tiles key_units = own.all_keys ? Tiles{0, 1} : own.keys;
  for (int64_t unit = key_units.begin; unit < key_units.end; ++unit) {
    R total[P::kRowsOfThread][P::kKeysOfThread] = {};
    for (int64_t b = own.batches.begin; b < own.batches.end; ++b)
      for (int64_t h = own.heads.begin; h < own.heads.end; ++h) {
        share_rows(rows, rows_of_head(p, b, h, 1));
        const Sequence& sequence = rows.sequence;
        const Tiles queries = own.all_queries ? Tiles{0, tiles_of(sequence.queries, P::kRows)} : own.queries;
        const Tiles keys = own.all_keys ? Tiles{0, tiles_of(sequence.keys, P::kKeys)} : Tiles{unit, unit + 1};
        for (int64_t i_q = queries.begin; i_q < queries.end; ++i_q) {
          share_rows(rows, rows_at(p, b, h, i_q * P::kRows, P::kRows));
          for (int64_t i_k = keys.begin; i_k < keys.end; ++i_k) {
            if (!meets(rows, i_k * P::kKeys, P::kKeys)) continue;
            R gradient[P::kRowsOfThread][P::kKeysOfThread];
            gradient_tile<P, false>(
                p, i_k * P::kKeys, tiles, gradient, nullptr, [](int, int, R) {}, [](int64_t, bool) {});
#pragma unroll
            for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
              for (int j = 0; j < P::kKeysOfThread; ++j) total[i][j] += gradient[i][j];
          }
        }
      }

    __syncthreads();  // the sums of the unit before are no longer read
#pragma unroll
    for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
      for (int j = 0; j < P::kKeysOfThread; ++j) {
        tiles.tile[(ty + i * P::kRowGroups) * P::kKeyPitch + tx + j * P::kColumnGroups] = total[i][j];
      }
    __syncthreads();
    // Of packed sequences, the one that the block is in: `rows` is still its.
    const Sequence& s = rows.sequence;
    const int64_t q0 = own.all_queries ? 0 : own.queries.begin * P::kRows, k0 = own.all_keys ? 0 : unit * P::kKeys;
    const int64_t query_rows = p.cu_seqlens_q ? s.query_rows : p.query_tokens;
    const int64_t columns = p.cu_seqlens_q ? s.keys : p.key_tokens;
    const int own_rows = own.all_queries ? 1 : P::kRows, own_keys = own.all_keys ? 1 : P::kKeys;
    for (int at = static_cast<int>(threadIdx.x); at < own_rows * own_keys; at += kAdditiveThreads) {
      const int row = at / own_keys, k = at % own_keys;
      if ((!own.all_queries && q0 + row >= query_rows) || (!own.all_keys && k0 + k >= columns)) continue;
      R sum = R(0);
      for (int i = row; i < (own.all_queries ? P::kRows : row + 1); ++i)
        for (int j = k; j < (own.all_keys ? P::kKeys : k + 1); ++j) sum += tiles.tile[i * P::kKeyPitch + j];
      const int64_t i = own.all_queries ? 0 : s.query_begin + q0 + row, j = own.all_keys ? 0 : s.key_begin + k0 + k;
      static_cast<R*>(grad.data)[offset4(grad, p.cu_seqlens_q ? 0 : own.batches.begin, own.heads.begin, i, j)] = sum;
    }
  }
}

template <class R, bool NARROW>
void launch(const AdditiveCall& p, int which, Stream stream) {
  using P = BackwardPlan<R, NARROW>;
  const char* name = "additive_attention_bwd_bias";
  // A dimension of size 0 may have any stride: nothing is there to add to.
  if (p.batch == 0 || p.heads == 0 || p.query_tokens == 0 || p.key_tokens == 0) return;
  const Owned owned = owned_of(p, p.grad_bias[which]);
  int64_t blocks = owned.head ? p.heads : 1;
  if (p.cu_seqlens_q) {
    if (owned.rows || owned.keys) {
      blocks *= owned.rows ? p.query_tokens / P::kRows + p.batch : p.key_tokens / P::kKeys + p.batch;
    }
  } else {
    if (owned.batch) blocks *= p.batch;
    if (owned.rows) blocks *= tiles_of(p.query_tokens, P::kRows);
    if (owned.keys) blocks *= tiles_of(p.key_tokens, P::kKeys);
  }
  ATTNFAST_LAUNCH((additive_attention_bwd_bias_kernel<R, NARROW>), checked_grid(p, blocks, name), kAdditiveThreads,
                  P::kBytes, stream, p, which);
  check_launched(name, p);
}

}  // namespace

void additive_attention_bias_bwd(const AdditiveCall& p, int which, void* stream) {
  with_plan(
      p, [&](auto real, auto narrow) { launch<decltype(real), narrow.value>(p, which, static_cast<Stream>(stream)); });
}

}  // namespace attnfast::cuda
