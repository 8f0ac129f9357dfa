// The Python module attnfast._C: one function per op. Reads the arguments, checks everything a kernel relies on, fills
// the parameter struct, releases the GIL and calls the kernel of the chosen ISA. Python owns every tensor.
//
// The op functions take their arguments as CPython hands them over (METH_FASTCALL) and read them by position: naming
// each argument in its own error is then possible, and a small call is not dominated by unpacking.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace attnfast {
namespace {

const dlpack::ExchangeApi* g_exchange_api = nullptr;

// ---- Reading ----------------------------------------------------------------------------------------------------

class ArgReader {
 public:
  ArgReader(const char* function, PyObject* const* items, Py_ssize_t given, Py_ssize_t count) : items_(items) {
    if (g_exchange_api == nullptr) {
      throw std::runtime_error("attnfast._C is not initialised; import attnfast instead of attnfast._C");
    }
    if (given != count) {
      throw py::type_error(std::string(function) + " takes " + std::to_string(count) + " positional arguments, got " +
                           std::to_string(given));
    }
  }

  TensorView optional_tensor(const char* name) {
    PyObject* item = next();
    return item == Py_None ? TensorView() : read_tensor(g_exchange_api, item, name);
  }

  TensorView tensor(const char* name) { return read_tensor(g_exchange_api, next(), name); }

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

  [[noreturn]] static void wrong_type(const char* name, const char* expected, PyObject* item) {
    throw py::type_error(std::string(name) + ": expected " + expected + ", got " + Py_TYPE(item)->tp_name);
  }

  PyObject* const* items_;
  Py_ssize_t position_ = 0;
};

// ---- Checking ---------------------------------------------------------------------------------------------------

struct Dim {
  const char* name;
  int64_t size;  // -1: any
};

std::string layout_text(std::initializer_list<Dim> dims) {
  std::string names = "[", sizes = "[";
  for (const Dim& dim : dims) {
    const char* separator = names.size() > 1 ? ", " : "";
    names += separator + std::string(dim.name);
    sizes += separator + (dim.size < 0 ? std::string("any") : std::to_string(dim.size));
  }
  return names + "] = " + sizes + "]";
}

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

bool is_floating(DType dtype) { return dtype != DType::kBool && dtype != DType::kInt64; }

void check_floating(const TensorView& view) {
  if (is_floating(view.dtype)) return;
  throw py::type_error(std::string(view.name) + ": expected a floating dtype, got " + dtype_name(view.dtype));
}

void check_contiguous(const TensorView& view) {
  if (view.is_contiguous()) return;
  throw py::value_error(std::string(view.name) + ": expected a contiguous tensor of shape " + view.shape_text());
}

// Threads would write the same element: a broadcast view is no place for a result.
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

[[noreturn]] void reject(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  std::string expected = "an integer >= " + std::to_string(low);
  if (high != std::numeric_limits<int64_t>::max()) expected += " and <= " + std::to_string(high);
  reject(name, expected, std::to_string(value));
}

// ---- From views to parameters -----------------------------------------------------------------------------------

Tensor4 tensor4(const TensorView& view) {
  Tensor4 tensor;
  tensor.data = view.data;
  tensor.dtype = view.dtype;
  for (int i = 0; i < 4; ++i) tensor.stride[i] = view.stride[i];
  return tensor;
}

// The arguments that forward and backward share, in the order in which both list them.
struct Modifiers {
  TensorView mask, bias[2], query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sink, seed;

  void read(ArgReader& args, AttentionParams& params, double* scale) {
    mask = args.optional_tensor("mask");
    bias[0] = args.optional_tensor("bias");
    bias[1] = args.optional_tensor("bias2");
    query_lengths = args.optional_tensor("query_lengths");
    key_lengths = args.optional_tensor("key_lengths");
    cu_seqlens_q = args.optional_tensor("cu_seqlens_q");
    cu_seqlens_k = args.optional_tensor("cu_seqlens_k");
    alibi_slopes = args.optional_tensor("alibi_slopes");
    sink = args.optional_tensor("sink");
    seed = args.optional_tensor("seed");
    if (scale != nullptr) *scale = args.number("scale");
    params.softcap = args.number("softcap");
    params.dropout_p = args.number("dropout_p");
    params.causal = causal(args.integer("causal"));
    params.window_left = args.integer("window_left");
    params.window_right = args.integer("window_right");
  }

