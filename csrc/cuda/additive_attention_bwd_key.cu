// The pass by keys of the additive core's backward: a block owns a tile of keys of a key head and passes over the
// queries of the heads that share it, for dK and dV.
#include "cuda/additive_attention.h"
#include "cuda/device/additive_gradients.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

template <class R, bool NARROW>
__global__ void __launch_bounds__(kAdditiveThreads, 2) additive_attention_bwd_key_kernel(AdditiveCall p) {
  using P = BackwardPlan<R, NARROW>;
  using Vector = typename P::Vector;
  constexpr int kOwn = P::kKeys / P::kDimGroups;
  ATTNFAST_SHARED(shared);
  const BackwardTiles<P> tiles(reinterpret_cast<R*>(shared));
  const int tx = column_of_thread<P>(), ty = row_of_thread<P>();
  const int column = static_cast<int>(threadIdx.x) % P::kChunk, group = static_cast<int>(threadIdx.x) / P::kChunk;
  const BlockTile own_tile = block_tile(p, p.cu_seqlens_k, p.key_tokens, p.kv_heads, P::kKeys, blockIdx.x);
  const int64_t key = own_tile.index * P::kKeys, kv_head = own_tile.head, heads = p.heads / p.kv_heads;
  Rows& rows = tiles.rows;
  share_rows(rows, rows_of_head(p, own_tile.batch, kv_head * heads, 1));
  const int64_t batch = rows.sequence.tensor_batch, key_begin = rows.sequence.key_begin;
  const int64_t columns = p.cu_seqlens_k ? rows.sequence.keys : p.key_tokens;
  if (own_tile.index < 0 || key >= columns) return;  // a tile that no sequence has
  const BackwardLayout at = layout_of<R>(p, p.splits, P::kRows);
  const int64_t first_row = (batch * p.kv_heads + kv_head) * p.key_tokens + key_begin + key;
  R* const keys = static_cast<R*>(p.workspace) + at.key + first_row * p.head_size;
  R* const values = static_cast<R*>(p.workspace) + at.value + first_row * p.value_size;
  const int own = static_cast<int>(columns - key < P::kKeys ? columns - key : P::kKeys);
  const int64_t seen = rows.sequence.keys - key < own ? rows.sequence.keys - key : own;
  KeyRange queries = {0, 0};
  if (seen > 0) queries = queries_that_see(p, rows, heads, key, key + seen);
  for (int row = group; row < own; row += P::kDimGroups) {
    for (int64_t d = column; d < p.head_size; d += P::kChunk) keys[row * p.head_size + d] = R(0);
    for (int64_t c = column; c < p.value_size; c += P::kChunk) values[row * p.value_size + c] = R(0);
  }

  for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; ++head) {
    for (int64_t first = queries.begin / P::kRows * P::kRows; first < queries.end; first += P::kRows) {
      share_rows(rows, rows_at(p, own_tile.batch, head, first, P::kRows));
      if (!meets(rows, key, P::kKeys)) continue;
      // The weights lie in the tile until dS takes their place.
      const auto applied = [&](int row, int k, R weight) { tiles.tile[k * P::kRowPitch + row] = weight; };
      const auto chunk = [&](int64_t c0, bool strange) {
        if (!p.grad_value.data) return;
        R sum[kOwn] = {};
#pragma unroll 1
        for (int row = 0; row < P::kRows; row += P::kWidth) {
          R grad[P::kWidth];
#pragma unroll
          for (int e = 0; e < P::kWidth; ++e) grad[e] = tiles.grads[(row + e) * P::kPitch + column];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            const Vector weight =
                *reinterpret_cast<const Vector*>(tiles.tile + (group + i * P::kDimGroups) * P::kRowPitch + row);
#pragma unroll
            for (int e = 0; e < P::kWidth; ++e) {
              if (strange && is_hidden(weight.x[e])) continue;
              sum[i] += weight.x[e] * grad[e];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = group + i * P::kDimGroups;
          if (row < own && c0 + column < p.value_size) values[row * p.value_size + c0 + column] += sum[i];
        }
      };
      R gradient[P::kRowsOfThread][P::kKeysOfThread];
      const int level = gradient_tile<P, true>(p, key, tiles, gradient, nullptr, applied, chunk);
      if (!p.grad_key.data) continue;
      __syncthreads();  // the weights are no longer read
#pragma unroll
      for (int i = 0; i < P::kRowsOfThread; ++i)
#pragma unroll
        for (int j = 0; j < P::kKeysOfThread; ++j) {
          tiles.tile[(tx + j * P::kColumnGroups) * P::kRowPitch + ty + i * P::kRowGroups] = gradient[i][j];
        }
      __syncthreads();
      add_slopes_of_tile<P, false>(p, key, level, tiles, keys, nullptr);
    }
  }

  const int64_t key_offset = offset4(p.grad_key, batch, kv_head, key_begin + key, 0);
  const int64_t value_offset = offset4(p.grad_value, batch, kv_head, key_begin + key, 0);
  for (int row = group; row < own; row += P::kDimGroups) {
    for (int64_t d = column; d < p.head_size && p.grad_key.data; d += P::kChunk) {
      store_element(p.grad_key.data, p.grad_key.dtype,
                    key_offset + row * p.grad_key.stride[2] + d * p.grad_key.stride[3], keys[row * p.head_size + d]);
    }
    for (int64_t c = column; c < p.value_size && p.grad_value.data; c += P::kChunk) {
      store_element(p.grad_value.data, p.grad_value.dtype,
                    value_offset + row * p.grad_value.stride[2] + c * p.grad_value.stride[3],
                    values[row * p.value_size + c]);
    }
  }
}

template <class R, bool NARROW>
void launch(const AdditiveCall& p, Stream stream) {
  using P = BackwardPlan<R, NARROW>;
  const char* name = "additive_attention_bwd_key";
  const unsigned grid = checked_grid(p, gradient_blocks<true>(p, P::kKeys), name);
  if (grid == 0) return;
  ATTNFAST_LAUNCH((additive_attention_bwd_key_kernel<R, NARROW>), grid, kAdditiveThreads, P::kBytes, stream, p);
  check_launched(name, p);
}

}  // namespace

void additive_attention_key_bwd(const AdditiveCall& p, void* stream) {
  with_plan(p, [&](auto real, auto narrow) { launch<decltype(real), narrow.value>(p, static_cast<Stream>(stream)); });
}

}  // namespace attnfast::cuda
