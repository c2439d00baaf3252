"""The pieces of a recurrence step between its matrix products: norm, SwiGLU, gate, rotary embedding."""

from typing import overload

import torch

from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the ops


@overload
def rms_norm(
    x: torch.Tensor,
    *,
    residual: None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    *,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dim, with the residual addition before it.

    x * rsqrt(mean(x^2) + eps) * weight, float32 inside and one rounding ("Root Mean Square Layer Normalization",
    arXiv 1910.07467, equation 4).

    x: (..., D), any strides. residual: shaped as x and added first; the sum is rounded to x's dtype before the norm.
    weight: (D,), default none.
    Returns the normed tensor, or (normed, x + residual) when residual is given. Differentiable in x, residual and weight.
    Raises ValueError or TypeError naming the argument.
    """
    reads = 1 if residual is None else 2
    results = call("rms_norm", x, residual, weight, eps, requested("rms_norm", backend), reads=reads)
    return results[0] if residual is None else (results[0], results[1])


def swiglu(gate_up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up for gate | up in one tensor ("GLU Variants Improve Transformer", arXiv 2002.05202, equation 6).

    gate_up: (..., 2I), the gate in the first half; any strides. Returns (..., I). float32 inside, one rounding. Differentiable.
    Raises ValueError or TypeError naming the argument.
    """
    return call("swiglu", gate_up, requested("swiglu", backend))


def gated(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """sigmoid(gate) * x, element by element; float32 inside, one rounding.

    x, gate: one shape (..., D), any strides. Returns that shape. Differentiable in both.
    Raises ValueError or TypeError naming the argument.
    """
    return call("gated", x, gate, requested("gated", backend))


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float = 10000.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding in its half-rotation form ("RoFormer", arXiv 2104.09864, equation 34, halves instead of pairs).

    Dim i and i + D/2 are rotated by position * theta^(-2i/D); angles, sines and products in float32 (float64 for float64).

    q: (B, Hq, L, D); k: (B, Hkv, L, D), D even. positions: (L,), (1, L) or (B, L), int32 or int64, any order, zero or more.
    Returns rotated q and k, contiguous. Differentiable in q and k. Raises ValueError or TypeError naming the argument.
    """
    return call("rotary", q, k, _one_row(positions), theta, False, requested("rotary", backend))


def rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    theta: float = 10000.0,
    backend: str | None = None,
) -> torch.Tensor:
    """`rotary` of q and k, which also writes the rotated k and v into a cache: one launch on a GPU, for decoding and prefill.

    q, k, positions, theta: as for `rotary`. v: (B, Hkv, L, Dv). slots: (B, L), int32 or int64, the row of the cache that each token
    takes, in [0, capacity), which is checked on the CPU. The slots of a sequence must differ, which is not checked.
    keys: (B, Hkv, capacity, D); values: (B, Hkv, capacity, Dv); q's dtype and device; written in place.
    Returns rotated q, contiguous. It has no gradients: an input that requires one raises NotImplementedError outside of no_grad.
    Raises ValueError or TypeError naming the argument.
    """
    op = "rotary_append"
    return call(op, q, k, v, _one_row(positions), slots, keys, values, theta, requested(op, backend))


def _one_row(positions: torch.Tensor) -> torch.Tensor:
    """Positions of shape (1, L) as (L,): every sequence of the batch shares them."""
    one = isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[0] == 1
    return positions[0] if one else positions