 private:
  static Causal causal(int64_t value) {
    check_range("causal", value, 0, 2);
    return static_cast<Causal>(value);
  }
};

// One checked call: the parameters and what they point to beside the tensors.
template <class Params>
struct CallOf {
  Params params;
  DType dtype = DType::kFloat32;
  DType real = DType::kFloat32;
  int64_t rows_batch = 0;  // the first dimension of the tensors: B, or 1 for packed input
  // Copies: a kernel runs without the GIL, and a length that another thread changes after the check must do no harm.
  std::vector<int64_t> query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k;

  void set_inputs(const TensorView& query, const TensorView& key, const TensorView& value) {
    check_floating(query);
    check_shape(query, {{"B", -1}, {"H", -1}, {"T_q", -1}, {"D", -1}});
    dtype = query.dtype;
    real = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    check_dtype(key, dtype);
    check_shape(key, {{"B", query.size[0]}, {"H_kv", -1}, {"T_k", -1}, {"D", query.size[3]}});
    check_dtype(value, dtype);
    check_shape(value, {{"B", query.size[0]}, {"H_kv", key.size[1]}, {"T_k", key.size[2]}, {"D_v", -1}});
    rows_batch = params.batch = query.size[0];
    params.heads = query.size[1];
    params.kv_heads = key.size[1];
    params.query_tokens = query.size[2];
    params.key_tokens = key.size[2];
    params.head_size = query.size[3];
    params.value_size = value.size[3];
    if (params.heads != params.kv_heads &&
        (params.heads == 0 || params.kv_heads == 0 || params.heads % params.kv_heads != 0)) {
      reject("key", "H_kv dividing H = " + std::to_string(params.heads), std::to_string(params.kv_heads));
    }
    params.query = tensor4(query);
    params.key = tensor4(key);
    params.value = tensor4(value);
  }

  void set_modifiers(const Modifiers& given) {
    if (given.mask) {
      check_dtype(given.mask, DType::kBool);
      check_scores_shape(given.mask);
      params.mask = tensor4(given.mask);
    }
    for (int i = 0; i < 2; ++i) {
      if (!given.bias[i]) continue;
      check_floating(given.bias[i]);
      check_scores_shape(given.bias[i]);
      params.bias[i] = tensor4(given.bias[i]);
    }
    set_packing(given);
    params.query_lengths = set_lengths(given.query_lengths, "T_q", params.query_tokens, query_lengths);
    params.key_lengths = set_lengths(given.key_lengths, "T_k", params.key_tokens, key_lengths);
    if (given.alibi_slopes) {
      check_dtype(given.alibi_slopes, real);
      check_shape(given.alibi_slopes, {{"B", params.batch}, {"H", params.heads}});
      params.alibi_slopes = given.alibi_slopes.data;
      for (int i = 0; i < 2; ++i) params.alibi_stride[i] = given.alibi_slopes.stride[i];
    }
    if (given.sink) {
      check_buffer(given.sink, real, {{"H", params.heads}});
      params.sink = given.sink.data;
    }
    if (!(params.softcap >= 0.0) || std::isinf(params.softcap)) {
      reject("softcap", "a finite float >= 0", std::to_string(params.softcap));
    }
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    check_range("window_left", params.window_left, -1, kMax);
    check_range("window_right", params.window_right, -1, kMax);
    set_dropout(given.seed);
  }

  void check_rows_buffer(const TensorView& view, DType type) const {
    check_buffer(view, type, {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}});
  }

