// The log-sum-exp of rows, for the ops that are built from attention's parts, and the contribution of its gradient.
#pragma once

#include "attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The numbers (rows) of one head in a tensor (B, H, Lq) f32, `stride` apart.
FASTATTN_INLINE float* rows_of(const Tensor& t, const Sequence& s, int64_t head) {
  return (float*)t.data + s.batch * t.stride[1] + head * t.stride[2] + s.q_begin * t.stride[3];
}

// The value of row `row` from its maximum and the sum of its weights relative to it; -inf if no key is attended.
FASTATTN_INLINE void store_lse(const AttentionParams& p, const Sequence& s, int64_t head, int64_t row, float top,
                               float c, float sum) {
  if (!p.lse.data) return;
  const double lse = __builtin_log((double)sum) + (sum == 0 ? 0 : divisor_exponent(top, c) * kLn2Double);
  rows_of(p.lse, s, head)[row * p.lse.stride[3]] = (float)lse;
}

// Subtracts the gradient of the log-sum-exps from delta (count) of rows from `first` on, because dS = P (dP - delta).
FASTATTN_INLINE void take_grad_lse(float* delta, const AttentionParams& p, const Sequence& s, int64_t head,
                                   int64_t first, int64_t count) {
  if (!p.grad_lse.data) return;
  const float* gradient = rows_of(p.grad_lse, s, head);
  for (int64_t i = 0; i < count; i++) delta[i] -= gradient[(first + i) * p.grad_lse.stride[3]];
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
