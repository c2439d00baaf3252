"""The declaration of torch.ops.fastattn.sinkhorn and its backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, cuda_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare, gradient_like
from ...runtime.schema import Size
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import cuda, triton
else:
    cuda, triton = (Lazy(f"{__package__}.{name}") for name in ("cuda", "triton"))


class Call(NamedTuple):
    scores: torch.Tensor  # (B, L, G)
    lengths: torch.Tensor | None  # (B,), or (documents,)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    prefix_lengths: torch.Tensor | None  # (B,), or (documents,)
    temperature: float
    iterations: Size
    causal: bool


def _fake(scores, lengths, cu_seqlens, *_):
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_empty(sequences, 1, scores.shape[2], dtype=statistics_dtype(scores))
    return gradient_like(scores, scores), potentials


declare(
    "sinkhorn",
    Call,
    outputs=("out", "potentials"),
    fake=_fake,
    check=checks.check_sinkhorn,
    check_contents=checks.check_sinkhorn_contents,
    backends=(
        cuda_backend(cuda.sinkhorn, cuda.refusal, cuda.configure),
        cpu_backend(cpu.sinkhorn, cpu.refusal),
        triton_backend(triton.sinkhorn, triton.refusal, triton.configure),
        reference_backend(reference.sinkhorn),
    ),
    gradients=Gradients(
        of=("scores",),
        check=checks.check_sinkhorn_backward,
        check_contents=checks.check_sinkhorn_backward_contents,
        backends=(
            cpu_backend(cpu.sinkhorn_backward, cpu.refusal_backward),
            triton_backend(
                triton.sinkhorn_backward,
                triton.refusal,
                triton.configure_backward,
            ),
        ),
    ),
)
