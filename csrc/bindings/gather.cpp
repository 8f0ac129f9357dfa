// The weighted gather and the merge of product keys: reads the arguments, fills the parameters, releases the GIL and
// calls the kernel of the chosen ISA.
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "core/gather_params.h"
#include "cpu/isa.h"

namespace attnfast {
namespace {

struct GatherCall {
  WeightedGatherParams params;
  DType real = DType::kFloat32;
  int64_t bad_position = std::numeric_limits<int64_t>::max();

  GatherCall(const TensorView& indices, const TensorView& weights, const TensorView& values, const TensorView& scales) {
    check_dtype(indices, DType::kInt64);
    check_shape(indices, {{"B", -1}, {"K", -1}});
    check_contiguous(indices);
    if (values.dtype != DType::kInt8) check_floating(values);
    check_shape(values, {{"N", -1}, {"D_v", -1}});
    real = values.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    params.outputs = indices.size[0];
    params.picks = indices.size[1];
    params.slots = values.size[0];
    params.value_size = values.size[1];
    check_buffer(weights, real, {{"B", params.outputs}, {"K", params.picks}});
    if (static_cast<bool>(scales) != (values.dtype == DType::kInt8)) {
      reject("scales", scales ? "None without values in int8" : "a tensor [N] with values in int8",
             scales ? "a tensor" : "None");
    }
    if (scales) {
      check_buffer(scales, DType::kFloat32, {{"N", params.slots}});
      params.scales = static_cast<const float*>(scales.data);
    }
    params.indices = static_cast<const int64_t*>(indices.data);
    params.weights = weights.data;
    params.values = values.data;
    params.values_dtype = values.dtype;
    for (int i = 0; i < 2; ++i) params.values_stride[i] = values.stride[i];
    params.bad_position = &bad_position;
  }
  GatherCall(const GatherCall&) = delete;

  void check_indices() const {
    if (bad_position == std::numeric_limits<int64_t>::max()) return;
    const std::string size = std::to_string(params.slots);
    reject("indices", "slots in [0, N) = [0, " + size + ") or -1 for none",
           std::to_string(params.indices[bad_position]) + " as pick " + std::to_string(bad_position % params.picks) +
               " of row " + std::to_string(bad_position / params.picks));
  }
};

void set_result(const TensorView& view, DType dtype, std::initializer_list<Dim> dims, void** data) {
  check_buffer(view, dtype, dims);
  check_writable(view);
  *data = view.data;
}

// Sorts, makes room for the gradient of the values and forms the sums.
void differentiate_values(GatherCall& call, const TensorView& grad_values, PyObject* allocate) {
  WeightedGatherParams& p = call.params;
  if (!gather_fits(p)) {
    reject("indices", "so few elements that a slot and a position fit 64 bits",
           std::to_string(p.outputs * p.picks) + " of " + std::to_string(p.slots) + " slots");
  }
  const int64_t count = p.outputs * p.picks, chunks = (count + kGatherChunk - 1) / kGatherChunk;
  const std::unique_ptr<uint64_t[]> sorted(new uint64_t[static_cast<size_t>(2 * count)]);
  const std::unique_ptr<int64_t[]> chunk_starts(new int64_t[static_cast<size_t>(chunks + 1)]);
  p.sorted = sorted.get();
  p.chunk_starts = chunk_starts.get();
  int64_t different = 0;
  {
    const py::gil_scoped_release no_gil;
    different = kernels().weighted_gather_sort(p);
  }
  call.check_indices();
  py::object made;  // keeps what is allocated alive
  if (grad_values) {
    set_result(grad_values, p.values_dtype, {{"N", p.slots}, {"D_v", p.value_size}}, &p.grad_values);
  } else {
    made = py::reinterpret_steal<py::object>(PyObject_CallFunction(allocate, "L", static_cast<long long>(different)));
    if (!made) throw py::error_already_set();
    if (!PyTuple_Check(made.ptr()) || PyTuple_GET_SIZE(made.ptr()) != 2) {
      throw py::type_error("allocate: expected to return a tuple (rows, grad_values)");
    }
    const TensorView rows = read_tensor(g_exchange_api, PyTuple_GET_ITEM(made.ptr(), 0), "rows");
    const TensorView sums = read_tensor(g_exchange_api, PyTuple_GET_ITEM(made.ptr(), 1), "grad_values");
    void* numbers = nullptr;
    set_result(rows, DType::kInt64, {{"slots that occur", different}}, &numbers);
    set_result(sums, p.values_dtype, {{"slots that occur", different}, {"D_v", p.value_size}}, &p.grad_values);
    p.grad_rows = static_cast<int64_t*>(numbers);
  }
  if (p.grad_values == nullptr) p.grad_values = &different;  // no columns: there is nothing to write, but rows to name
  // Doubles, so that either type fits. Only what chunks cut is ever touched.
  const std::unique_ptr<double[]> partial_sums(new double[static_cast<size_t>(2 * chunks * p.value_size)]);
  p.partial_sums = partial_sums.get();
  const py::gil_scoped_release no_gil;
  if (different > 0 || p.grad_weights != nullptr) kernels().weighted_gather_bwd(p);
}

}  // namespace

py::object weighted_gather_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_fwd", items, given, 5);
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView out = args.tensor("out");
  GatherCall call(indices, weights, values, scales);
  if (out.dtype != DType::kBFloat16 && out.dtype != DType::kFloat16) check_dtype(out, call.real);
  set_result(out, out.dtype, {{"B", call.params.outputs}, {"D_v", call.params.value_size}}, &call.params.out);
  call.params.out_dtype = out.dtype;
  {
    const py::gil_scoped_release no_gil;
    kernels().weighted_gather_fwd(call.params);
  }
  call.check_indices();
  return py::none();
}

