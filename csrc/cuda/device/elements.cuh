// Elements of tensors by their dtype, and 16-byte vectors of an accumulation type.
#pragma once

#include "core/params.h"
#include "cuda/ptx.cuh"

namespace attnfast::cuda {

// Vectors of 16 bytes in shared memory.
struct alignas(16) Float4 {
  static constexpr int kSize = 4;
  float x[4];
};
struct alignas(16) Double2 {
  static constexpr int kSize = 2;
  double x[2];
};
struct alignas(16) Halves8 {
  uint16_t x[8];
};
template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = Float4;
};
template <>
struct VectorOf<double> {
  using Type = Double2;
};

template <class R>
ATTNFAST_DEVICE R load_element(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<R>(static_cast<const double*>(data)[offset]);
    case DType::kFloat32:
      return static_cast<R>(static_cast<const float*>(data)[offset]);
    case DType::kBFloat16:
      return static_cast<R>(ptx::widen_bf16(static_cast<const uint16_t*>(data)[offset]));
    case DType::kTf32:
      return static_cast<R>(ptx::as_float(ptx::to_tf32(static_cast<const float*>(data)[offset])));
    default:
      return static_cast<R>(ptx::widen_f16(static_cast<const uint16_t*>(data)[offset]));
  }
}

template <class R>
ATTNFAST_DEVICE void store_element(void* data, DType dtype, int64_t offset, R x) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[offset] = static_cast<double>(x);
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[offset] = static_cast<float>(x);
      return;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[offset] = static_cast<uint16_t>(ptx::pack_bf16(static_cast<float>(x), 0.0f));
      return;
    default:
      static_cast<uint16_t*>(data)[offset] = static_cast<uint16_t>(ptx::pack_f16(static_cast<float>(x), 0.0f));
  }
}

}  // namespace attnfast::cuda
