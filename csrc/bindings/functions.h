// The functions of attnfast._C that are not plain pybind11 ones, each with its arguments as CPython hands them over.
// _C.pyi documents them, and _cuda.pyi those of attnfast._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>

namespace attnfast {

using OpFunction = pybind11::object(PyObject* const* items, Py_ssize_t given);

OpFunction dot_attention_fwd, dot_attention_bwd, dot_attention_decode_obstacle;
OpFunction additive_attention_fwd, additive_attention_bwd, additive_attention_decode_obstacle;
OpFunction topk_scores_fwd, weighted_gather_fwd, weighted_gather_bwd, product_keys;
OpFunction ordinary_call, ordinary_gradient;
// Of attnfast._cuda alone.
OpFunction dot_attention_kernel, dot_attention_workspace, additive_attention_workspace, topk_scores_workspace,
    weighted_gather_partial_rows;

// The objects that ordinary_call and ordinary_gradient ask about a call, in the order of TorchProbes; kept for ever.
void set_torch_probes(const pybind11::tuple& probes);

// CPython's entry of an op function; exceptions become Python's as pybind11 would make them.
template <OpFunction* FUNCTION>
PyObject* entry(PyObject*, PyObject* const* items, Py_ssize_t given) {
  try {
    return FUNCTION(items, given).release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <OpFunction* FUNCTION>
PyMethodDef op_function(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<FUNCTION>)), METH_FASTCALL, nullptr};
}

}  // namespace attnfast
