#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "../src/common/checks.h"
#include "../src/cpu/dispatch.h"

namespace py = pybind11;
using namespace fastattn;

// torch's dtypes and their codes, from `set_dtypes`; the references are kept for good.
static std::vector<std::pair<PyObject*, int>> dtypes;

static py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
static int64_t integer(PyObject* value) {
  const long long x = PyLong_AsLongLong(value);
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

// The kernel's view of a torch.Tensor of at most 4 dimensions.
static Tensor view_of(py::handle tensor) {
  static PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *shape = PyUnicode_InternFromString("shape"),
                  *stride = PyUnicode_InternFromString("stride"), *dtype = PyUnicode_InternFromString("dtype");
  const py::object sizes = checked(PyObject_GetAttr(tensor.ptr(), shape));
  const py::object strides = checked(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
  const py::object type = checked(PyObject_GetAttr(tensor.ptr(), dtype));
  const py::object address = checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
  const Py_ssize_t n = PyTuple_Size(sizes.ptr());
  if (n > 4 || PyTuple_Size(strides.ptr()) != n)
    throw py::value_error("a tensor has at most 4 dimensions, each with a stride");
  Tensor t;
  t.data = PyLong_AsVoidPtr(address.ptr());
  int code = -1;
  for (const auto& [known, its] : dtypes)
    if (known == type.ptr()) code = its;
  if (code < 0) throw py::type_error("no kernel takes " + py::str(type).cast<std::string>());
  t.dtype = static_cast<DType>(code);
  for (Py_ssize_t i = 0; i < n; i++) {
    t.size[4 - n + i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
    t.stride[4 - n + i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
  }
  return t;
}

namespace pybind11::detail {
// A struct's tensor field is set by a torch.Tensor and reads back as its address.
template <>
struct type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = view_of(source);
    return true;
  }
  static handle cast(const Tensor& t, return_value_policy, handle) { return PyLong_FromVoidPtr(t.data); }
};
}  // namespace pybind11::detail

template <class P>
static auto run(const char* name, void (*KernelTable::*kernel)(const P&)) {
  return [name, kernel](const P& p) {
    check(name, p);
    py::gil_scoped_release release;
    (cpu::kernels().*kernel)(p);
  };
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastattn's compiled kernels. Torch-free: they take addresses, sizes and strides in elements.";
  m.def("cpu_isas", [] {
    const char* names[8];
    const int n = cpu::runnable(names, 8);
    py::tuple result(n);
    for (int i = 0; i < n; i++) result[i] = py::str(names[i]);
    return result;
  });
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  m.def("select_cpu_isa", [](const char* name) { return cpu::select(name); });
  m.def("set_dtypes", [](const py::dict& codes) {
    dtypes.clear();
    for (const auto& [dtype, code] : codes) dtypes.emplace_back(dtype.inc_ref().ptr(), code.cast<int>());
  });
  m.def("fill", [](const py::object& params, const py::dict& fields) {
    for (const auto& [name, value] : fields)
      if (!value.is_none() && PyObject_SetAttr(params.ptr(), name.ptr(), value.ptr())) throw py::error_already_set();
  });

  py::class_<RowsParams>(m, "RowsParams")
      .def(py::init<>())
      .def_readwrite("serial", &RowsParams::serial)
      .def_readwrite("prefetch", &RowsParams::prefetch)
      .def_readwrite("threads", &RowsParams::threads);
  py::class_<RmsNormParams, RowsParams>(m, "RmsNormParams")
      .def(py::init<>())
      .def_readwrite("x", &RmsNormParams::x)
      .def_readwrite("residual", &RmsNormParams::residual)
      .def_readwrite("weight", &RmsNormParams::weight)
      .def_readwrite("normed", &RmsNormParams::normed)
      .def_readwrite("total", &RmsNormParams::total)
      .def_readwrite("rstd", &RmsNormParams::rstd)
      .def_readwrite("eps", &RmsNormParams::eps);
  py::class_<RmsNormBackwardParams, RowsParams>(m, "RmsNormBackwardParams")
      .def(py::init<>())
      .def_readwrite("grad_normed", &RmsNormBackwardParams::grad_normed)
      .def_readwrite("grad_total", &RmsNormBackwardParams::grad_total)
      .def_readwrite("total", &RmsNormBackwardParams::total)
      .def_readwrite("weight", &RmsNormBackwardParams::weight)
      .def_readwrite("rstd", &RmsNormBackwardParams::rstd)
      .def_readwrite("grad", &RmsNormBackwardParams::grad)
      .def_readwrite("weight_partials", &RmsNormBackwardParams::weight_partials);
  py::class_<GateParams, RowsParams>(m, "GateParams")
      .def(py::init<>())
      .def_readwrite("a", &GateParams::a)
      .def_readwrite("b", &GateParams::b)
      .def_readwrite("out", &GateParams::out)
      .def_readwrite("grad_out", &GateParams::grad_out)
      .def_readwrite("grad_a", &GateParams::grad_a)
      .def_readwrite("grad_b", &GateParams::grad_b);
  py::class_<RotaryParams, RowsParams>(m, "RotaryParams")
      .def(py::init<>())
      .def_readwrite("x", &RotaryParams::x)
      .def_readwrite("out", &RotaryParams::out)
      .def_readwrite("cos", &RotaryParams::cos)
      .def_readwrite("sin", &RotaryParams::sin)
      .def_readwrite("rows", &RotaryParams::rows)
      .def_readwrite("inverse", &RotaryParams::inverse);
  py::class_<MatvecParams>(m, "MatvecParams")
      .def(py::init<>())
      .def_readwrite("x", &MatvecParams::x)
      .def_readwrite("weight", &MatvecParams::weight)
      .def_readwrite("out", &MatvecParams::out)
      .def_readwrite("add", &MatvecParams::add)
      .def_readwrite("threads", &MatvecParams::threads);
  py::class_<DecodeStepParams>(m, "DecodeStepParams")
      .def(py::init<>())
      .def_readwrite("z_h", &DecodeStepParams::z_h)
      .def_readwrite("z_l", &DecodeStepParams::z_l)
      .def_readwrite("out", &DecodeStepParams::out)
      .def_readwrite("weights", &DecodeStepParams::weights)
      .def_readwrite("keys", &DecodeStepParams::keys)
      .def_readwrite("values", &DecodeStepParams::values)
      .def_readwrite("positions", &DecodeStepParams::positions)
      .def_readwrite("lengths", &DecodeStepParams::lengths)
      .def_readwrite("cos", &DecodeStepParams::cos)
      .def_readwrite("sin", &DecodeStepParams::sin)
      .def_readwrite("rows", &DecodeStepParams::rows)
      .def_readwrite("layers", &DecodeStepParams::layers)
      .def_readwrite("inner", &DecodeStepParams::inner)
      .def_readwrite("longest", &DecodeStepParams::longest)
      .def_readwrite("h_cycles", &DecodeStepParams::h_cycles)
      .def_readwrite("l_cycles", &DecodeStepParams::l_cycles)
      .def_readwrite("eps", &DecodeStepParams::eps)
      .def_readwrite("threads", &DecodeStepParams::threads);
  py::class_<AttentionParams>(m, "AttentionParams")
      .def(py::init<>())
      .def_readwrite("q", &AttentionParams::q)
      .def_readwrite("k", &AttentionParams::k)
      .def_readwrite("v", &AttentionParams::v)
      .def_readwrite("out", &AttentionParams::out)
      .def_readwrite("lse", &AttentionParams::lse)
      .def_readwrite("state", &AttentionParams::state)
      .def_readwrite("bias", &AttentionParams::bias)
      .def_readwrite("prefix_lengths", &AttentionParams::prefix_lengths)
      .def_readwrite("cu_seqlens_q", &AttentionParams::cu_seqlens_q)
      .def_readwrite("cu_seqlens_k", &AttentionParams::cu_seqlens_k)
      .def_readwrite("key_lengths", &AttentionParams::key_lengths)
      .def_readwrite("dense", &AttentionParams::dense)
      .def_readwrite("tile_class", &AttentionParams::tile_class)
      .def_readwrite("grad_out", &AttentionParams::grad_out)
      .def_readwrite("grad_lse", &AttentionParams::grad_lse)
      .def_readwrite("grad_q", &AttentionParams::grad_q)
      .def_readwrite("grad_k", &AttentionParams::grad_k)
      .def_readwrite("grad_v", &AttentionParams::grad_v)
      .def_readwrite("scale", &AttentionParams::scale)
      .def_readwrite("bias_value", &AttentionParams::bias_value)
      .def_readwrite("score", &AttentionParams::score)
      .def_readwrite("default_bias", &AttentionParams::default_bias)
      .def_readwrite("causal", &AttentionParams::causal)
      .def_readwrite("window_left", &AttentionParams::window_left)
      .def_readwrite("window_right", &AttentionParams::window_right)
      .def_readwrite("block_q", &AttentionParams::block_q)
      .def_readwrite("block_k", &AttentionParams::block_k)
      .def_readwrite("pack_kib", &AttentionParams::pack_kib)
      .def_readwrite("decode_rows", &AttentionParams::decode_rows)
      .def_readwrite("chunk_k", &AttentionParams::chunk_k)
      .def_readwrite("threads", &AttentionParams::threads);
  py::class_<ReweightedParams, AttentionParams>(m, "ReweightedParams")
      .def(py::init<>())
      .def_readwrite("statistics", &ReweightedParams::statistics)
      .def_readwrite("power", &ReweightedParams::power)
      .def_readwrite("reweigh", &ReweightedParams::reweigh);
  py::class_<GroupedParams, AttentionParams>(m, "GroupedParams")
      .def(py::init<>())
      .def_readwrite("groups", &GroupedParams::groups)
      .def_readwrite("key_groups", &GroupedParams::key_groups)
      .def_readwrite("window", &GroupedParams::window);
  py::class_<GatedParams, AttentionParams>(m, "GatedParams")
      .def(py::init<>())
      .def_readwrite("assignment", &GatedParams::assignment)
      .def_readwrite("sharpness", &GatedParams::sharpness)
      .def_readwrite("grad_query_assignment", &GatedParams::grad_query_assignment)
      .def_readwrite("grad_key_assignment", &GatedParams::grad_key_assignment)
      .def_readwrite("grad_sharpness", &GatedParams::grad_sharpness)
      .def_readwrite("window", &GatedParams::window)
      .def_readwrite("gate", &GatedParams::gate);
  py::class_<SinkhornParams>(m, "SinkhornParams")
      .def(py::init<>())
      .def_readwrite("scores", &SinkhornParams::scores)
      .def_readwrite("begins", &SinkhornParams::begins)
      .def_readwrite("counts", &SinkhornParams::counts)
      .def_readwrite("out", &SinkhornParams::out)
      .def_readwrite("potentials", &SinkhornParams::potentials)
      .def_readwrite("grad", &SinkhornParams::grad)
      .def_readwrite("temperature", &SinkhornParams::temperature)
      .def_readwrite("iterations", &SinkhornParams::iterations)
      .def_readwrite("causal", &SinkhornParams::causal)
      .def_readwrite("threads", &SinkhornParams::threads);
  py::class_<TileClassParams>(m, "TileClassParams")
      .def(py::init<>())
      .def_readwrite("mask", &TileClassParams::mask)
      .def_readwrite("classes", &TileClassParams::classes)
      .def_readwrite("block_q", &TileClassParams::block_q)
      .def_readwrite("block_k", &TileClassParams::block_k)
      .def_readwrite("threads", &TileClassParams::threads);
  py::class_<VocabRowsParams>(m, "VocabRowsParams")
      .def(py::init<>())
      .def_readwrite("x", &VocabRowsParams::x)
      .def_readwrite("out", &VocabRowsParams::out)
      .def_readwrite("bias", &VocabRowsParams::bias)
      .def_readwrite("target", &VocabRowsParams::target)
      .def_readwrite("temperature", &VocabRowsParams::temperature)
      .def_readwrite("log_count", &VocabRowsParams::log_count)
      .def_readwrite("row_max", &VocabRowsParams::row_max)
      .def_readwrite("row_sum", &VocabRowsParams::row_sum)
      .def_readwrite("picked", &VocabRowsParams::picked)
      .def_readwrite("grad", &VocabRowsParams::grad)
      .def_readwrite("grad_temperature", &VocabRowsParams::grad_temperature)
      .def_readwrite("first", &VocabRowsParams::first)
      .def_readwrite("ignore_index", &VocabRowsParams::ignore_index)
      .def_readwrite("softcap", &VocabRowsParams::softcap)
      .def_readwrite("z_loss", &VocabRowsParams::z_loss)
      .def_readwrite("stablemax", &VocabRowsParams::stablemax)
      .def_readwrite("statistics", &VocabRowsParams::statistics)
      .def_readwrite("gradient", &VocabRowsParams::gradient)
      .def_readwrite("threads", &VocabRowsParams::threads);
  py::class_<VocabTokensParams>(m, "VocabTokensParams")
      .def(py::init<>())
      .def_readwrite("codes", &VocabTokensParams::codes)
      .def_readwrite("bias", &VocabTokensParams::bias)
      .def_readwrite("beta", &VocabTokensParams::beta)
      .def_readwrite("sums", &VocabTokensParams::sums)
      .def_readwrite("largest", &VocabTokensParams::largest)
      .def_readwrite("best", &VocabTokensParams::best)
      .def_readwrite("mass", &VocabTokensParams::mass)
      .def_readwrite("out", &VocabTokensParams::out)
      .def_readwrite("order", &VocabTokensParams::order)
      .def_readwrite("offsets", &VocabTokensParams::offsets)
      .def_readwrite("inverse_temperature", &VocabTokensParams::inverse_temperature);
  py::class_<VocabSampleParams>(m, "VocabSampleParams")
      .def(py::init<>())
      .def_readwrite("scores", &VocabSampleParams::scores)
      .def_readwrite("uniform", &VocabSampleParams::uniform)
      .def_readwrite("largest", &VocabSampleParams::largest)
      .def_readwrite("beta", &VocabSampleParams::beta)
      .def_readwrite("bias", &VocabSampleParams::bias)
      .def_readwrite("order", &VocabSampleParams::order)
      .def_readwrite("offsets", &VocabSampleParams::offsets)
      .def_readwrite("out", &VocabSampleParams::out)
      .def_readwrite("inverse_temperature", &VocabSampleParams::inverse_temperature)
      .def_readwrite("threads", &VocabSampleParams::threads);
  py::class_<VocabBestParams>(m, "VocabBestParams")
      .def(py::init<>())
      .def_readwrite("scores", &VocabBestParams::scores)
      .def_readwrite("x", &VocabBestParams::x)
      .def_readwrite("codebook", &VocabBestParams::codebook)
      .def_readwrite("offset", &VocabBestParams::offset)
      .def_readwrite("ids", &VocabBestParams::ids)
      .def_readwrite("out", &VocabBestParams::out)
      .def_readwrite("slack", &VocabBestParams::slack)
      .def_readwrite("offset_slack", &VocabBestParams::offset_slack)
      .def_readwrite("threads", &VocabBestParams::threads);
  py::class_<VocabDotsParams>(m, "VocabDotsParams")
      .def(py::init<>())
      .def_readwrite("x", &VocabDotsParams::x)
      .def_readwrite("codebook", &VocabDotsParams::codebook)
      .def_readwrite("out", &VocabDotsParams::out)
      .def_readwrite("squares", &VocabDotsParams::squares)
      .def_readwrite("threads", &VocabDotsParams::threads);
  py::class_<VocabExpandParams>(m, "VocabExpandParams")
      .def(py::init<>())
      .def_readwrite("scores", &VocabExpandParams::scores)
      .def_readwrite("codes", &VocabExpandParams::codes)
      .def_readwrite("bias", &VocabExpandParams::bias)
      .def_readwrite("logits", &VocabExpandParams::logits)
      .def_readwrite("threads", &VocabExpandParams::threads);

  py::class_<DigestParams>(m, "DigestParams")
      .def(py::init<>())
      .def_readwrite("source", &DigestParams::source)
      .def_readwrite("digest", &DigestParams::digest)
      .def_readwrite("threads", &DigestParams::threads);
  py::class_<PackParams>(m, "PackParams")
      .def(py::init<>())
      .def_readwrite("source", &PackParams::source)
      .def_readwrite("packed", &PackParams::packed)
      .def_readwrite("bytes", &PackParams::bytes)
      .def_readwrite("transposed", &PackParams::transposed)
      .def_readwrite("parts", &PackParams::parts)
      .def_readwrite("threads", &PackParams::threads);
  py::class_<LinearParams>(m, "LinearParams")
      .def(py::init<>())
      .def_readwrite("x", &LinearParams::x)
      .def_readwrite("gate", &LinearParams::gate)
      .def_readwrite("packed", &LinearParams::packed)
      .def_readwrite("residual", &LinearParams::residual)
      .def_readwrite("out", &LinearParams::out)
      .def_readwrite("product", &LinearParams::product)
      .def_readwrite("rstd", &LinearParams::rstd)
      .def_readwrite("eps", &LinearParams::eps)
      .def_readwrite("transposed", &LinearParams::transposed)
      .def_readwrite("norm", &LinearParams::norm)
      .def_readwrite("gated_up", &LinearParams::gated_up)
      .def_readwrite("block_rows", &LinearParams::block_rows)
      .def_readwrite("block_columns", &LinearParams::block_columns)
      .def_readwrite("block_steps", &LinearParams::block_steps)
      .def_readwrite("threads", &LinearParams::threads);
  py::class_<PeakParams>(m, "PeakParams")
      .def(py::init<>())
      .def_readwrite("sink", &PeakParams::sink)
      .def_readwrite("operations", &PeakParams::operations)
      .def_readwrite("iterations", &PeakParams::iterations)
      .def_readwrite("bf16", &PeakParams::bf16)
      .def_readwrite("threads", &PeakParams::threads);

  m.def("rms_norm", run("rms_norm", &KernelTable::rms_norm));
  m.def("rms_norm_backward", run("rms_norm_backward", &KernelTable::rms_norm_backward));
  m.def("swiglu", run("swiglu", &KernelTable::swiglu));
  m.def("swiglu_backward", run("swiglu_backward", &KernelTable::swiglu_backward));
  m.def("gated", run("gated", &KernelTable::gated));
  m.def("gated_backward", run("gated_backward", &KernelTable::gated_backward));
  m.def("rotary", run("rotary", &KernelTable::rotary));
  m.def("matvec", run("matvec", &KernelTable::matvec));
  m.def("decode_step", run("decode_step", &KernelTable::decode_step));
  m.def("attention_forward", run("attention_forward", &KernelTable::attention_forward));
  m.def("attention_backward", run("attention_backward", &KernelTable::attention_backward));
  m.def("reweighted_forward", run("reweighted_forward", &KernelTable::reweighted_forward));
  m.def("reweighted_backward", run("reweighted_backward", &KernelTable::reweighted_backward));
  m.def("grouped_forward", run("grouped_forward", &KernelTable::grouped_forward));
  m.def("grouped_backward", run("grouped_backward", &KernelTable::grouped_backward));
  m.def("gated_attention_forward", run("gated_attention_forward", &KernelTable::gated_attention_forward));
  m.def("gated_attention_backward", run("gated_attention_backward", &KernelTable::gated_attention_backward));
  m.def("sinkhorn_forward", run("sinkhorn_forward", &KernelTable::sinkhorn_forward));
  m.def("sinkhorn_backward", run("sinkhorn_backward", &KernelTable::sinkhorn_backward));
  m.def("vocab_rows", run("vocab_rows", &KernelTable::vocab_rows));
  m.def("vocab_code_bias", run("vocab_code_bias", &KernelTable::vocab_code_bias));
  m.def("vocab_best_tokens", run("vocab_best_tokens", &KernelTable::vocab_best_tokens));
  m.def("vocab_bias_gradient", run("vocab_bias_gradient", &KernelTable::vocab_bias_gradient));
  m.def("vocab_group", run("vocab_group", &KernelTable::vocab_group));
  m.def("vocab_sample", run("vocab_sample", &KernelTable::vocab_sample));
  m.def("vocab_best", run("vocab_best", &KernelTable::vocab_best));
  m.def("vocab_dots", run("vocab_dots", &KernelTable::vocab_dots));
  m.def("vocab_expand", run("vocab_expand", &KernelTable::vocab_expand));
  m.def("vocab_collect", run("vocab_collect", &KernelTable::vocab_collect));
  m.def("digest", run("digest", &KernelTable::digest));
  m.def("pack", run("pack", &KernelTable::pack));
  m.def("linear", run("linear", &KernelTable::linear));
  m.def("classify_tiles", run("classify_tiles", &KernelTable::classify_tiles));
  m.def("peak", run("peak", &KernelTable::peak));
}
