// What a kernel takes for granted of its parameters: tensors that are there, their sizes, dtypes and strides, codes and
// numbers, and what index tensors hold, which addresses memory. Checked before every call, in a fraction of a
// microsecond: a compiled graph reaches kernels without the checks of a public function.
#pragma once
#include "checks_attention.h"
#include "checks_scans.h"
#include "checks_linear.h"
#include "checks_words.h"

namespace fastattn {

// --- rows ------------------------------------------------------------------------------------------------------------

// A norm's weight is of its rows' type or f32.
inline DType weight_dtype(const Tensor& weight, const Tensor& rows) {
  return weight.dtype == DType::f32 ? DType::f32 : rows.dtype;
}

inline void check_fields(const Checks& c, const RmsNormParams& p) {
  c.floating("x", p.x);
  c.in("x's last dimension", p.x.size[3], 1, INT64_MAX);
  if (p.residual.data) {
    c.like("residual", p.residual, p.x);
    c.like("total", p.total, p.x);
  }
  if (p.weight.data) c.contiguous("weight", p.weight, {1, 1, 1, p.x.size[3]}, weight_dtype(p.weight, p.x));
  c.like("normed", p.normed, p.x);
  if (p.rstd.data) c.strided("rstd", p.rstd, {p.x.size[0], p.x.size[1], p.x.size[2], 1}, DType::f32);
}

inline void check_fields(const Checks& c, const RmsNormBackwardParams& p) {
  c.floating("total", p.total);
  c.in("total's last dimension", p.total.size[3], 1, INT64_MAX);
  c.like("grad_normed", p.grad_normed, p.total);
  if (p.grad_total.data) c.like("grad_total", p.grad_total, p.total);
  c.like("grad", p.grad, p.total);
  c.strided("rstd", p.rstd, {p.total.size[0], p.total.size[1], p.total.size[2], 1}, DType::f32);
  if (p.weight.data) {
    c.contiguous("weight", p.weight, {1, 1, 1, p.total.size[3]}, weight_dtype(p.weight, p.total));
    c.contiguous("weight_partials", p.weight_partials, {1, 1, p.weight_partials.size[2], p.total.size[3]}, DType::f32);
    c.in("weight_partials' rows", p.weight_partials.size[2], p.threads, INT64_MAX);
  }
}

inline void check_fields(const Checks& c, const RotaryParams& p) {
  c.floating("x", p.x);
  c.require(p.x.size[3] % 2 == 0, "x", "must have an even last dimension");
  c.like("out", p.out, p.x);
  const int64_t angles = p.cos.size[2], half = p.x.size[3] / 2;
  const int64_t width = p.cos.size[3] == 2 * half ? 2 * half : half;
  c.contiguous("cos", p.cos, {1, 1, angles, width}, DType::f32);
  c.contiguous("sin", p.sin, {1, 1, angles, width}, DType::f32);
  c.tensor("rows", p.rows, {p.rows.size[0], 1, 1, p.x.size[2]}, DType::i32);
  c.require(p.rows.size[0] == p.x.size[0] || p.rows.stride[0] == 0, "rows", "must be one for each batch, or for all");
  const int64_t lists = p.rows.stride[0] == 0 ? 1 : p.rows.size[0];
  for (int64_t b = 0; b < lists && p.rows.data; b++)
    for (int64_t i = 0; i < p.rows.size[3]; i++)
      c.index("rows", i, ((const int32_t*)p.rows.data)[b * p.rows.stride[0] + i], 0, angles - 1);
}

inline void check_fields(const Checks& c, const MatvecParams& p) {
  c.floating("weight", p.weight);
  const int64_t rows = p.x.size[2], inputs = p.weight.size[3];
  c.in("x's rows", rows, 0, limits::matvec_rows);
  c.in("weight's last dimension", inputs, 1, INT64_MAX);
  c.tensor("weight", p.weight, {1, 1, p.weight.size[2], inputs}, p.weight.dtype);
  c.tensor("x", p.x, {1, 1, rows, inputs}, p.x.dtype == DType::f32 ? DType::f32 : p.weight.dtype);
  c.tensor("out", p.out, {1, 1, rows, p.weight.size[2]}, p.out.dtype == DType::f32 ? DType::f32 : p.weight.dtype);
  c.require(!p.add || p.out.dtype == DType::f32, "out", "must be float32 to be added to");
  c.in("rows_at_once", p.rows_at_once, 1, 4);
}

inline void check_fields(const Checks& c, const DecodeStepParams& p) {
  const int64_t batch = p.z_h.size[2], hidden = p.z_h.size[3];
  const int64_t heads = p.keys.size[1], capacity = p.keys.size[2], head_dim = p.keys.size[3];
  c.floating("z_h", p.z_h);
  c.in("z_h's rows", batch, 1, limits::matvec_rows);
  c.in("z_h's last dimension", hidden, 1, INT64_MAX);
  c.tensor("z_h", p.z_h, {1, 1, batch, hidden}, p.z_h.dtype);
  c.like("z_l", p.z_l, p.z_h);
  c.like("out", p.out, p.z_h);
  c.in("layers", p.layers, 1, INT32_MAX);
  c.in("inner", p.inner, 1, INT64_MAX);
  c.in("h_cycles", p.h_cycles, 1, INT32_MAX);
  c.in("l_cycles", p.l_cycles, 1, INT32_MAX - 1);
  c.in("rows_at_once", p.rows_at_once, 1, 4);
  c.require(p.keys.size[0] % (p.layers * batch) == 0 &&
                p.keys.size[0] / (p.layers * batch) == int64_t(p.h_cycles) * (p.l_cycles + 1),
            "keys", "must be those of every call of every layer of every row");
  c.in("keys' heads", heads, 1, INT64_MAX);
  c.require(head_dim % 2 == 0, "keys", "must have an even last dimension");
  c.in("keys' last dimension", head_dim, 2, limits::head_dim);
  c.tensor("keys", p.keys, Checks::size_of(p.keys), p.z_h.dtype);
  c.tensor("values", p.values, Checks::size_of(p.keys), p.z_h.dtype);
  c.in("longest", p.longest, 1, capacity);
  c.contiguous("positions", p.positions, {1, 1, 1, batch}, DType::i32);
  c.contiguous("lengths", p.lengths, {1, 1, 1, batch}, DType::i32);
  const int64_t angles = p.cos.size[2];
  c.contiguous("cos", p.cos, {1, 1, angles, head_dim / 2}, DType::f32);
  c.contiguous("sin", p.sin, {1, 1, angles, head_dim / 2}, DType::f32);
  c.tensor("rows", p.rows, {batch, 1, 1, 1}, DType::i32);
  for (int64_t b = 0; b < batch; b++) {
    c.index("position", b, ((const int32_t*)p.positions.data)[b], 0, p.longest - 1);
    c.index("lengths", b, ((const int32_t*)p.lengths.data)[b], 0, p.longest);
    c.index("rows", b, ((const int32_t*)p.rows.data)[b * p.rows.stride[0]], 0, angles - 1);
  }
  c.contiguous("weights", p.weights, {1, 1, 1, 8 * p.layers}, DType::i64);
  for (int64_t i = 0; i < 8 * p.layers; i++)
    c.require(((const int64_t*)p.weights.data)[i] != 0, "weights", "must all be there");
}

// --- output layer ----------------------------------------------------------------------------------------------------

inline void check_fields(const Checks& c, const VocabRowsParams& p) {
  c.floating("x", p.x);
  const int64_t rows = p.x.size[2], columns = p.x.size[3];
  const Size by_row{1, 1, 1, rows};
  c.tensor("x", p.x, {1, 1, rows, columns}, p.x.dtype);
  c.integers("target", p.target, rows);
  const bool prepared = p.bias.data || p.softcap != 0 || (p.temperature.data && p.stablemax);
  c.require(!prepared || p.x.dtype == DType::f32, "x",
            "must be float32 with a bias, a soft cap, or stablemax and a temperature");
  if (p.bias.data) c.contiguous("bias", p.bias, {1, 1, 1, columns}, DType::f32);
  if (p.temperature.data) c.strided("temperature", p.temperature, by_row, DType::f32);
  if (p.log_count.data) {
    c.contiguous("log_count", p.log_count, {1, 1, 1, columns}, DType::f32);
    c.require(!p.stablemax && !p.temperature.data && p.z_loss == 0, "log_count",
              "is not served with stablemax, a temperature or z_loss");
  }
  if (p.statistics || p.gradient) {
    c.strided("row_max", p.row_max, by_row, DType::f32);
    c.strided("row_sum", p.row_sum, by_row, DType::f32);
  }
  if (p.statistics) c.strided("picked", p.picked, by_row, DType::f32);
  if (!p.gradient) return;
  const bool rounded = p.x.dtype == DType::f32 && p.out.dtype == DType::bf16;
  c.tensor("out", p.out, Checks::size_of(p.x), rounded ? DType::bf16 : p.x.dtype);
  c.strided("grad", p.grad, by_row, DType::f32);
  if (p.mass.data) c.strided("mass", p.mass, by_row, DType::f32);
  if (p.temperature.data) c.strided("grad_temperature", p.grad_temperature, by_row, DType::f32);
}

// Of four kernels, each with fields of its own, which go by the same sizes.
inline void check_fields(const Checks& c, const VocabTokensParams& p) {
  const int64_t tokens = p.codes.size[3];
  const int64_t codes = p.beta.data ? p.beta.size[3] : p.offsets.size[3] - 1;
  const Size by_code{1, 1, 1, codes}, by_token{1, 1, 1, tokens};
  c.in("codes' number", tokens, 1, INT32_MAX);
  c.integers("codes", p.codes, tokens);
  c.in("beta's size", codes, 1, INT64_MAX);
  if (p.bias.data) c.contiguous("bias", p.bias, by_token, DType::f32);
  if (p.beta.data) c.contiguous("beta", p.beta, by_code, DType::f32);
  c.require(p.best.data || p.mass.data || p.order.data || p.sums.data, "best, mass, order or sums", "is needed");
  if (p.sums.data) c.contiguous("sums", p.sums, by_code, DType::f64);
  if (p.sums.data || p.mass.data) c.contiguous("largest", p.largest, by_code, DType::f32);
  if (p.best.data) {
    c.contiguous("codes", p.codes, by_token, p.codes.dtype);
    c.contiguous("best", p.best, by_code, DType::i64);
  }
  if (p.mass.data) {
    c.contiguous("mass", p.mass, by_code, DType::f32);
    c.contiguous("out", p.out, by_token, DType::f32);
  }
  if (p.order.data) {
    c.contiguous("order", p.order, by_token, DType::i32);
    c.contiguous("offsets", p.offsets, {1, 1, 1, codes + 1}, DType::i64);
  }
}

inline void check_fields(const Checks& c, const VocabSampleParams& p) {
  const int64_t rows = p.scores.size[2], codes = p.scores.size[3], tokens = p.order.size[3];
  c.tensor("scores", p.scores, {1, 1, rows, codes}, DType::f32);
  c.in("scores' columns", codes, 1, INT64_MAX);
  c.tensor("uniform", p.uniform, {1, 1, rows, 2}, DType::f64);
  c.contiguous("largest", p.largest, {1, 1, 1, codes}, DType::f32);
  c.contiguous("beta", p.beta, {1, 1, 1, codes}, DType::f32);
  if (p.bias.data) c.strided("bias", p.bias, {1, 1, 1, tokens}, DType::f32);
  c.contiguous("order", p.order, {1, 1, 1, tokens}, DType::i32);
  c.contiguous("offsets", p.offsets, {1, 1, 1, codes + 1}, DType::i64);
  c.contiguous("out", p.out, {1, 1, 1, rows}, DType::i64);
}

inline void check_fields(const Checks& c, const VocabBestParams& p) {
  c.floating("x", p.x);
  const int64_t rows = p.scores.size[2], codes = p.scores.size[3], width = p.x.size[3];
  c.tensor("scores", p.scores, {1, 1, rows, codes}, DType::f32);
  c.tensor("x", p.x, {1, 1, rows, width}, p.x.dtype);
  c.tensor("codebook", p.codebook, {1, 1, codes, width}, p.x.dtype);
  c.contiguous("offset", p.offset, {1, 1, 1, codes}, DType::f64);
  if (p.ids.data) c.contiguous("ids", p.ids, {1, 1, 1, codes}, DType::i64);
  c.contiguous("out", p.out, {1, 1, 1, rows}, DType::i64);
}

inline void check_fields(const Checks& c, const VocabDotsParams& p) {
  c.floating("x", p.x);
  const int64_t rows = p.x.size[2], width = p.x.size[3], codes = p.codebook.size[2];
  c.tensor("x", p.x, {1, 1, rows, width}, p.x.dtype);
  c.tensor("codebook", p.codebook, {1, 1, codes, width}, p.x.dtype);
  c.tensor("out", p.out, {1, 1, rows, codes}, DType::f32);
  if (p.squares.data) c.strided("squares", p.squares, {1, 1, 1, codes}, DType::f32);
}

inline void check_fields(const Checks& c, const VocabExpandParams& p) {
  c.floating("logits", p.logits);
  const int64_t rows = p.logits.size[2], tokens = p.logits.size[3];
  c.tensor("logits", p.logits, {1, 1, rows, tokens}, p.logits.dtype);
  c.tensor("scores", p.scores, {1, 1, rows, p.scores.size[3]}, DType::f32);
  c.integers("codes", p.codes, tokens);
  if (p.bias.data) c.contiguous("bias", p.bias, {1, 1, 1, tokens}, DType::f32);
}

// --- products --------------------------------------------------------------------------------------------------------

inline void check_fields(const Checks& c, const DigestParams& p) {
  c.contiguous("source", p.source, {1, 1, 1, p.source.size[3]}, DType::u8);
  c.contiguous("digest", p.digest, {1, 1, 1, 1}, DType::i64);
}

inline void check_fields(const Checks& c, const PackParams& p) {
  c.floating("source", p.source);
  c.tensor("source", p.source, {1, 1, p.source.size[2], p.source.size[3]}, p.source.dtype);
  const int64_t columns = p.source.size[p.transposed ? 3 : 2];
  c.in("parts", p.parts, 1, INT32_MAX);
  c.require(columns % p.parts == 0, "parts", "must divide the columns");
  if (!p.packed.data) return c.contiguous("bytes", p.bytes, {1, 1, 1, 1}, DType::i64);
  c.contiguous("packed", p.packed, {1, 1, 1, p.packed.size[3]}, DType::u8);
  c.in("packed's bytes", p.packed.size[3], 2 * p.source.size[2] * p.source.size[3], INT64_MAX);
}

inline void check_fields(const Checks& c, const LinearParams& p) {
  c.floating("x", p.x);
  c.floating("out", p.out);
  const int64_t rows = p.out.size[2], outputs = p.out.size[3];
  const int64_t inputs = p.transposed ? p.x.size[2] : p.x.size[2] * p.x.size[3];
  if (p.transposed)
    c.tensor("x", p.x, {1, 1, p.x.size[2], rows}, p.x.dtype);
  else
    c.require(p.x.size[0] * p.x.size[1] == rows, "x", "must have out's rows");
  c.tensor("out", p.out, {1, 1, rows, outputs}, p.out.dtype == DType::f32 ? DType::f32 : p.x.dtype);
  if (p.gate.data) c.like("gate", p.gate, p.x);
  if (p.residual.data) c.like("residual", p.residual, p.out);
  if (p.product.data) c.tensor("product", p.product, {1, 1, rows, 2 * outputs}, p.out.dtype);
  if (p.norm) c.contiguous("rstd", p.rstd, {1, 1, 1, rows}, DType::f32);
  c.contiguous("packed", p.packed, {1, 1, 1, p.packed.size[3]}, DType::u8);
  c.in("packed's bytes", p.packed.size[3], 2 * inputs * outputs * (p.gated_up ? 2 : 1), INT64_MAX);
  c.in("block_rows", p.block_rows, 1, limits::block);
  c.in("block_columns", p.block_columns, 1, limits::block);
  c.in("block_steps", p.block_steps, 1, limits::block);
}

inline void check_fields(const Checks& c, const PeakParams& p) {
  c.contiguous("sink", p.sink, {1, 1, 1, p.sink.size[3]}, DType::f32);
  c.in("sink's size", p.sink.size[3], p.threads, INT64_MAX);
  c.contiguous("operations", p.operations, {1, 1, 1, 1}, DType::i64);
}

// The parameters of a row kernel that has no check of its own: its tensors are floating and all of one size and dtype.
template <class P>
concept Elementwise =
    std::is_base_of_v<RowsParams, P> && !requires(const Checks& c, const P& p) { check_fields(c, p); };

// visit(name, tensor) of those that the kernel takes: a forward has no gradients, a backward no `out`.
template <Elementwise P, class Visit>
void visit_elementwise(bool backward, P& params, const Visit& visit) {
  const auto next = [&]<class T>(const char*& names, T& field) {
    const std::string_view name(names, std::strcspn(names, ","));
    names += name.size() + std::strspn(names + name.size(), ", ");
    if constexpr (std::is_same_v<T, Tensor>)
      if (backward ? name != "out" : name.substr(0, 5) != "grad_") visit(std::string(name), field);
  };
  params.fields([&](const char* names, auto&... field) { (next(names, field), ...); });
}
template <Elementwise P>
void check_elementwise(const Checks& c, P p) {
  const Tensor* first = nullptr;
  visit_elementwise(c.backward(), p, [&](const std::string& name, const Tensor& t) {
    first ? c.like(name.c_str(), t, *first) : c.floating(name.c_str(), t);
    if (!first) first = &t;
  });
}

// Throws std::invalid_argument unless the kernel of this name can run on p.
template <class P>
void check(const char* kernel, const P& p) {
  const Checks c(kernel);
  if constexpr (requires { p.threads; }) c.in("threads", p.threads, 1, 1 << 16);
  if constexpr (Elementwise<P>)
    check_elementwise(c, p);
  else
    check_fields(c, p);
}

}  // namespace fastattn
