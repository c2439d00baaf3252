// What a kernel takes for granted of its parameters: tensors that are there, their sizes, dtypes and strides, codes and
// numbers, and what index tensors hold, which addresses memory. Checked before every call, in a fraction of a
// microsecond: a compiled graph reaches kernels without the checks of a public function.
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "limits.h"
#include "params.h"
#include "attention_score.h"

namespace fastattn {

struct Size {
  int64_t of[4];
};

// A kernel's name, and what it refuses. Tensors are four-dimensional, missing leading dimensions of size 1.
class Checks {
 public:
  explicit Checks(const char* kernel) : kernel_(kernel), backward_(ends_with(kernel, "_backward")) {}

  bool backward() const { return backward_; }

  void require(bool holds, const char* field, const char* rule) const {
    if (!holds) refuse(field, rule);
  }
  void in(const char* field, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high)
      refuse(field,
             "must lie in [" + std::to_string(low) + ", " + std::to_string(high) + "], given " + std::to_string(value));
  }
  // A tensor of this size and dtype, elements of the last dimension side by side; one without elements may be absent.
  void tensor(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    strided(field, t, size, dtype);
    side_by_side(field, t);
  }
  // The same, of any strides.
  void strided(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    bool same = true, empty = false;
    for (int i = 0; i < 4; i++) same &= t.size[i] == size.of[i], empty |= size.of[i] == 0;
    if (!t.data && !empty) refuse(field, "is needed");
    if (!same && t.data) refuse(field, "must have sizes " + text(size.of) + ", given " + text(t.size));
    if (t.dtype != dtype && t.data) refuse(field, "has another dtype than the kernel takes");
  }
  static bool empty(const Tensor& t) { return !(t.size[0] && t.size[1] && t.size[2] && t.size[3]); }
  void side_by_side(const char* field, const Tensor& t) const {
    if (t.stride[3] != 1 && t.size[3] > 1 && !empty(t))
      refuse(field, "must have the elements of its last dimension side by side");
  }
  // The same, all elements side by side.
  void contiguous(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    strided(field, t, size, dtype);
    if (empty(t)) return;  // nothing is read, whatever the strides
    int64_t stride = 1;
    for (int i = 3; i >= 0; i--) {
      if (t.size[i] > 1 && t.stride[i] != stride) refuse(field, "must be contiguous");
      stride *= t.size[i];
    }
  }
  void like(const char* field, const Tensor& t, const Tensor& other) const {
    tensor(field, t, size_of(other), other.dtype);
  }
  // float32, bfloat16 or float16, the elements of the last dimension side by side.
  void floating(const char* field, const Tensor& t) const {
    if (t.dtype != DType::f32 && t.dtype != DType::bf16 && t.dtype != DType::f16)
      refuse(field, "must be float32, bfloat16 or float16");
    tensor(field, t, size_of(t), t.dtype);
  }
  // `count` int32 or int64 of any stride.
  void integers(const char* field, const Tensor& t, int64_t count) const {
    strided(field, t, {1, 1, 1, count}, t.dtype);
    require(t.dtype == DType::i32 || t.dtype == DType::i64, field, "must be int32 or int64");
  }

  // An entry of an index tensor; the public name of what holds it is enough.
  static void index(const char* name, int64_t position, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      throw std::invalid_argument("fastattn: " + std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                  std::to_string(high) + "], given " + std::to_string(value) + " at position " +
                                  std::to_string(position));
  }

  static Size size_of(const Tensor& t) { return {t.size[0], t.size[1], t.size[2], t.size[3]}; }

 private:
  const char* kernel_;
  bool backward_;

  static bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
  }
  static std::string text(const int64_t* sizes) {
    std::string result;
    for (int i = 0; i < 4; i++) result += (i ? ", " : "(") + std::to_string(sizes[i]);
    return result + ")";
  }
  [[noreturn]] void refuse(const char* field, const std::string& rule) const {
    throw std::invalid_argument("fastattn." + std::string(kernel_) + ": " + field + " " + rule);
  }
};

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

// --- attention -------------------------------------------------------------------------------------------------------