  void check_scores_shape(const TensorView& view) const {
    check_shape(view,
                {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"T_k", params.key_tokens}});
  }

  void check_out_shape(const TensorView& view) const {
    check_dtype(view, dtype);
    check_shape(view,
                {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"D_v", params.value_size}});
  }

  // The weights or their gradient, which have one layout; the reduced forms are seen as [B, H, 1, T_k], [B, H, T_q, 1].
  Tensor4 weights_view(const TensorView& view) const {
    if (params.weights_mode == WeightsMode::kFull) {
      check_dtype(view, dtype);
      check_scores_shape(view);
      return tensor4(view);
    }
    const bool column_sum = params.weights_mode == WeightsMode::kColumnSum;
    check_dtype(view, real);
    check_shape(view, {{"B", rows_batch},
                       {"H", params.heads},
                       {column_sum ? "T_k" : "T_q", column_sum ? params.key_tokens : params.query_tokens}});
    Tensor4 tensor;
    tensor.data = view.data;
    tensor.dtype = view.dtype;
    tensor.stride[0] = view.stride[0];
    tensor.stride[1] = view.stride[1];
    tensor.stride[column_sum ? 3 : 2] = view.stride[2];
    return tensor;
  }

  // What a forward writes.
  void set_results(const TensorView& out, const TensorView& lse, const TensorView& weights, const TensorView& index,
                   int64_t mode) {
    check_out_shape(out);
    check_writable(out);
    params.out = tensor4(out);
    if (lse) {
      check_rows_buffer(lse, real);
      params.lse = lse.data;
    } else if (weights) {
      reject("lse", "a tensor, because weights are asked for", "None");
    }
    set_weights("weights", weights, index, mode);
    if (weights) {
      params.weights = weights_view(weights);
      check_writable(weights);
    }
  }

  // What a backward writes for query, key and value.
  void set_gradients(const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value) {
    if (grad_query) {
      check_dtype(grad_query, dtype);
      check_shape(grad_query,
                  {{"B", rows_batch}, {"H", params.heads}, {"T_q", params.query_tokens}, {"D", params.head_size}});
      check_writable(grad_query);
      params.grad_query = tensor4(grad_query);
    }
    if (grad_key) {
      check_dtype(grad_key, dtype);
      check_shape(grad_key,
                  {{"B", rows_batch}, {"H_kv", params.kv_heads}, {"T_k", params.key_tokens}, {"D", params.head_size}});
      check_writable(grad_key);
      params.grad_key = tensor4(grad_key);
    }
    if (grad_value) {
      check_dtype(grad_value, dtype);
      check_shape(
          grad_value,
          {{"B", rows_batch}, {"H_kv", params.kv_heads}, {"T_k", params.key_tokens}, {"D_v", params.value_size}});
      check_writable(grad_value);
      params.grad_value = tensor4(grad_value);
    }
  }

  // What a backward writes for biases and sink; after set_modifiers.
  void set_modifier_gradients(const Modifiers& given, const TensorView (&grad_bias)[2], const TensorView& grad_sink) {
    for (int i = 0; i < 2; ++i) {
      if (!grad_bias[i]) continue;
      if (!given.bias[i]) reject(grad_bias[i].name, "None without its bias", "a tensor");
      check_dtype(grad_bias[i], real);
      check_scores_shape(grad_bias[i]);
      params.grad_bias[i] = tensor4(grad_bias[i]);
    }
    if (grad_sink) {
      if (!given.sink) reject("grad_sink", "None without sink", "a tensor");
      check_buffer(grad_sink, real, {{"H", params.heads}});
      params.grad_sink = grad_sink.data;
    }
  }

  void set_threads(int64_t threads) {
    check_range("threads", threads, 1, std::numeric_limits<int32_t>::max());
    params.threads = static_cast<int32_t>(threads);
  }

  // `weights` is the forward's output or the backward's grad_weights: there exactly when the mode asks for it.
  void set_weights(const char* name, const TensorView& weights, const TensorView& index, int64_t mode) {
    check_range("weights_mode", mode, 0, 3);
    params.weights_mode = static_cast<WeightsMode>(mode);
    if (static_cast<bool>(weights) != (mode != 0)) {
      reject(name, mode != 0 ? "a tensor" : "None",
             (mode != 0 ? "None with weights_mode = " : "a tensor with weights_mode = ") + std::to_string(mode));
    }
    const bool wants_index = params.weights_mode == WeightsMode::kRowMax;
    if (static_cast<bool>(index) != wants_index) {
      reject("weights_index", wants_index ? "a tensor" : "None",
             (wants_index ? "None with weights_mode = " : "a tensor with weights_mode = ") + std::to_string(mode));
    }
    if (wants_index) {
      check_rows_buffer(index, DType::kInt64);
      params.weights_index = static_cast<int64_t*>(index.data);
    }
  }

 private:
  void set_packing(const Modifiers& given) {
    if (static_cast<bool>(given.cu_seqlens_q) != static_cast<bool>(given.cu_seqlens_k)) {
      const char* missing = given.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q";
      reject(missing, "both cu_seqlens_q and cu_seqlens_k or neither", "None");
    }
    if (!given.cu_seqlens_q) return;
    if (rows_batch != 1) reject("query", "B = 1 for packed input (cu_seqlens given)", std::to_string(rows_batch));
    copy_offsets(given.cu_seqlens_q, "T_q", params.query_tokens, cu_seqlens_q);
    copy_offsets(given.cu_seqlens_k, "T_k", params.key_tokens, cu_seqlens_k);
    if (cu_seqlens_q.size() != cu_seqlens_k.size()) {
      reject("cu_seqlens_k", "N + 1 = " + std::to_string(cu_seqlens_q.size()) + " elements, as cu_seqlens_q",
             std::to_string(cu_seqlens_k.size()));
    }
    params.batch = static_cast<int64_t>(cu_seqlens_q.size()) - 1;
    params.cu_seqlens_q = cu_seqlens_q.data();
    params.cu_seqlens_k = cu_seqlens_k.data();
  }

  static void copy_offsets(const TensorView& view, const char* total_name, int64_t total, std::vector<int64_t>& copy) {
    check_buffer(view, DType::kInt64, {{"N + 1", -1}});
    if (view.size[0] < 1) reject(view.name, "at least one element", "none");
    const int64_t* values = static_cast<const int64_t*>(view.data);
    copy.assign(values, values + view.size[0]);
    if (copy.front() != 0) reject(view.name, "its first value to be 0", std::to_string(copy.front()));
    for (size_t i = 1; i < copy.size(); ++i) {
      if (copy[i] < copy[i - 1]) {
        reject(view.name, "nondecreasing values",
               std::to_string(copy[i]) + " after " + std::to_string(copy[i - 1]) + " at index " + std::to_string(i));
      }
    }
    if (copy.back() != total) {
      reject(view.name, std::string("its last value to be ") + total_name + " = " + std::to_string(total),
             std::to_string(copy.back()));
    }
  }

  const int64_t* set_lengths(const TensorView& view, const char* limit_name, int64_t limit,
                             std::vector<int64_t>& copy) const {
    if (!view) return nullptr;
    if (params.cu_seqlens_q != nullptr) reject(view.name, "None for packed input (cu_seqlens given)", "a tensor");
    check_buffer(view, DType::kInt64, {{"B", params.batch}});
    const int64_t* values = static_cast<const int64_t*>(view.data);
    copy.assign(values, values + view.size[0]);
    for (size_t i = 0; i < copy.size(); ++i) {
      if (copy[i] >= 0 && copy[i] <= limit) continue;
      reject(view.name, std::string("values from 0 to ") + limit_name + " = " + std::to_string(limit),
             std::to_string(copy[i]) + " at index " + std::to_string(i));
    }
    return copy.data();
  }

  void set_dropout(const TensorView& seed) {
    if (!(params.dropout_p >= 0.0 && params.dropout_p <= 1.0)) {
      reject("dropout_p", "a float from 0 to 1", std::to_string(params.dropout_p));
    }
    if (!seed) {
      if (params.dropout_p > 0.0) reject("seed", "a tensor (dropout_p > 0)", "None");
      return;
    }
    check_buffer(seed, DType::kInt64, {{"(seed, offset)", 2}});
    params.seed = static_cast<const uint64_t*>(seed.data)[0];
    params.offset = static_cast<const uint64_t*>(seed.data)[1];
  }
};
using Call = CallOf<DotAttentionParams>;
using AdditiveCall = CallOf<AdditiveAttentionParams>;

