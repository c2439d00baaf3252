"""The declaration of attention: torch.ops.fastattn.attention and attention_backward.

Besides out and lse the forward returns state, from which the backward finds softmax weights that a float32 lse has no bits for:
each row's maximum, of the products q.k times the scale's sign, or with a tensor bias of the scores; and the logarithm of its sum
of weights relative to it, infinite for a row with nothing to attend to. Of softplus it is (-inf, lse), and in rows whose weights
may all underflow, where they are softmax's, as of that. With a sink, lse and state have it in their sums.

residual is what rounding took from an output of 16 bits, in its dtype: the backward's dO.O is of both, so that saturated weights
have gradients as exact as their other products (specification: an exact delta). Absent (0,) for float32 and float64, and for scores
without a normaliser, whose backward needs no output.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare
from . import cpu, reference
from .checks import check_attention, check_attention_backward
from .scores import BY_CODE, has_residual

if TYPE_CHECKING:
    from . import triton, triton_backward
else:
    triton, triton_backward = Lazy(f"{__package__}.triton"), Lazy(f"{__package__}.triton_backward")


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    bias: (
        torch.Tensor | None
    )  # (B or 1, Hq or 1, Lq or 1, Lk or 1), or of each distance (Hq or 1, Lq + Lk - 1): reference.of_pairs
    sink: torch.Tensor | None  # (Hq,) of q's dtype or float32
    score: int  # a code of scores.py
    scale: float
    bias_value: float | None  # None: the score's own default
    softcap: float | None
    dropped: int  # of 65536 weights
    rng: torch.Tensor | None  # (2,) int64, seed and offset of what is dropped
    mask: MaskArgs


def _fake(q, k, v, bias, sink, score, *_):
    """out; lse (B, Hq, Lq) and state (B, Hq, Lq, 2), each (0,) for a score without a normaliser; residual, of out's shape or (0,)."""
    dtype, rows = statistics_dtype(q), tuple(q.shape[:3])
    lse, state = (rows, (*rows, 2)) if BY_CODE[score].normalised else ((0,), (0,))
    out = q.new_empty(*rows, v.shape[3])
    residual = q.new_empty(out.shape if has_residual(q.dtype, score) else 0)
    return out, q.new_empty(lse, dtype=dtype), q.new_empty(state, dtype=dtype), residual


declare(
    "attention",
    Call,
    outputs=("out", "lse", "state", "residual"),
    fake=_fake,
    check=check_attention,
    backends=(
        cpu_backend(cpu.attention, cpu.refusal, cpu.configure, cpu.attention_leading),
        triton_backend(triton.attention, triton.refusal, triton.configure),
        reference_backend(reference.attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "bias", "sink"),
        optional=("bias", "sink"),
        outputs=("out", "lse"),
        saved=("out", "lse", "state", "residual"),
        check=check_attention_backward,
        backends=(
            cpu_backend(cpu.attention_backward, cpu.refusal_backward, cpu.configure_backward),
            triton_backend(
                triton_backward.attention_backward, triton_backward.refusal, triton_backward.configure
            ),
        ),
    ),
)
