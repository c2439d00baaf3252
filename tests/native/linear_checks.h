// Linear attention: each instruction set's results against the baseline's. Inputs are positive and keys small, so that
// what the delta rule takes off a value is less than half of it, and no result is much smaller than the terms of its
// sums, of which there are at most as many as a document has elements.
#pragma once
#include "row_checks.h"

namespace checks {

struct LinearCase {
  DType dtype;
  Variant variant;
  int decay;  // 0: none, 1: of a token, 2: of a channel
  bool delta, normalize, causal, packed;
  int64_t batch, key_heads, group, length, key_dim, value_dim, head_parts = 1, value_parts = 1;
};

// The sum of `parts` equal runs of a tensor: how columns are shared out to tasks follows the vectors' width.
inline Array summed(const Array& x, int64_t parts) {
  const int64_t count = x.count() / parts;
  Array sum = Array::full(DType::f32, {count}, 0);
  for (int64_t i = 0; i < x.count(); i++) sum.set(i % count, sum[i % count] + x[i]);
  return sum;
}

inline void check_linear(const KernelTable& kernels, const KernelTable& baseline, Report& report, const LinearCase& c) {
  const DType f32 = DType::f32;
  const int64_t B = c.batch, H = c.key_heads * c.group, L = c.length, dk = c.key_dim,
                columns = c.value_dim + c.normalize;
  const int64_t documents = c.packed ? 4 : B, parts = c.head_parts * c.value_parts;
  const int64_t kept = !c.causal ? (c.packed ? 4 : 1) : c.packed ? L / 64 + 4 : (L + 63) / 64;
  const Layout layout = c.variant.layout;
  const double size = 1 / std::sqrt(double(dk));
  Array q = Array::random(c.dtype, {B, c.key_heads, L, dk}, 0, size, layout),
        k = Array::random(c.dtype, {B, c.key_heads, L, dk}, 0, size, layout),
        v = Array::random(c.dtype, {B, H, L, c.value_dim}, 0, 1, layout),
        grad_out = Array::random(c.dtype, {B, H, L, c.value_dim}, 0, 1, layout),
        decay = Array::random(f32, {1, B, H, L}, -1, 0, layout),
        channels = Array::random(c.dtype, {B, H, L, dk}, -1, 0, layout),
        beta = Array::random(f32, {1, B, H, L}, 0, 0.5, layout),
        initial = Array::random(f32, {documents, H, dk, columns}, 0, 1, layout),
        grad_state = Array::random(f32, {documents, H, dk, columns}, 0, 1, layout),
        offsets = Array::of(DType::i64, {0, 0, L / 2, L / 2, L});
  decay.set(L / 3, -INFINITY), channels.set(L / 3 * dk, -INFINITY);
  const auto fill = [&](LinearAttentionParams& p) {
    p.q = q, p.k = k, p.v = v, p.initial = initial;
    if (c.decay == 1) p.decay = decay;
    if (c.decay == 2) p.channels = channels;
    if (c.causal) p.beta = beta;
    if (c.packed) p.offsets = offsets;
    p.scale = 0.5, p.delta_rule = c.delta, p.normalize = c.normalize, p.qk_norm = c.delta, p.causal = c.causal;
    p.head_parts = c.head_parts, p.value_parts = c.value_parts, p.threads = c.variant.threads;
  };
  const std::string of = " dtype " + std::to_string(int(c.dtype)) + " decay " + std::to_string(c.decay) +
                         (c.delta ? " delta" : "") + (c.normalize ? " normalized" : "") + (c.causal ? "" : " of all") +
                         " length " + std::to_string(L);
  const double roundings = double(L * std::max(dk, columns));
  const auto states = [&] { return Array::full(f32, {B, H * kept, dk, columns}, 0); };
  const auto forward = [&](const KernelTable& t, Outputs& o) {
    o = {Array(c.dtype, {B, H, L, c.value_dim}, layout), Array(f32, {documents, H, dk, columns}, layout), states()};
    LinearAttentionParams p;
    fill(p);
    p.out = o[0], p.state = o[1], p.states = o[2];
    check_fields(Checks("linear_attention_forward"), p);
    t.linear_attention_forward(p);
  };
  same(kernels, baseline, report, "linear attention" + of, roundings, 0, forward);
  Outputs known;
  forward(baseline, known);
  same(kernels, baseline, report, "linear attention backward" + of, roundings, 0,
       [&](const KernelTable& t, Outputs& o) {
         const DType keys = parts > 1 ? f32 : c.dtype;
         const auto gate = [&] { return Array(f32, {c.value_parts, B, H, L}); };
         o = {Array(keys, {parts * B, c.key_heads, L, dk}, parts > 1 ? Layout::contiguous : layout),
              Array(keys, {parts * B, c.key_heads, L, dk}), Array(c.dtype, {B, H, L, c.value_dim}, layout),
              Array(f32, {documents, H, dk, columns}, layout)};
         if (c.causal) o.push_back(gate());
         if (c.decay == 1) o.push_back(gate());
         if (c.decay == 2) o.push_back(Array(f32, {c.value_parts * B, H, L, dk}));
         LinearAttentionParams p;
         fill(p);
         p.states = known[2], p.grad_out = grad_out, p.grad_state = grad_state;
         p.grad_q = o[0], p.grad_k = o[1], p.grad_v = o[2], p.grad_initial = o[3];
         if (c.causal) p.grad_beta = o[4];
         if (c.decay == 1) p.grad_decay = o[5];
         if (c.decay == 2) p.grad_channels = o[5];
         check_fields(Checks("linear_attention_backward"), p);
         t.linear_attention_backward(p);
         if (parts > 1) o[0] = summed(o[0], parts), o[1] = summed(o[1], parts);
         for (size_t i = 4; i < o.size() && c.value_parts > 1; i++) o[i] = summed(o[i], c.value_parts);
       });
}

inline void check_linear_step(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                              Variant variant) {
  const int64_t B = 2, Hk = 2, H = 6, dk = 33;
  for (int kind = 0; kind < 4; kind++)
    for (const int64_t dv : {1, 19, 64, 130}) {
      const bool normalize = kind == 3;
      Array q = Array::random(dtype, {1, B, Hk, dk}, 0, 0.2), k = Array::random(dtype, {1, B, Hk, dk}, 0, 0.2),
            v = Array::random(dtype, {1, B, H, dv}, 0, 1), decay = Array::random(DType::f32, {1, 1, B, H}, -1, 0),
            channels = Array::random(dtype, {1, B, H, dk}, -1, 0),
            beta = Array::random(DType::f32, {1, 1, B, H}, 0, 0.5),
            state = Array::random(DType::f32, {B, H, dk, dv + normalize}, 0, 1, variant.layout);
      same(kernels, baseline, report, "linear attention step", 4 * dk + 16, 0, [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {1, B, H, dv}), state};
        LinearStepParams p;
        p.q = q, p.k = k, p.v = v, p.out = o[0], p.state = o[1], p.beta = beta, p.scale = 0.5;
        if (kind == 1) p.decay = decay;
        if (kind == 2) p.channels = channels;
        p.delta_rule = p.qk_norm = kind > 0 && !normalize, p.normalize = normalize, p.threads = variant.threads;
        check_fields(Checks("linear_attention_step"), p);
        t.linear_attention_step(p);
      });
    }
}

inline void check_linear_attention(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                                   Variant v) {
  for (int decay = 0; decay < 3; decay++)
    for (const bool delta : {false, true}) {
      check_linear(kernels, baseline, report, {dtype, v, decay, delta, false, true, false, 1, 1, 2, 131, 33, 20});
      check_linear(kernels, baseline, report, {dtype, v, decay, delta, false, true, true, 1, 2, 3, 101, 16, 72, 3, 2});
    }
  check_linear(kernels, baseline, report, {dtype, v, 1, false, true, true, false, 2, 1, 2, 70, 20, 64, 2});
  check_linear(kernels, baseline, report, {dtype, v, 2, false, true, true, true, 1, 1, 1, 70, 3, 1});
  check_linear(kernels, baseline, report, {dtype, v, 0, false, true, false, false, 2, 2, 1, 70, 9, 33});
  check_linear(kernels, baseline, report, {dtype, v, 0, false, false, false, true, 1, 2, 1, 70, 64, 5, 1, 1});
  check_linear_step(kernels, baseline, report, dtype, v);
}

}  // namespace checks