// ---- The ops ----------------------------------------------------------------------------------------------------

py::object dot_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_fwd", items, given, 24);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView weights = args.optional_tensor("weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);

  call.set_inputs(query, key, value);
  call.set_results(out, lse, weights, weights_index, weights_mode);
  call.set_modifiers(modifiers);

  const KernelTable& table = kernels();
  call.params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.dot_attention_fwd(call.params);
  }
  return py::none();
}

py::object dot_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_bwd", items, given, 34);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView out = args.optional_tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView delta = args.optional_tensor("delta");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  const TensorView delta_shift = args.optional_tensor("delta_shift");
  const TensorView grad_query = args.optional_tensor("grad_query");
  const TensorView grad_key = args.optional_tensor("grad_key");
  const TensorView grad_value = args.optional_tensor("grad_value");
  const TensorView grad_bias[2] = {args.optional_tensor("grad_bias"), args.optional_tensor("grad_bias2")};
  const TensorView grad_sink = args.optional_tensor("grad_sink");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  const int64_t threads = args.integer("threads");

  DotAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  if (static_cast<bool>(out) != static_cast<bool>(lse)) {
    reject(out ? "lse" : "out", "both out and lse or neither", "None");
  }
  std::unique_ptr<double[]> own_delta;
  if (lse) {
    call.check_out_shape(out);
    params.out = tensor4(out);
    call.check_rows_buffer(lse, call.real);
    params.lse = lse.data;
    if (delta) {
      call.check_rows_buffer(delta, call.real);
      params.delta = delta.data;
    } else {
      // A workspace nobody else reads: for a small problem, a tensor for it would cost as much as the kernel.
      own_delta.reset(new double[static_cast<size_t>(call.rows_batch * params.heads * params.query_tokens)]);
      params.delta = own_delta.get();
    }
  } else {
    const bool only_operands = !modifiers.cu_seqlens_q && !modifiers.sink && !grad_weights && !delta_shift &&
                               !grad_bias[0] && !grad_bias[1] && params.softcap == 0.0 && params.dropout_p == 0.0;
    if (params.key_tokens > kWholeRowKeys || !only_operands) {
      reject("lse",
             "a tensor (only calls with at most " + std::to_string(kWholeRowKeys) +
                 " keys and no gradient but those of query, key and value do without)",
             "None");
    }
  }
  if (delta_shift) {
    call.check_rows_buffer(delta_shift, call.real);
    params.delta_shift = delta_shift.data;
  }
  call.set_weights("grad_weights", grad_weights, weights_index, weights_mode);
  if (grad_weights) params.grad_weights = call.weights_view(grad_weights);
  call.set_gradients(grad_query, grad_key, grad_value);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, grad_bias, grad_sink);
  call.set_threads(threads);

  const KernelTable& table = kernels();
  params.native_bf16 = table.native_bf16;
  {
    const py::gil_scoped_release no_gil;
    table.dot_attention_bwd(params);
  }
  return py::none();
}