// The mask of scores (batch, heads, rows, keys).
inline void check_mask(const Checks& c, const MaskParams& p, const Size& scores) {
  const int64_t batch = scores.of[0], rows = scores.of[2], keys = scores.of[3];
  if (p.dense.data) c.tensor("dense", p.dense, scores, DType::u8);
  const bool packed = p.cu_seqlens_q.data;
  c.require(packed == (p.cu_seqlens_k.data != nullptr), "cu_seqlens_k", "goes with cu_seqlens_q");
  c.require(!packed || batch == 1, "cu_seqlens_q", "needs a batch of one");
  const int64_t entries = p.cu_seqlens_q.size[3], sequences = packed ? entries - 1 : batch;
  const auto entry = [](const Tensor& t, int64_t i) { return (int64_t)((const int32_t*)t.data)[i]; };
  const auto offsets = [&](const char* name, const Tensor& t, int64_t length) {
    c.contiguous(name, t, {1, 1, 1, entries}, DType::i32);
    for (int64_t i = 0; i < entries; i++) c.index(name, i, entry(t, i), i ? entry(t, i - 1) : 0, i ? length : 0);
  };
  if (packed) {
    c.in("cu_seqlens_q's entries", entries, 1, INT64_MAX);
    offsets("cu_seqlens_q", p.cu_seqlens_q, rows);
    offsets("cu_seqlens_k", p.cu_seqlens_k, keys);
  }
  const auto lengths = [&](const char* name, const Tensor& t, bool aligned) {
    if (!t.data) return;
    c.contiguous(name, t, {1, 1, 1, sequences}, DType::i32);
    for (int64_t i = 0; i < sequences; i++) {
      const int64_t most = packed ? entry(p.cu_seqlens_k, i + 1) - entry(p.cu_seqlens_k, i) : keys;
      const int64_t given = entry(t, i), length = aligned ? length_of(given) : given;
      c.index(name, i, length > most ? given : length, 0, most);
    }
  };
  lengths("prefix_lengths", p.prefix_lengths, false);
  lengths("key_lengths", p.key_lengths, true);
  c.in("window_left", p.window_left, INT64_MIN, limits::length);
  c.in("window_right", p.window_right, INT64_MIN, limits::length);
}

// What every kind of attention takes.
inline void check_attention(const Checks& c, const AttentionParams& p) {
  c.floating("q", p.q);
  const int64_t batch = p.q.size[0], heads = p.q.size[1], rows = p.q.size[2], head_dim = p.q.size[3];
  const int64_t kv_heads = p.k.size[1], keys = p.k.size[2], value_dim = p.v.size[3];
  c.in("k's heads", kv_heads, 1, INT64_MAX);
  c.require(heads % kv_heads == 0, "k", "must have a number of heads that divides q's");
  c.in("q's last dimension", head_dim, 1, limits::head_dim);
  c.in("v's last dimension", value_dim, 1, limits::head_dim);
  c.in("q's length", rows, 0, limits::length);
  c.in("k's length", keys, 0, limits::length);
  c.tensor("k", p.k, {batch, kv_heads, keys, head_dim}, p.q.dtype);
  c.tensor("v", p.v, {batch, kv_heads, keys, value_dim}, p.q.dtype);
  c.tensor("out", p.out, {batch, heads, rows, value_dim}, p.q.dtype);
  if (c.backward()) {
    c.like("grad_out", p.grad_out, p.out);
    if (p.grad_lse.data) c.strided("grad_lse", p.grad_lse, {1, batch, heads, rows}, DType::f32);
    c.like("grad_q", p.grad_q, p.q);
    c.like("grad_k", p.grad_k, p.k);
    c.like("grad_v", p.grad_v, p.v);
  }
  if (p.bias.data) c.tensor("bias", p.bias, {batch, heads, rows, keys}, p.q.dtype);
  check_mask(c, p, {batch, heads, rows, keys});
  c.in("block_q", p.block_q, 1, limits::block);
  c.in("block_k", p.block_k, 1, limits::block);
  c.in("pack_kib", p.pack_kib, 0, INT32_MAX);
  c.in("chunk_k", p.chunk_k, 1, limits::length);
  c.require(!std::isnan(p.bias_value), "bias_value", "must be a number");
  // kernels multiply by both at once
  c.require(!std::isfinite((float)p.scale) || std::isfinite((float)(p.scale * 1.4426950408889634)), "scale",
            "must be a float32 with log2(e) as a factor too");
  if (p.tile_class.data) {
    c.tensor("tile_class", p.tile_class, {batch, heads, p.tile_class.size[2], p.tile_class.size[3]}, DType::u8);
    c.in("tile_class's rows", p.tile_class.size[2], (rows + p.block_q - 1) / p.block_q, INT64_MAX);
    c.in("tile_class's columns", p.tile_class.size[3], (keys + p.block_k - 1) / p.block_k, INT64_MAX);
    c.require(!p.cu_seqlens_q.data, "tile_class", "is of no packed documents");
  }
}

