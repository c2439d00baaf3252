// The row kernel between a loss's matrix products: bias, softcap, temperature, loss and gradient in place.
#pragma once
#include "params.h"

namespace fastattn {
namespace cuda {

// STABLEMAX: softmax of symlog(x / tau).
template <bool STABLEMAX>
struct VocabLogit {
  float x, slope;  // x over the temperature for STABLEMAX only
  FASTATTN_DEVICE VocabLogit(const VocabRowsParams& p, const float* row, int64_t i, float tau) : x(row[i]), slope(1) {
    if (p.bias) x += p.bias[i];
    if (p.softcap > 0) {
      const float bend = tanhf(x / p.softcap);
      x = p.softcap * bend;
      slope = 1 - bend * bend;
    }
    if (STABLEMAX) x /= tau;
  }
};

template <bool STABLEMAX>
FASTATTN_DEVICE float vocab_log_weight(float x, float tau) {
  if (!STABLEMAX) return x / tau;
  return x >= 0 ? log1pf(x) : -log1pf(-x);
}
// The logarithm of x's weight relative to `top`'s. Neither is divided by the temperature first, and no log-sum-exp is
// subtracted: each would be rounded at its own magnitude.
template <bool STABLEMAX>
FASTATTN_DEVICE float vocab_distance(float x, float top, float tau) {
  if (!STABLEMAX) return (x - top) / tau;
  return vocab_log_weight<true>(x, tau) - vocab_log_weight<true>(top, tau);
}

template <bool STABLEMAX, int THREADS>
FASTATTN_KERNEL(THREADS)
vocab_rows(VocabRowsParams p) {
  using Logit = VocabLogit<STABLEMAX>;
  __shared__ float scratch[THREADS / kWarp];
  for (int64_t row = block(); row < p.rows; row += blocks()) {
    float* x = p.logits + row * p.row_stride;
    const int64_t target = p.target[row];
    const float tau = p.temperature ? p.temperature[row] : 1.0f;
    if (target == p.ignore_index) {
      if (p.grad) {
        for (int64_t i = thread(); i < p.classes; i += threads()) x[i] = 0;
        if (thread() == 0 && p.grad_temperature) p.grad_temperature[row] = 0;
      }
      if (thread() == 0) p.loss[row] = p.largest[row] = p.total[row] = 0;
      continue;
    }
    // Read before the barriers of the sums, hence before any thread overwrites it with a gradient. An invalid target,
    // which the host cannot see without waiting, makes the loss NaN.
    const bool known = target >= 0 && target < p.classes;
    const float picked = known ? Logit(p, x, target, tau).x : sqrtf(-1.0f);
    float top = kLowest, total = 0;
    for (int64_t i = thread(); i < p.classes; i += threads()) top = fmaxf(top, Logit(p, x, i, tau).x);
    top = block_max(top, scratch);
    for (int64_t i = thread(); i < p.classes; i += threads())
      total += expf(vocab_distance<STABLEMAX>(Logit(p, x, i, tau).x, top, tau));
    total = block_sum(total, scratch);
    const float log_top = vocab_log_weight<STABLEMAX>(top, tau);
    const float lse = p.z_loss > 0 ? log_top + logf(total) : 0;
    if (thread() == 0) {
      p.largest[row] = top;
      p.total[row] = total;
      p.loss[row] = logf(total) - vocab_distance<STABLEMAX>(picked, top, tau) + p.z_loss * lse * lse;
    }
    if (!p.grad) continue;
    const float upstream = p.grad[row], spread = 2 * p.z_loss * lse * upstream, factor = (upstream + spread) / total;
    float products = 0;
    for (int64_t i = thread(); i < p.classes; i += threads()) {
      const Logit logit(p, x, i, tau);
      const float distance = vocab_distance<STABLEMAX>(logit.x, top, tau);
      float g = expf(distance) * factor - (i == target ? upstream : 0.0f);
      if (STABLEMAX) g /= 1 + fabsf(logit.x);
      // a softmax's gradients sum to `spread`; distances to the largest logit are small where gradients are large
      if (g != 0) products += g * (STABLEMAX ? logit.x : distance);
      x[i] = g / tau * logit.slope;
    }
    if (p.grad_temperature) {
      products = block_sum(products, scratch);
      if (!STABLEMAX && spread != 0) products += spread * log_top;
      if (thread() == 0) p.grad_temperature[row] = -products / tau;
    }
  }
}

}  // namespace cuda
}  // namespace fastattn
