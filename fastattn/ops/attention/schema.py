"""The declaration of attention: torch.ops.fastattn.attention and attention_backward.

Besides out and lse the forward returns state (B, Hq, Lq, 2). From it the backward computes softmax weights more precisely than a
float32 lse allows. state[..., 0] is the row's maximum: of the products q.k times the scale's sign, or of the scores if there is a
tensor bias. state[..., 1] is the logarithm of the row's sum of weights relative to that maximum; it is infinite for a row that
attends no key. For softplus the two are (-inf, lse), except in rows whose weights may all underflow: these have softmax's weights
and softmax's state. A sink is included in lse and state.

residual is the rounding error of a 16-bit output, in the output's dtype. The backward computes dO.O from both, so that saturated
weights have gradients as exact as their other products (specification: an exact delta). It is (0,) for float32 and float64, and for
scores without a normaliser, whose backward does not read the output.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...blocks.in_masks import describe_lists
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
    # (B or 1, Hq or 1, Lq or 1, Lk or 1), or by distance (Hq or 1, Lq + Lk - 1): reference.of_pairs
    bias: torch.Tensor | None
    sink: torch.Tensor | None  # (Hq,) of q's dtype or float32
    score: int  # a code of scores.py
    scale: float
    bias_value: float | None  # None: the score's own default
    softcap: float | None
    dropped: int  # this many of 65536 weights
    rng: torch.Tensor | None  # (2,) int64, seed and offset of dropout's random numbers
    mask: MaskArgs


def _fake(q, k, v, bias, sink, score, *_):
    """out; lse (B, Hq, Lq) and state (B, Hq, Lq, 2), both (0,) for a score without a normaliser; residual, of out's shape or (0,)."""
    dtype, rows = statistics_dtype(q), tuple(q.shape[:3])
    lse, state = (rows, (*rows, 2)) if BY_CODE[score].normalised else ((0,), (0,))
    out = q.new_empty(*rows, v.shape[3])
    residual = q.new_empty(out.shape if has_residual(q.dtype, score) else 0)
    return out, q.new_empty(lse, dtype=dtype), q.new_empty(state, dtype=dtype), residual


def _described(*members) -> str:
    return describe_lists(members[-1], members[1].shape[2])


declare(
    "attention",
    Call,
    outputs=("out", "lse", "state", "residual"),
    fake=_fake,
    check=check_attention,
    describe=_described,
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
