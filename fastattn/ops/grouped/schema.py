"""The declarations of torch.ops.fastattn.{sinkhorn, grouped_attention, gated_attention} and their backwards."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...masks import MaskArgs
from ...runtime.backends import Lazy, cpu_backend, cuda_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Gradients, declare, gradient_like
from ...runtime.schema import Size
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import cuda, triton, triton_backward, triton_gated, triton_sinkhorn
else:
    cuda, triton, triton_backward, triton_gated, triton_sinkhorn = (
        Lazy(f"{__package__}.{name}")
        for name in ("cuda", "triton", "triton_backward", "triton_gated", "triton_sinkhorn")
    )


class SinkhornCall(NamedTuple):
    scores: torch.Tensor  # (B, L, G)
    lengths: torch.Tensor | None  # (B,), or (documents,)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    temperature: float
    iterations: Size
    causal: bool


def _sinkhorn_fake(scores, lengths, cu_seqlens, *_):
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_empty(sequences, 1, scores.shape[2], dtype=statistics_dtype(scores))
    return gradient_like(scores, scores), potentials


declare(
    "sinkhorn",
    SinkhornCall,
    outputs=("out", "potentials"),
    fake=_sinkhorn_fake,
    check=checks.check_sinkhorn,
    check_contents=checks.check_sinkhorn_contents,
    backends=(
        cuda_backend(cuda.sinkhorn, cuda.refusal, cuda.configure),
        cpu_backend(cpu.sinkhorn, cpu.refusal_sinkhorn),
        triton_backend(triton_sinkhorn.sinkhorn, triton_sinkhorn.refusal, triton_sinkhorn.configure),
        reference_backend(reference.sinkhorn),
    ),
    gradients=Gradients(
        of=("scores",),
        check=checks.check_sinkhorn_backward,
        check_contents=checks.check_sinkhorn_backward_contents,
        backends=(
            cpu_backend(cpu.sinkhorn_backward, cpu.refusal_sinkhorn_backward),
            triton_backend(
                triton_sinkhorn.sinkhorn_backward,
                triton_sinkhorn.refusal,
                triton_sinkhorn.configure_backward,
            ),
        ),
    ),
)


class GroupedCall(NamedTuple):
    q: torch.Tensor  # (B, Hq, Lq, D)
    k: torch.Tensor  # (B, Hkv, Lk, D)
    v: torch.Tensor  # (B, Hkv, Lk, Dv)
    groups: torch.Tensor  # (B, Lq) int64
    key_groups: torch.Tensor  # (B, Lk) int64
    window: Size
    scale: float
    mask: MaskArgs


def _attention_fake(q, k, v, *_):
    """out, and state as in attention's schema, of gated scores where there are gates."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 2, dtype=statistics_dtype(q))


declare(
    "grouped_attention",
    GroupedCall,
    outputs=("out", "state"),
    fake=_attention_fake,
    check=checks.check_grouped_attention,
    check_contents=checks.check_grouped_contents,
    backends=(
        cpu_backend(cpu.grouped_attention, cpu.refusal_grouped, cpu.configure_grouped),
        triton_backend(triton.grouped_attention, triton.refusal, triton.configure),
        reference_backend(reference.grouped_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v"),
        saved=("out", "state"),
        check=checks.check_grouped_attention_backward,
        backends=(
            cpu_backend(
                cpu.grouped_attention_backward, cpu.refusal_grouped_backward, cpu.configure_grouped_backward
            ),
            triton_backend(
                triton_backward.grouped_attention_backward, triton_backward.refusal, triton_backward.configure
            ),
        ),
    ),
)


class GatedCall(NamedTuple):
    q: torch.Tensor  # (B, Hq, L, D)
    k: torch.Tensor  # (B, Hkv, L, D)
    v: torch.Tensor  # (B, Hkv, L, Dv)
    assignment: torch.Tensor  # (B, L, G)
    sharpness: torch.Tensor  # ()
    window: Size
    gate: int  # 0 multiplies, 1 adds the logarithm
    scale: float
    mask: MaskArgs


declare(
    "gated_attention",
    GatedCall,
    outputs=("out", "state"),
    fake=_attention_fake,
    check=checks.check_gated_attention,
    backends=(
        cpu_backend(cpu.gated_attention, cpu.refusal_gated, cpu.configure_gated),
        triton_backend(triton_gated.gated_attention, triton_gated.refusal, triton_gated.configure),
        reference_backend(reference.gated_attention),
    ),
    gradients=Gradients(
        of=("q", "k", "v", "assignment", "sharpness"),
        saved=("out", "state"),
        check=checks.check_gated_attention_backward,
        backends=(
            cpu_backend(
                cpu.gated_attention_backward, cpu.refusal_gated_backward, cpu.configure_gated_backward
            ),
            triton_backend(
                triton_gated.gated_attention_backward,
                triton_gated.refusal_backward,
                triton_gated.configure_backward,
            ),
        ),
    ),
)
