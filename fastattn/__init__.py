"""fastattn: attention and recurrence that FlashAttention cannot express, as torch ops for CPU and GPU."""

import importlib
import sys
from typing import TYPE_CHECKING

from . import (
    _source,  # noqa: F401  before the rest: it decides where the rest comes from
    bias,
    blocks,
)
from .bias import DistanceBias
from .blocks import Blocks
from .masks import Mask
from .ops.attention import attention, sigmoid_attention
from .ops.causal_conv1d import causal_conv1d
from .ops.codes import nearest_codes, vq_argmax, vq_cross_entropy, vq_logits, vq_sample
from .ops.cross_entropy import linear_cross_entropy, stablemax_cross_entropy
from .ops.flex import flex_attention
from .ops.fused_linear import fused_linear
from .ops.gated import gated_attention
from .ops.grouped import focus_groups, grouped_attention
from .ops.hrm_step import decode_step
from .ops.linear_attention import linear_attention, linear_attention_step
from .ops.linear_scan import linear_scan
from .ops.lssa import lssa_attention, softplus_attention
from .ops.merge import merge, merge_sums
from .ops.multi_label import multi_label_cross_entropy
from .ops.rowwise import gated, rms_norm, rotary, rotary_tables, swiglu
from .ops.sdpa import scaled_dot_product_attention
from .ops.selective_scan import selective_scan
from .ops.sinkhorn import sinkhorn
from .runtime.explain import explain
from .runtime.native import cpu_isas
from .runtime.registry import set_backend
from .score import Score

__version__ = "0.1.0"

_LAZY = ("distributed", "integrations", "models", "nn", "optim", "testing")

__all__ = [
    "Blocks",
    "DistanceBias",
    "Mask",
    "Score",
    "attention",
    "bias",
    "blocks",
    "causal_conv1d",
    "cpu_isas",
    "decode_step",
    "distributed",
    "explain",
    "flex_attention",
    "focus_groups",
    "fused_linear",
    "gated",
    "gated_attention",
    "grouped_attention",
    "integrations",
    "linear_attention",
    "linear_attention_step",
    "linear_cross_entropy",
    "linear_scan",
    "lssa_attention",
    "merge",
    "merge_sums",
    "models",
    "multi_label_cross_entropy",
    "nearest_codes",
    "nn",
    "optim",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "selective_scan",
    "set_backend",
    "sigmoid_attention",
    "sinkhorn",
    "softplus_attention",
    "stablemax_cross_entropy",
    "swiglu",
    "testing",
    "vq_argmax",
    "vq_cross_entropy",
    "vq_logits",
    "vq_sample",
]


if TYPE_CHECKING:
    from . import distributed, integrations, models, nn, optim, testing
else:  # a type checker would take any name from it

    def __getattr__(name):
        if name in _LAZY:
            return importlib.import_module(f"fastattn.{name}")
        raise AttributeError(
            f"module 'fastattn' has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )

    def __dir__():
        return sorted({*globals(), *_LAZY})
