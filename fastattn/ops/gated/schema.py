"""The declaration of torch.ops.fastattn.gated_attention and its backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.declare import Gradients, declare
from ...runtime.schema import Size
from ..focus import attention_fake
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hq, L, D)
    k: torch.Tensor  # (B, Hkv, L, D)
    v: torch.Tensor  # (B, Hkv, L, Dv)
    assignment: torch.Tensor  # (B, L, G)
    sharpness: torch.Tensor  # ()
    window: Size
    gate: int  # 0: multiply, 1: add the logarithm
    scale: float
    mask: MaskArgs


declare(
    "gated_attention",
    Call,
    outputs=("out", "lse", "state"),
    fake=attention_fake,
    check=checks.check_gated_attention,
    backends=(
        cpu_backend(cpu.gated_attention, cpu.refusal, cpu.configure, cpu.gated_attention_leading),
        triton_backend(triton.gated_attention, triton.refusal, triton.configure),
        reference_backend(reference.gated_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "assignment", "sharpness"),
        outputs=("out", "lse"),
        saved=("out", "state"),
        check=checks.check_gated_attention_backward,
        backends=(
            cpu_backend(cpu.gated_attention_backward, cpu.refusal_backward, cpu.configure_backward),
            triton_backend(
                triton.gated_attention_backward,
                triton.refusal_backward,
                triton.configure_backward,
            ),
        ),
    ),
)
