// What every function of attnfast._C does first: reads its arguments by position and checks what a kernel relies on. An
// error names the argument, what was expected and what came.
//
// The op functions take their arguments as CPython hands them over (METH_FASTCALL): naming each argument in its own
// error is then possible, and a small call is not dominated by unpacking.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bindings/tensor_view.h"

namespace attnfast {
namespace py = pybind11;

// Written once, by init.
extern const dlpack::ExchangeApi* g_exchange_api;

class ArgReader {
 public:
  ArgReader(const char* function, PyObject* const* items, Py_ssize_t given, Py_ssize_t count,
            int32_t device_type = dlpack::kCpu)
      : items_(items), device_type_(device_type) {
    if (g_exchange_api == nullptr) {
      throw std::runtime_error("attnfast's binary is not initialised; import attnfast instead of the binary");
    }
    if (given != count) {
      throw py::type_error(std::string(function) + " takes " + std::to_string(count) + " positional arguments, got " +
                           std::to_string(given));
    }
  }

  TensorView optional_tensor(const char* name) {
    PyObject* item = next();
    return item == Py_None ? TensorView() : read(item, name);
  }

  TensorView tensor(const char* name) { return read(next(), name); }

  // Of two numbers that a call brings along, in host memory whatever the device.
  TensorView optional_host_tensor(const char* name) {
    PyObject* item = next();
    return item == Py_None ? TensorView() : read_tensor(g_exchange_api, item, name);
  }

  // The device of the tensors that have been read, which must be one.
  int32_t device() const { return device_ < 0 ? 0 : device_; }

  int64_t integer(const char* name) {
    PyObject* item = next();
    if (!PyIndex_Check(item)) wrong_type(name, "an int", item);
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(item));
    if (!index) throw py::error_already_set();
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) throw py::value_error(std::string(name) + ": does not fit 64 bits");
    return value;
  }

  double number(const char* name) {
    PyObject* item = next();
    if (!PyFloat_Check(item) && !PyIndex_Check(item)) wrong_type(name, "a float", item);
    const double value = PyFloat_AsDouble(item);
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* next() { return items_[position_++]; }

  TensorView read(PyObject* item, const char* name) {
    const TensorView view = read_tensor(g_exchange_api, item, name, device_type_);
    if (device_ < 0) device_ = view.device;
    if (view.device != device_) {
      throw py::value_error(std::string(name) + ": expected a tensor on device " + std::to_string(device_) +
                            ", as the others, got one on device " + std::to_string(view.device));
    }
    return view;
  }

  [[noreturn]] static void wrong_type(const char* name, const char* expected, PyObject* item) {
    throw py::type_error(std::string(name) + ": expected " + expected + ", got " + Py_TYPE(item)->tp_name);
  }

  PyObject* const* items_;
  int32_t device_type_, device_ = -1;
  Py_ssize_t position_ = 0;
};

struct Dim {
  const char* name;
  int64_t size;  // -1: any
};

bool is_floating(DType dtype);

void check_shape(const TensorView& view, std::initializer_list<Dim> dims);
void check_dtype(const TensorView& view, DType expected);
void check_floating(const TensorView& view);
void check_contiguous(const TensorView& view);
// Threads would write the same element: a broadcast view is no place for a result.
void check_writable(const TensorView& view);
// Of this dtype and shape, and contiguous.
void check_buffer(const TensorView& view, DType dtype, std::initializer_list<Dim> dims);
void check_range(const char* name, int64_t value, int64_t low, int64_t high);
[[noreturn]] void reject(const char* name, const std::string& expected, const std::string& got);

Tensor4 tensor4(const TensorView& view);

}  // namespace attnfast
