"""The declarations of torch.ops.fastattn.linear_attention, its backward, and linear_attention_step."""

from typing import Annotated, NamedTuple

import torch

from ...runtime.backends import cpu_backend, reference_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare
from ...runtime.schema import Written
from .. import documents
from . import checks, cpu, reference
from .checks import kept_states


class Call(NamedTuple):
    q: torch.Tensor  # (B, Hk, L, dk)
    k: torch.Tensor  # (B, Hk, L, dk)
    v: torch.Tensor  # (B, Hv, L, dv)
    decay: torch.Tensor | None  # (Hv,), (B, Hv, L) or (B, Hv, L, dk)
    beta: torch.Tensor | None  # (B, Hv, L)
    initial_state: torch.Tensor | None  # (B or documents, Hv, dk, dv or dv + 1)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    scale: float
    delta_rule: bool
    normalize: bool
    qk_norm: bool
    causal: bool


class StepCall(NamedTuple):
    q: torch.Tensor  # (B, Hk, dk)
    k: torch.Tensor  # (B, Hk, dk)
    v: torch.Tensor  # (B, Hv, dv)
    decay: torch.Tensor | None  # (Hv,), (B, Hv) or (B, Hv, dk)
    beta: torch.Tensor | None  # (B, Hv)
    state: Annotated[torch.Tensor, Written("a")]  # (B, Hv, dk, dv or dv + 1)
    scale: float
    delta_rule: bool
    normalize: bool
    qk_norm: bool


def _fake(q, k, v, decay, beta, initial_state, cu_seqlens, scale, delta_rule, normalize, qk_norm, causal):
    """out, the state after the last token, and the states that are kept for the backward."""
    sequences = documents.count(q.shape[0], cu_seqlens)
    num_states = kept_states(v.shape[2], causal, cu_seqlens)
    shape, dtype = (q.shape[3], v.shape[3] + int(normalize)), statistics_dtype(q)
    return (
        v.new_empty(v.shape),
        v.new_empty(sequences, v.shape[1], *shape, dtype=dtype),
        v.new_empty(*v.shape[:2], num_states, *shape, dtype=dtype),
    )


declare(
    "linear_attention",
    Call,
    outputs=("out", "state", "states"),
    fake=_fake,
    check=checks.check_linear_attention,
    check_contents=checks.check_linear_attention_contents,
    backends=(
        cpu_backend(cpu.linear_attention, cpu.refusal, leading=cpu.linear_attention_leading),
        reference_backend(reference.linear_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "decay", "beta", "initial_state"),
        outputs=("out", "state"),
        saved=("out", "states"),
        optional=("decay", "beta", "initial_state"),
        check=checks.check_linear_attention_backward,
        check_contents=checks.check_linear_attention_backward_contents,
        backends=(cpu_backend(cpu.linear_attention_backward, cpu.refusal_backward),),
    ),
)

declare(
    "linear_attention_step",
    StepCall,
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
    check=checks.check_linear_attention_step,
    backends=(
        cpu_backend(cpu.linear_attention_step, cpu.refusal_step),
        reference_backend(reference.linear_attention_step),
    ),
)
