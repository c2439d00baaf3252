"""The declaration of torch.ops.fastattn.causal_conv1d and its backward."""

from typing import NamedTuple

import torch

from ...runtime.backends import cpu_backend, reference_backend
from ...runtime.declare import Gradients, declare, gradient_like
from .. import documents
from . import checks, cpu, reference


class Call(NamedTuple):
    x: torch.Tensor  # (B, L, D)
    weight: torch.Tensor  # (D, K)
    bias: torch.Tensor | None  # (D,)
    initial_state: torch.Tensor | None  # (B or documents, K - 1, D)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    silu: bool


def _fake(x, weight, bias, initial_state, cu_seqlens, silu):
    sequences = documents.count(x.shape[0], cu_seqlens)
    return gradient_like(x, x), x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


declare(
    "causal_conv1d",
    Call,
    outputs=("out", "state"),
    fake=_fake,
    check=checks.check_causal_conv1d,
    check_contents=checks.check_contents,
    backends=(
        cpu_backend(cpu.causal_conv1d, cpu.refusal, None, cpu.causal_conv1d_leading),
        reference_backend(reference.causal_conv1d),
    ),
    gradients=Gradients(
        of=("x", "weight", "bias", "initial_state"),
        outputs=("out", "state"),
        optional=("weight", "bias", "initial_state"),
        check=checks.check_causal_conv1d_backward,
        check_contents=checks.check_backward_contents,
        backends=(cpu_backend(cpu.causal_conv1d_backward, cpu.refusal_backward),),
    ),
)