// A vector of each head or one for all, [H, D] or [1, D].
const void* set_vector(const TensorView& view, const AdditiveCall& call, bool* by_head) {
  if (!view) return nullptr;
  *by_head = view.ndim == 2 && view.size[0] == call.params.heads;
  check_buffer(view, call.real, {{"H or 1", *by_head ? call.params.heads : 1}, {"D", call.params.head_size}});
  return view.data;
}
void* set_vector_gradient(const TensorView& view, const TensorView& input, const AdditiveCall& call) {
  if (!view) return nullptr;
  if (!input) reject(view.name, "None without its input", "a tensor");
  check_buffer(view, call.real, {{"H or 1", input.size[0]}, {"D", call.params.head_size}});
  return view.data;
}

py::object additive_attention_fwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_fwd", items, given, 25);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView weight = args.tensor("weight");
  const TensorView score_bias = args.optional_tensor("score_bias");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.optional_tensor("lse");
  const TensorView weights = args.optional_tensor("weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  AdditiveCall call;
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);

  call.set_inputs(query, key, value);
  call.params.weight = set_vector(weight, call, &call.params.weight_by_head);
  call.params.score_bias = set_vector(score_bias, call, &call.params.score_bias_by_head);
  call.set_results(out, lse, weights, weights_index, weights_mode);
  call.set_modifiers(modifiers);

  {
    const py::gil_scoped_release no_gil;
    kernels().additive_attention_fwd(call.params);
  }
  return py::none();
}