// What only attention itself has.
inline void check_no_options(const Checks& c, const AttentionParams& p) {
  c.require(!p.residual.data, "residual", "is not served");
  c.require(!p.sink.data, "sink", "is not served");
  c.require(p.softcap == 0, "softcap", "is not served");
  c.require(p.dropped == 0, "dropped", "is not served");
  c.require(!p.grad_bias.data, "grad_bias", "is not served");
  c.require(!p.grad_row_bias.data, "grad_row_bias", "is not served");
  c.require(!p.distances.data, "distances", "is not served");
}
inline void check_options(const Checks& c, const AttentionParams& p) {
  const int64_t heads = p.q.size[1];
  c.require(p.softcap >= 0 && std::isfinite((float)p.softcap), "softcap", "must be finite and 0 at least");
  c.require(p.softcap == 0 || (float)p.softcap >= 0x1p-100f, "softcap", "must be 0 or 2^-100 at least");
  if (p.residual.data) {
    c.require(p.q.dtype != DType::f32, "residual", "is of 16-bit outputs");
    c.like("residual", p.residual, p.out);
  }
  c.in("dropped", p.dropped, 0, limits::dropped);
  if (p.dropped > 0) c.contiguous("rng", p.rng, {1, 1, 1, 2}, DType::i64);
  if (p.sink.data) {
    c.require(p.score == 0, "sink", "goes with softmax");
    c.strided("sink", p.sink, {1, 1, 1, heads}, DType::f32);
  }
  if (p.grad_sink.data) {
    c.require(p.sink.data, "grad_sink", "goes with sink");
    c.strided("grad_sink", p.grad_sink, {1, p.q.size[0], heads, p.q.size[2]}, DType::f32);
  }
  if (p.distances.data) {
    const Size by_distance{1, 1, heads, p.q.size[2] + p.k.size[2] - 1};
    c.require(!p.bias.data, "distances", "go without bias");
    c.tensor("distances", p.distances, by_distance, DType::f32);
    if (p.grad_distances.data) c.contiguous("grad_distances", p.grad_distances, by_distance, DType::f32);
  }
  c.require(p.distances.data || !p.grad_distances.data, "grad_distances", "goes with distances");
  if (p.grad_bias.data) {
    c.require(p.bias.data, "grad_bias", "goes with bias");
    const bool summed = p.grad_bias.dtype == DType::f32;
    c.tensor("grad_bias", p.grad_bias, Checks::size_of(p.bias), summed ? DType::f32 : p.bias.dtype);
    c.in("bias_parts", p.bias_parts, 1, summed ? INT32_MAX : 1);
    c.in("bias_part", p.bias_part, p.bias_parts > 1 ? 1 : 0, INT64_MAX);
  }
  if (p.grad_row_bias.data) {
    c.require((p.bias.data || p.k.size[2] == 0) && !p.grad_bias.data, "grad_row_bias",
              "goes with bias, and without grad_bias");
    c.strided("grad_row_bias", p.grad_row_bias, {1, p.q.size[0], heads, p.q.size[2]}, DType::f32);
  }
}

// What the forward finds of each row and the backward reads.
inline void check_state(const Checks& c, const AttentionParams& p) {
  c.contiguous("state", p.state, {p.q.size[0], p.q.size[1], p.q.size[2], 2}, DType::f32);
}

// The log-sum-exp that a forward may give.
inline void check_lse(const Checks& c, const AttentionParams& p) {
  if (!c.backward() && p.lse.data) c.tensor("lse", p.lse, {1, p.q.size[0], p.q.size[1], p.q.size[2]}, DType::f32);
}

inline void check_fields(const Checks& c, const AttentionParams& p) {
  c.in("score", p.score, 0, AnyScores::kCount - 1);
  check_attention(c, p);
  check_options(c, p);
  if (!AnyScores::normalised(p.score)) return;
  // a forward whose caller reads neither leaves them out
  if (c.backward() || p.state.data) check_state(c, p);
  if (!c.backward() && !p.lse.data) return;
  const Size by_row{1, p.q.size[0], p.q.size[1], p.q.size[2]};
  c.strided("lse", p.lse, by_row, DType::f32);
  if (!c.backward()) c.tensor("lse", p.lse, by_row, DType::f32);
}

inline void check_fields(const Checks& c, const LssaParams& p) {
  check_attention(c, p);
  check_no_options(c, p);
  c.contiguous("statistics", p.statistics, {p.q.size[0], p.q.size[1], p.q.size[2], 3}, DType::f32);
  c.require(!p.reweigh || (p.power >= 1 && std::isfinite(p.power)), "power", "must be finite and 1 at least");
  c.require(!p.reweigh || !p.grad_lse.data, "grad_lse", "is not served with reweigh");
}

