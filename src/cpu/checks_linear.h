// The checks of linear attention's parameters: see checks.h.
#pragma once
#include "checks_words.h"

namespace fastattn {

// q is (B, Hk, L, dk), v is (B, Hv, L, dv).
inline void check_linear_heads(const Checks& c, const Tensor& q, const Tensor& k, const Tensor& v) {
  c.floating("q", q);
  c.like("k", k, q);
  c.tensor("v", v, {q.size[0], v.size[1], q.size[2], v.size[3]}, q.dtype);
  c.in("q's last dimension", q.size[3], 1, limits::state_dim);
  c.in("v's last dimension", v.size[3], 1, limits::state_dim);
  c.require(q.size[1] ? v.size[1] % q.size[1] == 0 : v.size[1] == 0, "v", "must have a multiple of q's heads");
}

inline void check_fields(const Checks& c, const LinearAttentionParams& p) {
  check_linear_heads(c, p.q, p.k, p.v);
  const int64_t batch = p.q.size[0], heads = p.v.size[1], length = p.q.size[2], dk = p.q.size[3], dv = p.v.size[3];
  const int64_t columns = dv + (p.normalize ? 1 : 0);
  const Size gate{1, batch, heads, length};
  c.in("q's tokens", length, 0, limits::length);
  if (p.decay.data) c.strided("decay", p.decay, gate, DType::f32);
  if (p.channels.data) {
    c.floating("channels", p.channels);
    c.tensor("channels", p.channels, {batch, heads, length, dk}, p.channels.dtype);
    c.require(!p.decay.data, "channels", "is not served with decay");
  }
  if (p.beta.data) c.strided("beta", p.beta, gate, DType::f32);
  c.require(!(p.normalize && p.delta_rule), "normalize", "is not served with the delta rule");
  c.require(p.causal || !(p.decay.data || p.channels.data || p.beta.data || p.delta_rule), "causal",
            "is needed by decay, beta and the delta rule");
  c.in("head_parts", p.head_parts, 1, p.q.size[1] && heads ? heads / p.q.size[1] : 1);
  c.in("value_parts", p.value_parts, 1, p.normalize ? 1 : dv);
  int64_t sequences = batch, kept = p.causal ? (length + limits::chunk - 1) / limits::chunk : 1;
  if (p.offsets.data) {
    const int64_t documents = p.offsets.size[3] - 1;
    c.contiguous("offsets", p.offsets, {1, 1, 1, documents + 1}, DType::i64);
    c.require(batch == 1, "offsets", "needs a batch of one");
    const int64_t* cut = (const int64_t*)p.offsets.data;
    for (int64_t i = 0; i <= documents; i++) c.index("cu_seqlens", i, cut[i], i ? cut[i - 1] : 0, i ? length : 0);
    sequences = documents, kept = p.causal ? length / limits::chunk + documents : documents;
  }
  const Size state{sequences, heads, dk, columns}, states{batch, heads * kept, dk, columns};
  if (p.initial.data) c.tensor("initial", p.initial, state, DType::f32);
  if (p.states.data || c.backward()) c.tensor("states", p.states, states, DType::f32);
  if (!c.backward()) {
    c.like("out", p.out, p.v);
    return c.tensor("state", p.state, state, DType::f32);
  }
  const int64_t parts = p.head_parts * p.value_parts;
  c.like("grad_out", p.grad_out, p.v);
  if (p.grad_state.data) c.tensor("grad_state", p.grad_state, state, DType::f32);
  const Size keys{parts * batch, p.q.size[1], length, dk};
  const DType key_dtype = parts > 1 ? DType::f32 : p.q.dtype;
  c.tensor("grad_q", p.grad_q, keys, key_dtype);
  c.tensor("grad_k", p.grad_k, keys, key_dtype);
  c.like("grad_v", p.grad_v, p.v);
  const Size gates{p.value_parts, batch, heads, length};
  if (p.grad_decay.data) c.tensor("grad_decay", p.grad_decay, gates, DType::f32);
  c.require(!p.grad_decay.data || p.decay.data, "grad_decay", "needs decay");
  if (p.grad_channels.data)
    c.tensor("grad_channels", p.grad_channels, {p.value_parts * batch, heads, length, dk}, DType::f32);
  c.require(!p.grad_channels.data || p.channels.data, "grad_channels", "needs channels");
  if (p.grad_beta.data) c.tensor("grad_beta", p.grad_beta, gates, DType::f32);
  if (p.grad_initial.data) c.tensor("grad_initial", p.grad_initial, state, DType::f32);
}

inline void check_fields(const Checks& c, const LinearStepParams& p) {
  // one token: (1, B, H, D) for (B, H, 1, D)
  const int64_t batch = p.q.size[1], key_heads = p.q.size[2], heads = p.v.size[2], dk = p.q.size[3], dv = p.v.size[3];
  c.floating("q", p.q);
  c.tensor("q", p.q, {1, batch, key_heads, dk}, p.q.dtype);
  c.like("k", p.k, p.q);
  c.tensor("v", p.v, {1, batch, heads, dv}, p.q.dtype);
  c.in("q's last dimension", dk, 1, limits::state_dim);
  c.in("v's last dimension", dv, 1, limits::state_dim);
  c.require(key_heads ? heads % key_heads == 0 : heads == 0, "v", "must have a multiple of q's heads");
  const Size gate{1, 1, batch, heads};
  if (p.decay.data) c.strided("decay", p.decay, gate, DType::f32);
  if (p.channels.data) {
    c.floating("channels", p.channels);
    c.tensor("channels", p.channels, {1, batch, heads, dk}, p.channels.dtype);
    c.require(!p.decay.data, "channels", "is not served with decay");
  }
  if (p.beta.data) c.strided("beta", p.beta, gate, DType::f32);
  c.require(!(p.normalize && p.delta_rule), "normalize", "is not served with the delta rule");
  c.tensor("state", p.state, {batch, heads, dk, dv + (p.normalize ? 1 : 0)}, DType::f32);
  c.like("out", p.out, p.v);
}

}  // namespace fastattn
