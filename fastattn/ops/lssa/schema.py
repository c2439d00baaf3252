"""The declaration of LSSA and LSSAR: torch.ops.fastattn.softplus_attention and softplus_attention_backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare
from . import cpu, reference
from .checks import check_softplus_attention, check_softplus_attention_backward

if TYPE_CHECKING:
    from . import triton, triton_backward
else:
    triton, triton_backward = Lazy(f"{__package__}.triton"), Lazy(f"{__package__}.triton_backward")


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    power: float | None  # None: LSSA
    mask: MaskArgs


def _fake(q, k, v, power, mask):
    """out; lse, (0,) for LSSAR; statistics."""
    rows, dtype = tuple(q.shape[:3]), statistics_dtype(q)
    lse = q.new_empty(rows if power is None else (0,), dtype=dtype)
    return q.new_empty(*rows, v.shape[3]), lse, q.new_empty(*rows, 3, dtype=dtype)


declare(
    "softplus_attention",
    Call,
    outputs=("out", "lse", "statistics"),
    fake=_fake,
    check=check_softplus_attention,
    backends=(
        cpu_backend(cpu.softplus_attention, cpu.refusal, cpu.configure, cpu.softplus_attention_leading),
        triton_backend(triton.softplus_attention, triton.refusal, triton.configure),
        reference_backend(reference.softplus_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v"),
        outputs=("out", "lse"),
        saved=("out", "statistics"),
        check=check_softplus_attention_backward,
        backends=(
            cpu_backend(cpu.softplus_attention_backward, cpu.refusal_backward, cpu.configure_backward),
            triton_backend(
                triton_backward.softplus_attention_backward,
                triton_backward.refusal,
                triton_backward.configure,
            ),
        ),
    ),
)
