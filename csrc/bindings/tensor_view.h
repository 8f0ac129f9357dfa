// A torch tensor seen without torch: pointer, sizes, strides in elements, dtype, device, borrowed through the C table
// torch.Tensor.__dlpack_c_exchange_api__ (torch >= 2.10). Nothing is copied and no reference is taken, so a view lives
// only while the caller holds the tensor. The structs below follow the DLPack 1.x ABI (https://dmlc.github.io/dlpack).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/params.h"

namespace attnfast {
namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint32_t kMajorVersion = 1;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* prev_api;
};

// Functions that are not used here are declared as plain pointers; only their place counts.
struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

static_assert(sizeof(Tensor) == 48 && sizeof(DataType) == 4 && sizeof(ExchangeApi) == 56);

}  // namespace dlpack

// A tensor argument and its name, for messages. An absent (None) argument has no name set and converts to false.
struct TensorView {
  const char* name = nullptr;
  void* data = nullptr;
  int32_t ndim = 0;
  DType dtype = DType::kFloat32;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;
  int32_t device = 0;  // its number among those of its kind

  explicit operator bool() const { return name != nullptr; }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= size[i];
    return count;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (size[i] == 0) return true;
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
    return text + "]";
  }
};

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "bool", "int64", "int8"};
  return kNames[static_cast<int>(dtype)];
}

// Reads the table from torch's capsule; walks to an older version where torch's newest is beyond what is known here.
inline const dlpack::ExchangeApi* exchange_api_from_capsule(const pybind11::object& capsule) {
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) throw pybind11::error_already_set();
  auto* header = static_cast<const dlpack::ExchangeHeader*>(pointer);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  if (header == nullptr) {
    throw std::runtime_error("torch.Tensor.__dlpack_c_exchange_api__ offers no DLPack 1.x table");
  }
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("torch.Tensor.__dlpack_c_exchange_api__ lacks dltensor_from_py_object_no_sync");
  }
  return api;
}

// The reason why torch refused, taken out of the pending Python error; the rest of its text is a C++ stack trace.
inline std::string take_python_error() {
  const pybind11::error_already_set error;
  const std::string text = pybind11::str(error.value()).cast<std::string>();
  return text.substr(0, text.find('\n'));
}

inline bool read_dtype(dlpack::DataType type, DType* out) {
  if (type.lanes != 1) return false;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 64:
      *out = DType::kFloat64;
      return true;
    case dlpack::kFloat << 8 | 32:
      *out = DType::kFloat32;
      return true;
    case dlpack::kBfloat << 8 | 16:
      *out = DType::kBFloat16;
      return true;
    case dlpack::kFloat << 8 | 16:
      *out = DType::kFloat16;
      return true;
    case dlpack::kBool << 8 | 8:
      *out = DType::kBool;
      return true;
    case dlpack::kInt << 8 | 64:
      *out = DType::kInt64;
      return true;
    case dlpack::kInt << 8 | 8:
      *out = DType::kInt8;
      return true;
    default:
      return false;
  }
}

// Fills a view, or throws TypeError / ValueError naming the argument. The object must not be None. `device_type` is the
// kind of device that the kernels of this module run on.
inline TensorView read_tensor(const dlpack::ExchangeApi* api, PyObject* object, const char* name,
                              int32_t device_type = dlpack::kCpu) {
  const char* kind = device_type == dlpack::kCpu ? "CPU" : "CUDA";
  dlpack::Tensor tensor;
  if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    // torch says only that a cast failed; for tensors (sparse, quantized, ...) its reason is worth passing on.
    const std::string type = Py_TYPE(object)->tp_name;
    const std::string reason = take_python_error();
    const bool is_tensor = pybind11::hasattr(object, "layout");
    throw pybind11::type_error(std::string(name) + ": expected a dense " + kind + " tensor, got " + type +
                               (is_tensor ? " (" + reason + ")" : ""));
  }
  if (tensor.device.type != device_type) {
    throw pybind11::type_error(std::string(name) + ": expected a " + kind + " tensor, got one on DLPack device type " +
                               std::to_string(tensor.device.type));
  }
  TensorView view;
  view.name = name;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  view.size = tensor.shape;
  view.stride = tensor.strides;
  view.device = tensor.device.id;
  if (!read_dtype(tensor.dtype, &view.dtype)) {
    throw pybind11::type_error(std::string(name) + ": expected dtype float64, float32, bfloat16, float16, bool, " +
                               "int64 or int8, got DLPack type code " + std::to_string(tensor.dtype.code) + " with " +
                               std::to_string(tensor.dtype.bits) + " bits");
  }
  if (tensor.data == nullptr && view.numel() > 0) {
    throw pybind11::value_error(std::string(name) + ": the tensor has no storage (shape " + view.shape_text() + ")");
  }
  return view;
}

}  // namespace attnfast