inline void check_fields(const Checks& c, const GroupedParams& p) {
  check_attention(c, p);
  c.require(p.causal, "causal", "must be set");
  check_no_options(c, p);
  check_state(c, p);
  check_lse(c, p);
  c.contiguous("groups", p.groups, {1, 1, p.q.size[0], p.q.size[2]}, DType::i64);
  c.contiguous("key_groups", p.key_groups, {1, 1, p.q.size[0], p.k.size[2]}, DType::i64);
  c.in("window", p.window, 0, limits::length);
}

inline void check_fields(const Checks& c, const GatedParams& p) {
  check_attention(c, p);
  c.require(p.causal, "causal", "must be set");
  check_no_options(c, p);
  check_state(c, p);
  check_lse(c, p);
  const int64_t batch = p.q.size[0], rows = p.q.size[2], groups = p.assignment.size[3];
  c.require(p.k.size[2] == rows, "k", "must have q's length");
  c.in("assignment's groups", groups, 1, INT32_MAX);
  c.contiguous("assignment", p.assignment, {1, batch, rows, groups}, DType::f32);
  c.strided("sharpness", p.sharpness, {1, 1, 1, 1}, DType::f32);
  c.in("window", p.window, 0, limits::length);
  c.in("gate", p.gate, 0, 1);
  // logarithms of gates are divided by it
  c.require(p.scale == 0 || !(std::fabs(p.scale) < 0x1p-100), "scale", "must be 0 or beyond 2^-100");
  if (!c.backward()) return;
  c.contiguous("grad_query_assignment", p.grad_query_assignment, {batch, p.q.size[1], rows, groups}, DType::f32);
  c.contiguous("grad_key_assignment", p.grad_key_assignment, {batch, p.k.size[1], rows, groups}, DType::f32);
  c.contiguous("grad_sharpness", p.grad_sharpness, {1, batch, p.q.size[1], rows}, DType::f32);
}

inline void check_fields(const Checks& c, const SinkhornParams& p) {
  const int64_t rows = p.scores.size[2], groups = p.scores.size[3], sequences = p.begins.size[3];
  c.floating("scores", p.scores);
  c.in("scores' groups", groups, 1, limits::groups);
  c.contiguous("scores", p.scores, {1, 1, rows, groups}, p.scores.dtype);
  c.contiguous("begins", p.begins, {1, 1, 1, sequences}, DType::i64);
  c.contiguous("counts", p.counts, {1, 1, 1, sequences}, DType::i64);
  c.require(p.causal || !p.prefixes.data, "prefixes", "go with causal");
  if (p.prefixes.data) c.contiguous("prefixes", p.prefixes, {1, 1, 1, sequences}, DType::i64);
  c.contiguous("out", p.out, {1, 1, rows, groups}, p.scores.dtype);
  if (c.backward())
    c.contiguous("grad", p.grad, {1, 1, rows, groups}, p.scores.dtype);
  else
    c.contiguous("potentials", p.potentials, {1, sequences, 1, groups}, DType::f32);
  c.require(p.temperature > 0, "temperature", "must be more than zero");
  c.in("iterations", p.iterations, 1, limits::iterations);
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t begin = ((const int64_t*)p.begins.data)[i];
    c.index("cu_seqlens", i, begin, 0, rows);
    const int64_t count = ((const int64_t*)p.counts.data)[i];
    c.index("lengths", i, count, 0, rows - begin);
    if (p.prefixes.data) c.index("prefix_lengths", i, ((const int64_t*)p.prefixes.data)[i], 0, count);
  }
}

inline void check_fields(const Checks& c, const TileClassParams& p) {
  if (p.mask.dtype != DType::u8) c.floating("mask", p.mask);
  c.tensor("mask", p.mask, Checks::size_of(p.mask), p.mask.dtype);
  c.in("block_q", p.block_q, 1, limits::block);
  c.in("block_k", p.block_k, 1, limits::block);
  const int64_t bands = p.classes.size[2], columns = p.classes.size[3];
  c.tensor("classes", p.classes, {p.mask.size[0], p.mask.size[1], bands, columns}, DType::u8);
  c.in("classes' rows", bands, (p.mask.size[2] + p.block_q - 1) / p.block_q, INT64_MAX);
  c.in("classes' columns", columns, (p.mask.size[3] + p.block_k - 1) / p.block_k, INT64_MAX);
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
