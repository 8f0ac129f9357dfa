// The checks of arguments.h.
#include "bindings/arguments.h"

#include <limits>

namespace attnfast {

const dlpack::ExchangeApi* g_exchange_api = nullptr;

namespace {

std::string layout_text(std::initializer_list<Dim> dims) {
  std::string names = "[", sizes = "[";
  for (const Dim& dim : dims) {
    const char* separator = names.size() > 1 ? ", " : "";
    names += separator + std::string(dim.name);
    sizes += separator + (dim.size < 0 ? std::string("any") : std::to_string(dim.size));
  }
  return names + "] = " + sizes + "]";
}

}  // namespace

void check_shape(const TensorView& view, std::initializer_list<Dim> dims) {
  bool good = view.ndim == static_cast<int32_t>(dims.size());
  int i = 0;
  for (const Dim& dim : dims) {
    if (!good) break;
    good = dim.size < 0 || view.size[i] == dim.size;
    ++i;
  }
  if (!good) {
    throw py::value_error(std::string(view.name) + ": expected shape " + layout_text(dims) + ", got " +
                          view.shape_text());
  }
}

void check_dtype(const TensorView& view, DType expected) {
  if (view.dtype == expected) return;
  throw py::type_error(std::string(view.name) + ": expected dtype " + dtype_name(expected) + ", got " +
                       dtype_name(view.dtype));
}

bool is_floating(DType dtype) { return dtype != DType::kBool && dtype != DType::kInt64 && dtype != DType::kInt8; }

void check_floating(const TensorView& view) {
  if (is_floating(view.dtype)) return;
  throw py::type_error(std::string(view.name) + ": expected a floating dtype, got " + dtype_name(view.dtype));
}

void check_contiguous(const TensorView& view) {
  if (view.is_contiguous()) return;
  throw py::value_error(std::string(view.name) + ": expected a contiguous tensor of shape " + view.shape_text());
}

void check_writable(const TensorView& view) {
  if (view.numel() == 0) return;  // torch leaves strides of 0 in empty tensors
  for (int i = 0; i < view.ndim; ++i) {
    if (view.stride[i] == 0 && view.size[i] > 1) {
      throw py::value_error(std::string(view.name) + ": an output cannot be an expanded view (stride 0 in dimension " +
                            std::to_string(i) + " of " + view.shape_text() + ")");
    }
  }
}

void check_buffer(const TensorView& view, DType dtype, std::initializer_list<Dim> dims) {
  check_dtype(view, dtype);
  check_shape(view, dims);
  check_contiguous(view);
}

void reject(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  std::string expected = "an integer >= " + std::to_string(low);
  if (high != std::numeric_limits<int64_t>::max()) expected += " and <= " + std::to_string(high);
  reject(name, expected, std::to_string(value));
}

Tensor4 tensor4(const TensorView& view) {
  Tensor4 tensor;
  tensor.data = view.data;
  tensor.dtype = view.dtype;
  for (int i = 0; i < 4; ++i) tensor.stride[i] = view.stride[i];
  return tensor;
}

}  // namespace attnfast
