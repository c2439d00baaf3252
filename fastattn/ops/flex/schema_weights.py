"""The declarations of score_attention, with its backward, and of row_maximum: torch.ops.fastattn of these names.

Weights are what a program makes of the scaled products (`program.py`): no softmax follows. `fastattn.Score` is what a user has of it.
"""

from typing import NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Backend, cpu_backend, reference_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare
from . import cpu, reference, text
from .checks import (
    check_extremes,
    check_row_maximum,
    check_score_attention,
    check_score_attention_backward,
    check_weights,
    check_weights_backward,
    has_rest,
)


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    tables: torch.Tensor | None  # as flex_attention's
    indices: torch.Tensor | None
    program: torch.Tensor  # (words,) int64, on the CPU
    normalised: bool  # whether weights are divided by their row sum
    scale: float
    mask: MaskArgs


def _fake(q, k, v, tables, indices, program, normalised, scale, mask):
    rows = tuple(q.shape[:3])
    out = q.new_empty(*rows, v.shape[3])
    total = q.new_empty(rows if normalised else 0, dtype=statistics_dtype(q))
    return out, total, q.new_empty(out.shape if has_rest(q.dtype, normalised) else 0)


declare(
    "score_attention",
    Call,
    outputs=("out", "total", "residual"),
    fake=_fake,
    check=check_score_attention,
    check_contents=check_weights,
    describe=text.describe_weights,
    backends=(
        cpu_backend(cpu.score_attention, cpu.refusal_score, cpu.configure_score, cpu.score_attention_leading),
        reference_backend(reference.score_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "tables"),
        optional=("tables",),
        saved=("out", "total", "residual"),
        check=check_score_attention_backward,
        check_contents=check_weights_backward,
        backends=(
            cpu_backend(
                cpu.score_attention_backward, cpu.refusal_score_backward, cpu.configure_score_backward
            ),
            Backend("reference", reference.score_attention_backward),
        ),
    ),
)


class MaximumCall(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    tables: torch.Tensor | None
    indices: torch.Tensor | None
    program: torch.Tensor
    scale: float
    mask: MaskArgs


def _fake_maximum(q, *_):
    rows = q.shape[:3]
    return q.new_empty(rows, dtype=statistics_dtype(q)), q.new_empty(rows, dtype=torch.int64)


declare(
    "row_maximum",
    MaximumCall,
    outputs=("maximum", "key"),  # -inf and -1 of a row without any score above -inf
    fake=_fake_maximum,
    check=check_row_maximum,
    check_contents=check_extremes,
    backends=(
        cpu_backend(cpu.row_maximum, cpu.refusal_maximum, cpu.configure_maximum),
        reference_backend(reference.row_maximum),
    ),
)