py::object weighted_gather_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("weighted_gather_bwd", items, given, 8);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView indices = args.tensor("indices");
  const TensorView weights = args.tensor("weights");
  const TensorView values = args.tensor("values");
  const TensorView scales = args.optional_tensor("scales");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView grad_values = args.optional_tensor("grad_values");
  PyObject* const allocate = items[7];
  GatherCall call(indices, weights, values, scales);
  WeightedGatherParams& p = call.params;
  check_buffer(grad_out, call.real, {{"B", p.outputs}, {"D_v", p.value_size}});
  p.grad_out = grad_out.data;
  if (grad_weights) set_result(grad_weights, call.real, {{"B", p.outputs}, {"K", p.picks}}, &p.grad_weights);
  if (grad_values || allocate != Py_None) {
    if (values.dtype == DType::kInt8) reject("grad_values", "None for values in int8", "a tensor");
    if (grad_values && allocate != Py_None) reject("allocate", "None with grad_values", "a function");
    differentiate_values(call, grad_values, allocate);
  } else if (p.grad_weights != nullptr) {
    {
      const py::gil_scoped_release no_gil;
      kernels().weighted_gather_bwd(p);
    }
    call.check_indices();
  }
  return py::none();
}

py::object product_keys(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("product_keys", items, given, 8);
  ProductKeysParams p;
  const char* names[2][3] = {{"row_scores", "row_indices", "row_ranks"},
                             {"column_scores", "column_indices", "column_ranks"}};
  TensorView scores[2], indices[2];
  for (int i = 0; i < 2; ++i) {
    scores[i] = args.tensor(names[i][0]);
    indices[i] = args.tensor(names[i][1]);
  }
  p.side = args.integer("side");
  const TensorView slots = args.tensor("slots");
  const TensorView ranks[2] = {args.tensor(names[0][2]), args.tensor(names[1][2])};

  p.dtype = scores[0].dtype;
  if (p.dtype != DType::kFloat64) check_dtype(scores[0], DType::kFloat32);
  check_shape(scores[0], {{"B", -1}, {"candidates", -1}});
  p.rows = scores[0].size[0];
  p.candidates = scores[0].size[1];
  for (int i = 0; i < 2; ++i) {
    check_buffer(scores[i], p.dtype, {{"B", p.rows}, {"candidates", p.candidates}});
    check_buffer(indices[i], DType::kInt64, {{"B", p.rows}, {"candidates", p.candidates}});
    p.scores[i] = scores[i].data;
    p.indices[i] = static_cast<const int64_t*>(indices[i].data);
  }
  check_shape(slots, {{"B", p.rows}, {"k", -1}});
  p.picks = slots.size[1];
  if (p.picks > 0 && (p.candidates == 0 || (p.picks - 1) / p.candidates >= p.candidates)) {
    reject("slots", "k <= candidates^2 with " + std::to_string(p.candidates) + " candidates", std::to_string(p.picks));
  }
  void* data = nullptr;
  set_result(slots, DType::kInt64, {{"B", p.rows}, {"k", p.picks}}, &data);
  p.slots = static_cast<int64_t*>(data);
  for (int i = 0; i < 2; ++i) {
    set_result(ranks[i], DType::kInt64, {{"B", p.rows}, {"k", p.picks}}, &data);
    p.ranks[i] = static_cast<int64_t*>(data);
  }
  const py::gil_scoped_release no_gil;
  kernels().product_keys(p);
  return py::none();
}

}  // namespace attnfast