py::object additive_attention_bwd(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("additive_attention_bwd", items, given, 36);
  const TensorView grad_out = args.tensor("grad_out");
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  const TensorView weight = args.tensor("weight");
  const TensorView score_bias = args.optional_tensor("score_bias");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView grad_weights = args.optional_tensor("grad_weights");
  const TensorView weights_index = args.optional_tensor("weights_index");
  const int64_t weights_mode = args.integer("weights_mode");
  const TensorView delta_shift = args.optional_tensor("delta_shift");
  const TensorView grad_query = args.optional_tensor("grad_query");
  const TensorView grad_key = args.optional_tensor("grad_key");
  const TensorView grad_value = args.optional_tensor("grad_value");
  const TensorView grad_weight = args.optional_tensor("grad_weight");
  const TensorView grad_score_bias = args.optional_tensor("grad_score_bias");
  const TensorView grad_bias[2] = {args.optional_tensor("grad_bias"), args.optional_tensor("grad_bias2")};
  const TensorView grad_sink = args.optional_tensor("grad_sink");
  AdditiveCall call;
  Modifiers modifiers;
  modifiers.read(args, call.params, nullptr);
  const int64_t threads = args.integer("threads");

  AdditiveAttentionParams& params = call.params;
  call.set_inputs(query, key, value);
  params.weight = set_vector(weight, call, &params.weight_by_head);
  params.score_bias = set_vector(score_bias, call, &params.score_bias_by_head);
  call.check_out_shape(grad_out);
  params.grad_out = tensor4(grad_out);
  call.check_out_shape(out);
  params.out = tensor4(out);
  call.check_rows_buffer(lse, call.real);
  params.lse = lse.data;
  // A workspace nobody else reads; doubles, so that either type fits.
  const std::unique_ptr<double[]> delta(new double[static_cast<size_t>(lse.numel())]);
  params.delta = delta.get();
  if (delta_shift) {
    call.check_rows_buffer(delta_shift, call.real);
    params.delta_shift = delta_shift.data;
  }
  call.set_weights("grad_weights", grad_weights, weights_index, weights_mode);
  if (grad_weights) params.grad_weights = call.weights_view(grad_weights);
  call.set_gradients(grad_query, grad_key, grad_value);
  params.grad_weight = set_vector_gradient(grad_weight, weight, call);
  params.grad_score_bias = set_vector_gradient(grad_score_bias, score_bias, call);
  call.set_modifiers(modifiers);
  call.set_modifier_gradients(modifiers, grad_bias, grad_sink);
  call.set_threads(threads);

  {
    const py::gil_scoped_release no_gil;
    kernels().additive_attention_bwd(params);
  }
  return py::none();
}

// None if the forward takes the decode kernel, else why not. Nothing is computed.
py::object dot_attention_decode_obstacle(PyObject* const* items, Py_ssize_t given) {
  ArgReader args("dot_attention_decode_obstacle", items, given, 19);
  const TensorView query = args.tensor("query");
  const TensorView key = args.tensor("key");
  const TensorView value = args.tensor("value");
  Call call;
  Modifiers modifiers;
  modifiers.read(args, call.params, &call.params.scale);
  call.set_inputs(query, key, value);
  call.set_modifiers(modifiers);
  const char* obstacle = kernels().dot_attention_decode_obstacle(call.params);
  if (obstacle == nullptr) return py::none();
  return py::str(obstacle);
}

// ---- Ordinary calls ---------------------------------------------------------------------------------------------

// What Python's side of torch is asked about every call. Held for the life of the process.
struct TorchProbes {
  PyObject *tensor_type, *parameter_type, *is_neg, *dispatch_modes, *functorch_active, *autocast_enabled, *grad_enabled,
      *forward_ad;
};
TorchProbes g_probes = {};

bool ask(PyObject* function, PyObject* argument = nullptr) {
  const py::object answer = py::reinterpret_steal<py::object>(
      argument == nullptr ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument));
  const int truth = answer ? PyObject_IsTrue(answer.ptr()) : -1;
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

bool attribute(PyObject* object, PyObject* name) {
  const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value.ptr() == Py_True;
}

// Whether tensors are ordinary in themselves: plain CPU tensors of four dimensions and one floating dtype, whose memory
// holds their values. Python spends longer on these questions, one by one, than a small problem takes.
bool ordinary_tensors(PyObject* const* items, int count, dlpack::Tensor* tensors) {
  for (int i = 0; i < count; ++i) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(items[i]));
    if (type != g_probes.tensor_type && type != g_probes.parameter_type) return false;
  }
  // First: a functorch wrapper has no memory to look at, and torch's refusal costs a stack trace.
  if (ask(g_probes.dispatch_modes) || ask(g_probes.functorch_active)) return false;
  for (int i = 0; i < count; ++i) {
    if (g_exchange_api->dltensor_from_py_object_no_sync(items[i], &tensors[i]) != 0) {
      PyErr_Clear();
      return false;
    }
    DType dtype;
    if (tensors[i].device.type != dlpack::kCpu || tensors[i].ndim != 4 || !read_dtype(tensors[i].dtype, &dtype) ||
        !is_floating(dtype) || tensors[i].dtype.code != tensors[0].dtype.code ||
        tensors[i].dtype.bits != tensors[0].dtype.bits) {
      return false;
    }
  }
  for (int i = 0; i < count; ++i)
    if (ask(g_probes.is_neg, items[i])) return false;
  return true;
}

