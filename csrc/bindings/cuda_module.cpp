// The Python module attnfast._cuda: the functions of attnfast._C for CUDA tensors, queued on torch's current stream of
// their device. Compiled with ATTNFAST_SIMT it is the tests' module _simt instead: the same kernels under the SIMT
// emulator, on CPU tensors.
#include <pybind11/pybind11.h>

#include "bindings/cuda_call.h"
#include "bindings/functions.h"
#if defined(ATTNFAST_SIMT)
#include "simt/simt.h"
#endif

namespace attnfast {
namespace {

PyMethodDef g_functions[] = {
    op_function<dot_attention_workspace>("dot_attention_workspace"),
    op_function<dot_attention_kernel>("dot_attention_kernel"),
    op_function<dot_attention_fwd>("dot_attention_fwd"),
    op_function<dot_attention_bwd>("dot_attention_bwd"),
    op_function<additive_attention_workspace>("additive_attention_workspace"),
    op_function<additive_attention_fwd>("additive_attention_fwd"),
    op_function<additive_attention_bwd>("additive_attention_bwd"),
    op_function<topk_scores_workspace>("topk_scores_workspace"),
    op_function<topk_scores_fwd>("topk_scores_fwd"),
    op_function<weighted_gather_fwd>("weighted_gather_fwd"),
    op_function<weighted_gather_partial_rows>("weighted_gather_partial_rows"),
    op_function<weighted_gather_bwd>("weighted_gather_bwd"),
    op_function<product_keys>("product_keys"),
    {nullptr, nullptr, 0, nullptr},
};

void init(const py::object& exchange_api_capsule) { g_exchange_api = exchange_api_from_capsule(exchange_api_capsule); }

}  // namespace
}  // namespace attnfast

namespace py = pybind11;

#if defined(ATTNFAST_SIMT)
PYBIND11_MODULE(_simt, m, py::mod_gil_not_used()) {
  m.doc() = "attnfast's CUDA kernels under the SIMT emulator, for tests.";
  m.def("set_seed", &attnfast::simt::set_seed, py::arg("seed"));
  m.def("launches", [] { return attnfast::simt::counters().launches; });
  m.def("mma_instructions", [] { return attnfast::simt::counters().mma; });
#else
PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "attnfast's CUDA kernels; see _cuda.pyi. Not a public interface.";
  m.def("build_info", [] {
    py::dict info;
    info["architectures"] = ATTNFAST_CUDA_ARCHITECTURES;
    info["runtime"] = CUDART_VERSION;
    return info;
  });
  m.def("device_count", [] {
    int count = 0;
    attnfast::check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
  });
#endif
  m.def("init", &attnfast::init, py::arg("exchange_api_capsule"));
  if (PyModule_AddFunctions(m.ptr(), attnfast::g_functions) != 0) throw py::error_already_set();
}
