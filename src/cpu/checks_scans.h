// The checks of scans and short convolutions: see checks.h.
#pragma once
#include "checks_words.h"

namespace fastattn {

// Checks the offsets of documents in a batch of one, if given; returns the number of sequences.
inline int64_t check_sequences(const Checks& c, const Tensor& cu_seqlens, int64_t batches, int64_t length) {
  if (!cu_seqlens.data) return batches;
  const int64_t count = cu_seqlens.size[3];
  c.contiguous("cu_seqlens", cu_seqlens, {1, 1, 1, count}, DType::i64);
  c.require(batches == 1, "cu_seqlens", "needs a batch of one");
  const int64_t* cuts = (const int64_t*)cu_seqlens.data;
  for (int64_t i = 0; i < count; i++) c.index("cu_seqlens", i, cuts[i], i ? cuts[i - 1] : 0, i ? length : 0);
  return count - 1;
}

inline void check_fields(const Checks& c, const CausalConv1dParams& p) {
  const int64_t batches = p.x.size[1], length = p.x.size[2], channels = p.x.size[3], taps = p.weight.size[3];
  const Size tokens{1, batches, length, channels};
  c.number("x", p.x);
  c.strided("x", p.x, tokens, p.x.dtype);
  c.in("weight's taps", taps, 1, limits::taps);
  c.in("slice", p.slice, 1, INT32_MAX);
  c.strided("weight", p.weight, {1, 1, channels, taps}, p.weight.dtype == DType::f32 ? DType::f32 : p.x.dtype);
  if (p.bias.data) c.strided("bias", p.bias, {1, 1, 1, channels}, p.bias.dtype == DType::f32 ? DType::f32 : p.x.dtype);
  const int64_t sequences = check_sequences(c, p.cu_seqlens, batches, length);
  const Size states{1, sequences, taps - 1, channels};
  if (p.initial_state.data) c.strided("initial_state", p.initial_state, states, p.x.dtype);
  if (!c.backward()) {
    c.contiguous("out", p.out, tokens, p.x.dtype);
    if (p.state.data) c.contiguous("state", p.state, states, p.x.dtype);
    return;
  }
  c.strided("grad_out", p.grad_out, tokens, p.x.dtype);
  c.contiguous("grad_x", p.grad_x, tokens, p.x.dtype);
  if (p.grad_state.data) c.contiguous("grad_state", p.grad_state, states, p.x.dtype);
  if (p.grad_initial_state.data) c.contiguous("grad_initial_state", p.grad_initial_state, states, p.x.dtype);
  const int64_t slices = (length + p.slice - 1) / p.slice;
  c.contiguous("grad_sums", p.grad_sums, {batches, slices, taps + 1, channels}, DType::f32);
}

// A contiguous tensor, or for pairs the view of its real parts.
inline void check_dense(const Checks& c, const char* field, Tensor t, const Size& size, DType dtype, int pairs) {
  for (int i = 0; i < 4 && pairs; i++) {
    c.require(t.size[i] == 1 || t.stride[i] % 2 == 0, field, "must be the real parts of complex numbers");
    t.stride[i] /= 2;
  }
  c.contiguous(field, t, size, dtype);
}

inline void check_fields(const Checks& c, const LinearScanParams& p) {
  const Tensor& like = c.backward() ? p.grad_out : p.b;
  const Size tokens = Checks::size_of(like);
  const int64_t batches = tokens.of[0] * tokens.of[1], length = tokens.of[2], channels = tokens.of[3];
  const char* name = c.backward() ? "grad_out" : "b";
  c.in("pairs", p.pairs, 0, 1);
  c.number(name, like);
  c.require(!p.pairs || like.dtype == DType::f32, name, "must be float32 where it has pairs");
  const auto strided = [&](const char* field, const Tensor& t, DType dtype) {
    c.strided(field, t, tokens, dtype);
    for (int i = 0; i < 4 && p.pairs; i++)
      c.require(t.size[i] == 1 || t.stride[i] % 2 == 0, field, "must be the real parts of complex numbers");
  };
  strided(name, like, like.dtype);
  strided("a", p.a, p.a.dtype == DType::f32 ? DType::f32 : like.dtype);
  c.require(!p.pairs || !p.log_a, "log_a", "is not served with pairs");
  c.in("slice", p.slice, 1, limits::scan_slice);
  c.in("segments", p.segments, 1, length > 1 ? length : 1);
  c.require(p.segments == 1 || !p.cu_seqlens.data, "segments", "must be 1 with documents");
  const int64_t sequences = check_sequences(c, p.cu_seqlens, batches, length);
  const Size states{1, 1, sequences, channels};
  if (p.initial.data) check_dense(c, "initial", p.initial, states, DType::f32, p.pairs);
  check_dense(c, "out", p.out, tokens, like.dtype, p.pairs);
  if (!c.backward()) return;
  check_dense(c, "grad_b", p.grad_b, tokens, like.dtype, p.pairs);
  if (p.grad_initial.data) check_dense(c, "grad_initial", p.grad_initial, states, DType::f32, p.pairs);
  if (!p.grad_a.data) return;
  c.in("grad_a_kind", p.grad_a_kind, 0, 2);
  const int64_t panels = (channels + p.slice - 1) / p.slice;
  const Size of_kind[] = {tokens, {1, panels, batches, length}, {1, sequences, p.segments, channels}};
  check_dense(c, "grad_a", p.grad_a, of_kind[p.grad_a_kind], p.grad_a_kind ? DType::f32 : p.a.dtype, p.pairs);
}

inline void check_fields(const Checks& c, const SelectiveScanParams& p) {
  const int64_t batches = p.u.size[1], length = p.u.size[2], channels = p.u.size[3], states = p.A.size[3];
  const DType f32 = DType::f32;
  const Size tokens{1, batches, length, channels}, numbers{1, batches, length, states}, of_channels{1, 1, 1, channels};
  c.number("u", p.u);
  c.strided("u", p.u, tokens, p.u.dtype);
  c.strided("dt", p.dt, tokens, p.u.dtype);
  c.in("A's last dimension", states, 1, INT32_MAX);
  c.contiguous("A", p.A, {1, 1, channels, states}, f32);
  c.strided("B", p.B, numbers, p.u.dtype);
  c.strided("C", p.C, numbers, p.u.dtype);
  if (p.D.data) c.contiguous("D", p.D, of_channels, f32);
  if (p.z.data) c.strided("z", p.z, tokens, p.u.dtype);
  if (p.dt_bias.data) c.contiguous("dt_bias", p.dt_bias, of_channels, f32);
  c.in("interval", p.interval, 2, limits::block);
  c.in("slice", p.slice, 1, limits::block);
  const int64_t sequences = check_sequences(c, p.cu_seqlens, batches, length);
  const Size state{1, sequences, channels, states};
  if (p.initial_state.data) c.contiguous("initial_state", p.initial_state, state, f32);
  const Size kept{batches, (length + p.interval - 1) / p.interval, states, channels};
  if (p.checkpoints.data || c.backward()) c.contiguous("checkpoints", p.checkpoints, kept, f32);
  if (!c.backward()) {
    c.contiguous("out", p.out, tokens, p.u.dtype);
    if (p.state.data) c.contiguous("state", p.state, state, f32);
    return;
  }
  c.strided("grad_out", p.grad_out, tokens, p.u.dtype);
  if (p.grad_state.data) c.contiguous("grad_state", p.grad_state, state, f32);
  c.contiguous("grad_u", p.grad_u, tokens, p.u.dtype);
  c.contiguous("grad_dt", p.grad_dt, tokens, p.u.dtype);
  c.contiguous("grad_A", p.grad_A, {1, batches, states, channels}, f32);
  const Size by_slice{(channels + p.slice - 1) / p.slice, batches, length, states};
  c.contiguous("grad_B", p.grad_B, by_slice, f32);
  c.contiguous("grad_C", p.grad_C, by_slice, f32);
  const Size by_batch{1, 1, batches, channels};
  if (p.grad_D.data) c.contiguous("grad_D", p.grad_D, by_batch, f32);
  if (p.z.data) c.contiguous("grad_z", p.grad_z, tokens, p.u.dtype);
  if (p.grad_dt_bias.data) c.contiguous("grad_dt_bias", p.grad_dt_bias, by_batch, f32);
  if (p.grad_initial_state.data) c.contiguous("grad_initial_state", p.grad_initial_state, state, f32);
}

}  // namespace fastattn
