// One token of each row through a hierarchical recurrence. Every product reads its weights once for all rows; values
// between products stay in float32 and in cache.
#pragma once
#include "attention_decode.h"
#include "matvec.h"
#include "rowwise.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE Tensor floats(float* data, int64_t a, int64_t b, int64_t rows, int64_t columns, int64_t stride_a,
                              int64_t stride_b, int64_t stride) {
  return {data, DType::f32, {a, b, rows, columns}, {stride_a, stride_b, stride, 1}};
}
FASTATTN_INLINE Tensor floats(float* data, int64_t rows, int64_t columns, int64_t stride) {
  return floats(data, 1, 1, rows, columns, 0, 0, stride);
}

template <class T>
struct DecodeStep {
  const DecodeStepParams& p;
  int64_t rows, hidden, heads, head_dim, width;
  float *z_h, *z_l, *x, *normed, *gqkv, *attended, *gate_up, *inner, *statistics;

  explicit DecodeStep(const DecodeStepParams& p)
      : p(p),
        rows(p.z_h.size[2]),
        hidden(p.z_h.size[3]),
        heads(p.keys.size[1]),
        head_dim(p.keys.size[3]),
        width(heads * head_dim) {
    with_scratch(1, [&](Arena& arena) { lay_out(arena); });
  }
  void lay_out(Arena& arena) {
    z_h = arena.take<float>(rows * hidden);
    z_l = arena.take<float>(rows * hidden);
    x = arena.take<float>(rows * hidden);
    normed = arena.take<float>(rows * hidden);
    gqkv = arena.take<float>(rows * 4 * width);
    attended = arena.take<float>(rows * width);
    gate_up = arena.take<float>(rows * 2 * p.inner);
    inner = arena.take<float>(rows * p.inner);
    statistics = arena.take<float>(rows * heads);
  }

  void norm(float* from, float* to) const {
    RmsNormParams q;
    q.x = floats(from, rows, hidden, hidden);
    q.normed = floats(to, rows, hidden, hidden);
    q.rstd = floats(statistics, rows, 1, 1);
    q.eps = p.eps;
    q.threads = p.threads;
    rms_norm_rows<float>(q);
  }
  // to (rows, outputs) = from (rows, inputs) W^T, or += it
  void product(int64_t layer, int which, const float* from, int64_t inputs, float* to, int64_t outputs,
               bool add) const {
    MatvecParams q;
    q.x = floats((float*)from, rows, inputs, inputs);
    q.weight = {(void*)((const int64_t*)p.weights.data)[layer * 4 + which],
                p.z_h.dtype,
                {1, 1, outputs, inputs},
                {0, 0, inputs, 1}};
    q.out = floats(to, rows, outputs, outputs);
    q.add = add;
    q.rows_at_once = p.rows_at_once;
    q.threads = p.threads;
    matvec_rows<T, float>(q);
  }
  template <class Gate>
  void gate(float* a, int64_t a_stride, float* b, int64_t b_stride, float* out, int64_t columns) const {
    GateParams q;
    q.a = floats(a, rows, columns, a_stride);
    q.b = floats(b, rows, columns, b_stride);
    q.out = floats(out, rows, columns, columns);
    q.threads = p.threads;
    gate_rows<Gate, float>(q);
  }

  // One projection of gqkv as (B, H, 1, D).
  Tensor by_head(int part) const {
    return floats(gqkv + part * width, rows, heads, 1, head_dim, 4 * width, head_dim, head_dim);
  }
  Tensor cached(const Tensor& t, int64_t slot) const {
    Tensor of = t;
    of.data = (T*)t.data + slot * rows * t.stride[0];
    of.size[0] = rows;
    of.size[2] = p.longest;
    return of;
  }
  void append(const Tensor& from, const Tensor& to) const {
    for (int64_t b = 0; b < rows; b++)
      for (int64_t h = 0; h < heads; h++) {
        const float* x = (const float*)from.data + b * from.stride[0] + h * from.stride[1];
        const int64_t at = ((const int32_t*)p.positions.data)[b];
        T* y = (T*)to.data + b * to.stride[0] + h * to.stride[1] + at * to.stride[2];
        for_columns(head_dim, [&](int64_t j, int n) { put(y + j, get(x + j, n), n); });
      }
  }
  void attend(int64_t slot) const {
    RotaryParams turn;
    turn.cos = p.cos;
    turn.sin = p.sin;
    turn.rows = p.rows;
    for (int part = 1; part <= 2; part++) {
      turn.x = turn.out = by_head(part);
      rotary_rows<float>(turn);
    }
    AttentionParams q;
    q.q = by_head(1);
    q.k = cached(p.keys, slot);
    q.v = cached(p.values, slot);
    append(by_head(2), q.k);
    append(by_head(3), q.v);
    q.out = floats(attended, rows, heads, 1, head_dim, width, head_dim, head_dim);
    q.lse = floats(statistics, 1, rows, heads, 1, 0, heads, 1);
    attend_first(q, p.lengths);
    q.scale = 1 / __builtin_sqrt((double)head_dim);
    q.threads = p.threads;
    forward_decoded<SoftmaxScore<Arithmetic>>(q);
  }

  void layer(int64_t index, int64_t slot) const {
    norm(x, normed);
    product(index, 0, normed, hidden, gqkv, 4 * width, false);
    attend(slot);
    gate<Gated>(gqkv, 4 * width, attended, width, attended, width);
    product(index, 1, attended, width, x, hidden, true);
    norm(x, normed);
    product(index, 2, normed, hidden, gate_up, 2 * p.inner, false);
    gate<SwiGlu>(gate_up, 2 * p.inner, gate_up + p.inner, 2 * p.inner, inner, p.inner);
    product(index, 3, inner, p.inner, x, hidden, true);
  }
  // z = rms(layers(z + other))
  void stack(int which, int64_t call, float* z, const float* other) const {
    for (int64_t i = 0; i < rows * hidden; i++) x[i] = z[i] + other[i];
    for (int64_t i = 0; i < p.layers; i++) layer(which * p.layers + i, call * p.layers + i);
    norm(x, z);
  }

  void run() const {
    for (int64_t b = 0; b < rows; b++) {
      for_columns(hidden, [&](int64_t j, int n) {
        put(z_h + b * hidden + j, get((const T*)p.z_h.data + b * p.z_h.stride[2] + j, n), n);
        put(z_l + b * hidden + j, get((const T*)p.z_l.data + b * p.z_l.stride[2] + j, n), n);
      });
    }
    int64_t call = 0;
    for (int h = 0; h < p.h_cycles; h++) {
      for (int l = 0; l < p.l_cycles; l++) stack(0, call++, z_l, z_h);
      stack(1, call++, z_h, z_l);
    }
    for (int64_t b = 0; b < rows; b++)
      for_columns(hidden, [&](int64_t j, int n) {
        put((T*)p.out.data + b * p.out.stride[2] + j, get(z_h + b * hidden + j, n), n);
      });
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
