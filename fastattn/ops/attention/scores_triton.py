"""The score table's Triton column: for each score its weight and the weight's derivative, in base 2.

Kernels pass s2 = s * log2(e), so that an exponential is one instruction. For softmax the row maximum (forward) or the log-sum-exp
(backward) is already subtracted, so that the weight is at most 1.
"""

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_weight(s2):
    return tl.exp2(s2)


@triton.jit
def softmax_derivative(s2, weight):
    return weight


@triton.jit
def sigmoid_weight(s2):
    # Relative accuracy holds in the tail: a hardware tanh would not give it.
    return 1.0 / (1.0 + tl.exp2(-s2))


@triton.jit
def sigmoid_derivative(s2, weight):
    return weight * (1.0 - weight)


@triton.jit
def softplus_weight(s2):
    x = tl.exp2(-tl.abs(s2))
    # log1p: its series where rounding 1 + x would lose the tail (next term x^6/6 < 1e-7 x below 0.06)
    series = x * (1.0 + x * (-0.5 + x * (1.0 / 3.0 + x * (-0.25 + x * 0.2))))
    return tl.maximum(s2, 0.0) * _LN2 + tl.where(x < 0.06, series, tl.log2(1.0 + x) * _LN2)


@triton.jit
def softplus_derivative(s2, weight):
    return 1.0 / (1.0 + tl.exp2(-s2))
