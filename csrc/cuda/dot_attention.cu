// Which kernels take a forward of the dot core, and how it is cut into blocks.
#include "cuda/dot_attention.h"

#include "cuda/device/mma_tiles.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int64_t kBlocks = 256;     // about as many as a large GPU runs at once
constexpr int64_t kRangeKeys = 256;  // at least so many keys in a range: a block has to be worth its start
constexpr int64_t kTile = 64;        // of queries and keys, for counting; a multiple of every kernel's

Parts parts_of(const DotAttentionParams& p) {
  Parts parts;
  parts.rows = p.batch * p.heads * p.query_tokens;
  if (p.cu_seqlens_q || parts.rows == 0) return parts;  // of packed sequences the host knows no lengths
  if (p.query_tokens == 1) parts.group = p.heads / p.kv_heads;
  const int64_t blocks = p.batch * p.heads / parts.group * ((p.query_tokens * parts.group + kTile - 1) / kTile);
  const int64_t wanted = (kBlocks + blocks - 1) / blocks, possible = p.key_tokens / kRangeKeys;
  const int64_t splits = wanted < possible ? wanted : possible;
  if (splits < 2) return parts;
  const int64_t tiles = (p.key_tokens + kTile - 1) / kTile;
  parts.share = (tiles + splits - 1) / splits * kTile;
  parts.splits = (p.key_tokens + parts.share - 1) / parts.share;
  return parts;
}

// One query for each head and shared key heads: the heads of a group become the rows of a tile, and keys are read once
// for all of them. Whatever is contiguous [B, H, T_q] stays what it is.
DotAttentionParams with_grouped_heads(const DotAttentionParams& params, int64_t group) {
  DotAttentionParams p = params;
  for (Tensor4* t : {&p.query, &p.out, &p.mask, &p.bias[0], &p.bias[1]}) {
    t->stride[2] = t->stride[1];
    t->stride[1] *= group;
  }
  p.window_bounds_stride[2] = p.window_bounds_stride[1];
  p.window_bounds_stride[1] *= group;
  p.heads = p.kv_heads;
  p.query_tokens = group;
  return p;
}

}  // namespace

DotAttentionParams with_rounded_operands(const DotAttentionParams& params) {
  DotAttentionParams p = params;
  const int64_t chunk = mma_chunk(DType::kTf32);
  if (p.tf32 && p.query.dtype == DType::kFloat32 && mma_has_sizes(p) && rows_are_aligned(p.query, p.head_size, chunk) &&
      rows_are_aligned(p.key, p.head_size, chunk) && rows_are_aligned(p.value, p.value_size, chunk)) {
    p.query.dtype = p.key.dtype = p.value.dtype = DType::kTf32;
  }
  return p;
}

const char* dot_attention_kernel_name(const DotAttentionParams& params) {
  return dot_attention_mma_takes(with_rounded_operands(params)) ? "dot_attention_mma" : "dot_attention_fma";
}

int64_t dot_attention_workspace(const DotAttentionParams& p) {
  const Parts parts = parts_of(p);
  return parts.splits > 1 ? parts.splits * parts.rows * (p.value_size + 2) : 0;
}

void dot_attention_fwd(const DotAttentionParams& given, void* workspace, void* stream) {
  if (given.batch == 0 || given.heads == 0) return;
  const DotAttentionParams params = with_rounded_operands(given);
  if (params.query_tokens > 0) {
    Parts parts = parts_of(params);
    parts.partial = workspace;
    const DotAttentionParams p = parts.group > 1 ? with_grouped_heads(params, parts.group) : params;
    if (dot_attention_mma_takes(p))
      dot_attention_mma_fwd(p, parts, stream);
    else
      dot_attention_fma_fwd(p, parts, stream);
    if (parts.splits > 1) attention_merge(params, parts, stream);
  }
  if (params.weights_mode != WeightsMode::kNone) dot_attention_weights(params, stream);
}

}  // namespace attnfast::cuda
