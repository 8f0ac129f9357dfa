// The Python module attnfast._C: its set-up, what it tells about itself, and the table of its functions. Python owns
// every tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace attnfast {
namespace {

void init(const py::object& exchange_api_capsule, uintptr_t parallel_for_address, const py::tuple& probes) {
  const dlpack::ExchangeApi* api = exchange_api_from_capsule(exchange_api_capsule);
  if (parallel_for_address == 0) throw py::value_error("parallel_for_address: expected an address, got 0");
  set_torch_probes(probes);
  select_isa_at_load();
  set_parallel_for(reinterpret_cast<ParallelFor>(parallel_for_address));
  g_exchange_api = api;
}

py::dict cpu_features_dict() {
  py::dict features;
  for (const auto& [name, present] : cpu_features()) features[py::str(name)] = present;
  return features;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ATTNFAST_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["python"] = PY_VERSION;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  info["isas"] = compiled_isas();
  info["sanitizer"] = ATTNFAST_SANITIZE;
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

// ---- Yardsticks -------------------------------------------------------------------------------------------------

double yardstick_fma(int64_t steps) {
  if (steps < 1) throw py::value_error("steps: expected at least 1, got " + std::to_string(steps));
  py::gil_scoped_release release;
  return kernels().yardstick_fma(steps);
}

uint64_t yardstick_read(const py::buffer& memory) {
  const py::buffer_info info = memory.request();
  int64_t contiguous = info.itemsize;
  for (py::ssize_t i = info.ndim; i-- > 0;) {
    if (info.shape[size_t(i)] > 1 && info.strides[size_t(i)] != contiguous)
      throw py::value_error("memory: expected a contiguous buffer");
    contiguous *= info.shape[size_t(i)];
  }
  py::gil_scoped_release release;
  return kernels().yardstick_read(info.ptr, info.size * info.itemsize);
}

PyMethodDef g_op_functions[] = {op_function<dot_attention_fwd>("dot_attention_fwd"),
                                op_function<dot_attention_bwd>("dot_attention_bwd"),
                                op_function<dot_attention_decode_obstacle>("dot_attention_decode_obstacle"),
                                op_function<additive_attention_fwd>("additive_attention_fwd"),
                                op_function<additive_attention_bwd>("additive_attention_bwd"),
                                op_function<additive_attention_decode_obstacle>("additive_attention_decode_obstacle"),
                                op_function<topk_scores_fwd>("topk_scores_fwd"),
                                op_function<weighted_gather_fwd>("weighted_gather_fwd"),
                                op_function<weighted_gather_bwd>("weighted_gather_bwd"),
                                op_function<product_keys>("product_keys"),
                                op_function<ordinary_call>("ordinary_call"),
                                op_function<ordinary_gradient>("ordinary_gradient"),
                                {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace attnfast

// The functions keep no state but what init writes once and an atomic pointer.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "attnfast's kernels; see _C.pyi. Not a public interface.";
  m.def("init", &attnfast::init, py::arg("exchange_api_capsule"), py::arg("parallel_for_address"), py::arg("probes"));
  if (PyModule_AddFunctions(m.ptr(), attnfast::g_op_functions) != 0) throw py::error_already_set();
  m.def("whole_row_keys", [] { return attnfast::kWholeRowKeys; });
  m.def("set_isa", &attnfast::set_isa, py::arg("name"));
  m.def("get_isa", [] { return attnfast::kernels().name; });
  m.def("available_isas", &attnfast::available_isas);
  m.def("compiled_isas", &attnfast::compiled_isas);
  m.def("cpu_features", &attnfast::cpu_features_dict);
  m.def("build_info", &attnfast::build_info);
  m.def("yardstick_fma", &attnfast::yardstick_fma, py::arg("steps"));
  m.def("yardstick_read", &attnfast::yardstick_read, py::arg("memory"));
}
