// The memory functions: reads the arguments, checks everything a kernel relies on, fills the parameters, releases the
// GIL and calls the kernel of the chosen ISA. One section a function.
#include <cstdint>
#include <limits>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/memory_call.h"
#include "cpu/isa.h"

namespace attnfast {

// ---- topk_scores ------------------------------------------------------------------------------------------------

py::object topk_scores_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("topk_scores_fwd", items, given, 8);
  TopkParams params;
  read_topk(args, params);
  const int64_t threads = args.integer("threads");
  check_range("threads", threads, 1, std::numeric_limits<int32_t>::max());
  params.threads = static_cast<int32_t>(threads);

  const KernelTable& table = kernels();
  params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.topk_scores_fwd(params);
  }
  return py::none();
}

}  // namespace attnfast
