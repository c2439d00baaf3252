"""The declaration of torch.ops.fastattn.selective_scan and its backward."""

from typing import NamedTuple

import torch

from ...runtime.backends import cpu_backend, reference_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare, gradient_like
from .. import documents
from . import checks, cpu, reference


class Call(NamedTuple):
    u: torch.Tensor  # (B, L, E)
    dt: torch.Tensor  # (B, L, E)
    A: torch.Tensor  # (E, N)
    B: torch.Tensor  # (B, L, N)
    C: torch.Tensor  # (B, L, N)
    D: torch.Tensor | None  # (E,)
    z: torch.Tensor | None  # (B, L, E)
    dt_bias: torch.Tensor | None  # (E,)
    initial_state: torch.Tensor | None  # (B or documents, E, N)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    dt_softplus: bool


def _fake(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus):
    wide, sequences = statistics_dtype(u), documents.count(u.shape[0], cu_seqlens)
    state = u.new_empty(sequences, *A.shape, dtype=wide)
    return gradient_like(u, u), state, u.new_empty(checks.checkpoint_shape(u, A), dtype=wide)


declare(
    "selective_scan",
    Call,
    outputs=("out", "state", "checkpoints"),
    fake=_fake,
    check=checks.check_selective_scan,
    check_contents=checks.check_contents,
    backends=(
        cpu_backend(cpu.selective_scan, cpu.refusal, None, cpu.selective_scan_leading),
        reference_backend(reference.selective_scan),
    ),
    gradients=Gradients(
        of=("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"),
        outputs=("out", "state"),
        saved=("checkpoints",),
        check=checks.check_selective_scan_backward,
        check_contents=checks.check_backward_contents,
        backends=(cpu_backend(cpu.selective_scan_backward, cpu.refusal_backward),),
    ),
)
