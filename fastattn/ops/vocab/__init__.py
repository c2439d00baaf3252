"""The output layer: losses over a vocabulary that never hold (tokens, vocabulary), and heads of vector-quantised rows."""

from .codes import nearest_codes, vq_argmax, vq_cross_entropy, vq_logits, vq_sample
from .linear import linear_cross_entropy, stablemax_cross_entropy

__all__ = [
    "linear_cross_entropy",
    "nearest_codes",
    "stablemax_cross_entropy",
    "vq_argmax",
    "vq_cross_entropy",
    "vq_logits",
    "vq_sample",
]
