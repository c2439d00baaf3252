"""The declaration of torch.ops.fastattn.decode_step. It has no gradients."""

from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, cuda_backend, reference_backend
from ...runtime.declare import declare, gradient_like
from ...runtime.schema import Size, Written
from . import cpu, reference
from .checks import check_decode_step, check_decode_step_contents

if TYPE_CHECKING:
    from . import cuda
else:
    cuda = Lazy(f"{__package__}.cuda")


class Call(NamedTuple):
    z_h: torch.Tensor  # (B, C)
    z_l: torch.Tensor  # (B, C)
    weights: list[torch.Tensor]  # gqkv, out, gate_up, down of each layer, first the L stack's
    k_cache: Annotated[torch.Tensor, Written("a")]  # (calls, layers, B, H, capacity, D)
    v_cache: Annotated[torch.Tensor, Written("b")]
    positions: torch.Tensor | None  # (B,)
    position: Size  # the position of all rows if positions is None, else an upper bound
    h_cycles: int
    l_cycles: int
    theta: float
    eps: float


declare(
    "decode_step",
    Call,
    fake=lambda z_h, *_: gradient_like(z_h, z_h),
    check=check_decode_step,
    check_contents=check_decode_step_contents,
    backends=(
        cuda_backend(cuda.decode_step, cuda.refusal, cuda.configure),
        cpu_backend(cpu.decode_step, cpu.refusal, cpu.configure),
        reference_backend(reference.decode_step),
    ),
)
