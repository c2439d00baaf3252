"""fastattn: attention and recurrence that FlashAttention cannot express, as torch ops for CPU and GPU."""

import importlib

from . import _source  # noqa: F401  before the rest: it decides where the rest comes from
from ._native import cpu_isas
from ._registry import explain, set_backend
from .masks import Mask
from .ops.attention import attention, sigmoid_attention
from .ops.decode import decode_step
from .ops.grouped import focus_groups, gated_attention, grouped_attention, sinkhorn
from .ops.linear import fused_linear
from .ops.recurrence import gated, rms_norm, rotary, swiglu
from .ops.reweighted import softplus_attention
from .ops.sdpa import scaled_dot_product_attention
from .ops.vocab import (
    linear_cross_entropy,
    nearest_codes,
    stablemax_cross_entropy,
    vq_argmax,
    vq_cross_entropy,
    vq_logits,
    vq_sample,
)

__version__ = "0.1.0"

_LAZY = ("distributed", "integrations", "models", "nn", "optim", "testing")

__all__ = [
    "Mask",
    "attention",
    "cpu_isas",
    "decode_step",
    "explain",
    "focus_groups",
    "fused_linear",
    "gated",
    "gated_attention",
    "grouped_attention",
    "linear_cross_entropy",
    "nearest_codes",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "set_backend",
    "sigmoid_attention",
    "sinkhorn",
    "softplus_attention",
    "stablemax_cross_entropy",
    "swiglu",
    "vq_argmax",
    "vq_cross_entropy",
    "vq_logits",
    "vq_sample",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
