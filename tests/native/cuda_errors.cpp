// Launches that cannot succeed, on the real CUDA runtime: prints what each throws, one line each, for
// tools/cuda_module.py to look at. Without a driver every launch fails, be it when shared memory is asked for or when
// the kernel is queued; where there is a GPU only a grid that is too large is tried.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>
#include <initializer_list>

#include "cuda/dot_attention.h"

namespace {

using attnfast::DotAttentionParams;
using attnfast::DType;

bool report(DType dtype, int64_t tokens, int64_t size) {
  DotAttentionParams p;
  p.batch = 2;
  p.heads = 4;
  p.kv_heads = 2;
  p.query_tokens = tokens;
  p.key_tokens = 5;
  p.head_size = p.value_size = size;
  for (attnfast::Tensor4* x : {&p.query, &p.key, &p.value, &p.out}) {
    x->dtype = dtype;
    x->stride[3] = 1;
  }
  try {
    attnfast::cuda::dot_attention_fwd(p, nullptr, nullptr);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return true;
  }
  std::fprintf(stderr, "a launch of %lld queries with D = %lld succeeded\n", static_cast<long long>(tokens),
               static_cast<long long>(size));
  return false;
}

}  // namespace

int main() {
  int devices = 0;
  const bool gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  static_cast<void>(cudaGetLastError());
  bool failed = report(DType::kFloat32, int64_t{1} << 40, 64);
  failed = report(DType::kBFloat16, int64_t{1} << 40, 64) && failed;
  if (!gpu) {
    for (int64_t size : {64, 128, 256}) {
      for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        failed = report(dtype, 3, size) && failed;
      }
    }
  }
  return failed ? 0 : 1;
}
