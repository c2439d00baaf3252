"""The declaration of torch.ops.fastattn.grouped_attention and its backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.declare import Gradients, declare
from ...runtime.schema import Size
from ..focus import attention_fake
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import triton, triton_backward
else:
    triton, triton_backward = (Lazy(f"{__package__}.{name}") for name in ("triton", "triton_backward"))


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    groups: torch.Tensor  # (B, Lq) int64
    key_groups: torch.Tensor  # (B, Lk) int64
    window: Size
    scale: float
    mask: MaskArgs


declare(
    "grouped_attention",
    Call,
    outputs=("out", "lse", "state"),
    fake=attention_fake,
    check=checks.check_grouped_attention,
    check_contents=checks.check_grouped_contents,
    backends=(
        cpu_backend(cpu.grouped_attention, cpu.refusal, cpu.configure, cpu.grouped_attention_leading),
        triton_backend(triton.grouped_attention, triton.refusal, triton.configure),
        reference_backend(reference.grouped_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v"),
        outputs=("out", "lse"),
        saved=("out", "state"),
        check=checks.check_grouped_attention_backward,
        backends=(
            cpu_backend(cpu.grouped_attention_backward, cpu.refusal_backward, cpu.configure_backward),
            triton_backend(
                triton_backward.grouped_attention_backward, triton_backward.refusal, triton_backward.configure
            ),
        ),
    ),
)
