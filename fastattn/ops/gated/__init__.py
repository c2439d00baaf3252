"""Gated attention (arXiv 2604.03260): softmax attention that trains the router of grouped attention."""

from typing import Literal, overload

import torch

from ...masks import Mask, check_mask, default_scale
from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..attention import check_qkv
from ..focus import as_window
from . import schema  # noqa: F401  registers the op
from .checks import GATES


@overload
def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    assignment: torch.Tensor,
    *,
    window: int = 128,
    sharpness: float | torch.Tensor = 1.0,
    gate: str = "multiply",
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    assignment: torch.Tensor,
    *,
    window: int = 128,
    sharpness: float | torch.Tensor = 1.0,
    gate: str = "multiply",
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    assignment: torch.Tensor,
    *,
    window: int = 128,
    sharpness: float | torch.Tensor = 1.0,
    gate: str = "multiply",
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention that trains a router: scores of distant keys are gated by the agreement of two tokens' assignments.

    With g_ij = sigmoid(sharpness * a_i.a_j), a the assignment (arXiv 2604.03260):

        gate="multiply"   s_ij = scale * q_i.k_j * (1 if |i - j| <= window else g_ij)
        gate="log"        s_ij = scale * q_i.k_j + (0 if |i - j| <= window else log g_ij)

    Assignments are not negative, so the gate lies in [0.5, 1) and never removes a key. "multiply" is the published equation and flattens
    distant scores; "log" scales distant weights. Query i attends keys j <= i, and with `mask.prefix_lengths` also keys j < prefix.

    q: (B, Hq, L, D); k: (B, Hkv, L, D); v: (B, Hkv, L, Dv), Hq a multiple of Hkv. One floating dtype and device.
    assignment: (B, L, G) floating, its own dtype, shared by all heads (`sinkhorn`).
    window: keys before the query, and in a prefix after it, that are not gated, default 128.
    sharpness: a number, or a floating tensor of one element that gets a gradient.
    scale: default 1/sqrt(D).
    mask: as in `grouped_attention`.
    return_lse: also return the natural log-sum-exp of each row's gated scores, (B, Hq, L), float32 (float64 for float64),
        differentiable. Default False.

    Returns (B, Hq, L, Dv) in q's dtype. Differentiable once in q, k, v, assignment and sharpness. Raises ValueError, TypeError or
    NotImplementedError naming the argument.

    >>> q, assignment = torch.randn(1, 2, 9, 16), torch.rand(1, 9, 4)
    >>> out = fastattn.gated_attention(q, q, q, assignment, window=3, gate="log")
    """
    op = "gated_attention"
    check_qkv(op, q, k, v)
    if isinstance(sharpness, torch.Tensor):
        if sharpness.numel() != 1:
            raise ValueError(
                f"fastattn.{op}: sharpness must be a number or a tensor of one element, given {_checks.describe(sharpness)}"
            )
        sharpness = sharpness.reshape(())
    else:
        number = _checks.as_number(op, "sharpness", sharpness, kind="a number or a tensor")
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        sharpness = torch.ones((), dtype=wide, device=q.device) * number
    _checks.check_choice(op, "gate", gate, GATES)
    results = call(
        "gated_attention",
        q,
        k,
        v,
        assignment,
        sharpness,
        as_window(window),
        GATES.index(gate),
        default_scale(q.shape[3]) if scale is None else scale,
        check_mask(op, mask).args(op, q, k)._replace(causal=True),
        requested(op, backend),
        reads=2 if return_lse else 1,
    )
    return (results[0], results[1]) if return_lse else results[0]