py::object ordinary_call(PyObject* const* items, Py_ssize_t given) {
  ArgReader("ordinary_call", items, given, 3);  // for its checks
  static PyObject* const kCpu = PyUnicode_InternFromString("cpu");
  static PyObject* const kLevel = PyUnicode_InternFromString("_current_level");
  static PyObject* const kRequiresGrad = PyUnicode_InternFromString("requires_grad");
  const py::object no = py::int_(0);
  dlpack::Tensor tensors[3];
  if (!ordinary_tensors(items, 3, tensors) || ask(g_probes.autocast_enabled, kCpu)) return no;
  const py::object level = py::reinterpret_steal<py::object>(PyObject_GetAttr(g_probes.forward_ad, kLevel));
  if (!level) throw py::error_already_set();
  if (PyLong_AsLong(level.ptr()) >= 0) return no;
  const int64_t *query = tensors[0].shape, *key = tensors[1].shape, *value = tensors[2].shape;
  for (int i = 0; i < 2; ++i)
    if (query[i] != key[i] || query[i] != value[i]) return no;
  if (query[3] != key[3] || key[2] != value[2]) return no;
  bool gradient = false;
  for (int i = 0; i < 3 && !gradient; ++i) gradient = attribute(items[i], kRequiresGrad);
  return py::int_(gradient && ask(g_probes.grad_enabled) ? -query[3] : query[3]);
}

py::object ordinary_gradient(PyObject* const* items, Py_ssize_t given) {
  ArgReader("ordinary_gradient", items, given, 1);
  dlpack::Tensor tensor;
  return py::bool_(ordinary_tensors(items, 1, &tensor) && !ask(g_probes.grad_enabled));
}

// ---- The module -------------------------------------------------------------------------------------------------

void init(const py::object& exchange_api_capsule, uintptr_t parallel_for_address, const py::tuple& probes) {
  const dlpack::ExchangeApi* api = exchange_api_from_capsule(exchange_api_capsule);
  if (parallel_for_address == 0) throw py::value_error("parallel_for_address: expected an address, got 0");
  PyObject** const slots[] = {&g_probes.tensor_type,    &g_probes.parameter_type,   &g_probes.is_neg,
                              &g_probes.dispatch_modes, &g_probes.functorch_active, &g_probes.autocast_enabled,
                              &g_probes.grad_enabled,   &g_probes.forward_ad};
  if (probes.size() != std::size(slots)) {
    throw py::value_error("probes: expected " + std::to_string(std::size(slots)) + " objects, got " +
                          std::to_string(probes.size()));
  }
  select_isa_at_load();
  for (size_t i = 0; i < std::size(slots); ++i) *slots[i] = py::object(probes[i]).release().ptr();
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

// CPython's entry of an op function; exceptions become Python's as pybind11 would make them.
template <py::object (*FUNCTION)(PyObject* const*, Py_ssize_t)>
PyObject* entry(PyObject*, PyObject* const* items, Py_ssize_t given) {
  try {
    return FUNCTION(items, given).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <py::object (*FUNCTION)(PyObject* const*, Py_ssize_t)>
PyMethodDef op_function(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<FUNCTION>)), METH_FASTCALL, nullptr};
}

PyMethodDef g_op_functions[] = {op_function<dot_attention_fwd>("dot_attention_fwd"),
                                op_function<dot_attention_bwd>("dot_attention_bwd"),
                                op_function<dot_attention_decode_obstacle>("dot_attention_decode_obstacle"),
                                op_function<additive_attention_fwd>("additive_attention_fwd"),
                                op_function<additive_attention_bwd>("additive_attention_bwd"),
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
