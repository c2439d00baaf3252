"""The declaration of flex_attention: torch.ops.fastattn.flex_attention and flex_attention_backward.

A user's function is a program by the time it is here (`program.py`), and what it captures two tables of numbers. Outputs are
attention's: out, lse, state and residual (`attention/schema.py`).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Backend, Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare
from ..attention.scores import SCORES, has_residual
from . import cpu, reference, text
from .checks import check_flex, check_flex_backward, check_program, check_program_backward

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    tables: (
        torch.Tensor | None
    )  # (n,) float32, float64 for float64: captured floating tensors, one after another
    indices: torch.Tensor | None  # (m,) int32: captured integers, booleans as 0 and -1
    program: torch.Tensor  # (words,) int64, on the CPU
    classes: (
        torch.Tensor | None
    )  # uint8 (B or 1, Hq or 1, tiles, tiles), of 64 x 64 scores: 0 empty, 1 full, 2 mixed
    scale: float
    mask: MaskArgs


def _fake(q, k, v, *_):
    dtype, rows = statistics_dtype(q), tuple(q.shape[:3])
    out = q.new_empty(*rows, v.shape[3])
    residual = q.new_empty(out.shape if has_residual(q.dtype, SCORES["softmax"].code) else 0)
    return out, q.new_empty(rows, dtype=dtype), q.new_empty((*rows, 2), dtype=dtype), residual


declare(
    "flex_attention",
    Call,
    outputs=("out", "lse", "state", "residual"),
    fake=_fake,
    check=check_flex,
    check_contents=check_program,
    describe=text.describe,
    backends=(
        cpu_backend(cpu.flex_attention, cpu.refusal, cpu.configure, cpu.flex_attention_leading),
        triton_backend(triton.flex_attention, triton.refusal, triton.configure, triton.describe),
        reference_backend(reference.flex_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "tables"),
        optional=("tables",),
        outputs=("out", "lse"),
        saved=("out", "lse", "state", "residual"),
        check=check_flex_backward,
        check_contents=check_program_backward,
        backends=(
            cpu_backend(cpu.flex_attention_backward, cpu.refusal_backward, cpu.configure_backward),
            triton_backend(
                triton.flex_attention_backward, triton.refusal_backward, triton.configure_backward
            ),
            Backend("reference", reference.flex_attention_backward),
        ),
    ),
)
