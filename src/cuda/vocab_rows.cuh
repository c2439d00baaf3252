// The row kernel between a loss's matrix products: bias, softcap, temperature, log-sum-exp, loss and gradient in place.
#pragma once
#include "params.h"

namespace fastattn {
namespace cuda {

// STABLEMAX: softmax of symlog(x), whose weights x + 1 or 1 / (1 - x) need no maximum.
template <bool STABLEMAX>
struct VocabLogit {
  float x, slope;
  FASTATTN_DEVICE VocabLogit(const VocabRowsParams& p, const float* row, int64_t i, float tau) : x(row[i]), slope(1) {
    if (p.bias) x += p.bias[i];
    if (p.softcap > 0) {
      const float bend = tanhf(x / p.softcap);
      x = p.softcap * bend;
      slope = 1 - bend * bend;
    }
    x /= tau;
  }
  // the logarithm of the unnormalised weight
  FASTATTN_DEVICE float log_weight() const {
    if (!STABLEMAX) return x;
    return x >= 0 ? log1pf(x) : -log1pf(-x);
  }
};

template <bool STABLEMAX, int THREADS>
FASTATTN_KERNEL(THREADS)
vocab_rows(VocabRowsParams p) {
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
      if (thread() == 0) p.loss[row] = p.lse[row] = 0;
      continue;
    }
    // Read before the barriers of the sums, and so before any thread writes a gradient over it. A target of no class,
    // which the host cannot see without waiting, makes the loss NaN.
    const bool known = target >= 0 && target < p.classes;
    const float picked = known ? VocabLogit<STABLEMAX>(p, x, target, tau).log_weight() : sqrtf(-1.0f);
    LogSum sum;
    for (int64_t i = thread(); i < p.classes; i += threads())
      sum.add(VocabLogit<STABLEMAX>(p, x, i, tau).log_weight(), 1);
    const float high = block_max(sum.top, scratch);
    const float lse = high + logf(block_sum(sum.total * expf(sum.top - high), scratch));
    if (thread() == 0) {
      p.lse[row] = lse;
      p.loss[row] = lse - picked + p.z_loss * lse * lse;
    }
    if (!p.grad) continue;
    const float upstream = p.grad[row], factor = (1 + 2 * p.z_loss * lse) * upstream;
    float products = 0;
    for (int64_t i = thread(); i < p.classes; i += threads()) {
      const VocabLogit<STABLEMAX> logit(p, x, i, tau);
      float g = expf(logit.log_weight() - lse) * factor - (i == target ? upstream : 0.0f);
      if (STABLEMAX) g /= 1 + fabsf(logit.x);
      products += g * logit.x;
      x[i] = g / tau * logit.slope;
    }
    if (p.grad_temperature) {
      products = block_sum(products, scratch);
      if (thread() == 0) p.grad_temperature[row] = -products / tau;
    }
  }
}

}  // namespace cuda
}  // namespace fastattn
