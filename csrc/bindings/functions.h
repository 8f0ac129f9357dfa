// The functions of attnfast._C that are not plain pybind11 ones, each with its arguments as CPython hands them over.
// _C.pyi documents them.
#pragma once

#include <pybind11/pybind11.h>

namespace attnfast {

using OpFunction = pybind11::object(PyObject* const* items, Py_ssize_t given);

OpFunction dot_attention_fwd, dot_attention_bwd, dot_attention_decode_obstacle;
OpFunction additive_attention_fwd, additive_attention_bwd, additive_attention_decode_obstacle;
OpFunction topk_scores_fwd, topk_scores_bwd;
OpFunction weighted_gather_fwd, weighted_gather_bwd, product_keys;
OpFunction ordinary_call, ordinary_gradient;

// The objects that ordinary_call and ordinary_gradient ask about a call, in the order of TorchProbes; kept for ever.
void set_torch_probes(const pybind11::tuple& probes);

}  // namespace attnfast
