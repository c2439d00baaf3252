"""The pieces of a recurrence step between its matrix products: norm, SwiGLU, gate, rotary embedding."""

import torch

from ... import _checks
from ..._registry import call, needs_grad, requested
from . import schema  # noqa: F401  registers the ops


def rms_norm(
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dim, with the residual addition before it.

    x * rsqrt(mean(x^2) + eps) * weight, float32 inside and one rounding ("Root Mean Square Layer Normalization",
    arXiv 1910.07467, equation 4).

    x: (..., D), any strides. residual: as x, added first; the sum is rounded to x's dtype, then normed. weight: (D,), default none.
    Returns the normed tensor, or (normed, x + residual) when residual is given. Differentiable in x, residual and weight.
    Raises ValueError or TypeError naming the argument.
    """
    op = "rms_norm"
    _checks.check_floating(op, x=x, residual=residual, weight=weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"fastattn.{op}: x must have a last dim of 1 or more, given {_checks.describe(x)}")
    if residual is not None:
        _checks.check_shape(op, "residual", residual, tuple(x.shape), "x's")
    if weight is not None:
        _checks.check_shape(op, "weight", weight, (x.shape[-1],), "x's last dim")
    _checks.check_positive(op, "eps", eps, zero=True)
    normed, total, _ = call("rms_norm", x, residual, weight, float(eps), requested(op, None))
    return normed if residual is None else (normed, total)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate | up in one tensor ("GLU Variants Improve Transformer", arXiv 2002.05202, equation 6).

    gate_up: (..., 2I), the gate in the first half; any strides. Returns (..., I). float32 inside, one rounding. Differentiable.
    Raises ValueError or TypeError naming the argument.
    """
    op = "swiglu"
    _checks.check_floating(op, gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"fastattn.{op}: gate_up must have an even last dim, gate | up, given {_checks.describe(gate_up)}"
        )
    return call("swiglu", gate_up, requested(op, None))


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """sigmoid(gate) * x, element by element; float32 inside, one rounding.

    x, gate: one shape (..., D), any strides. Returns that shape. Differentiable in both.
    Raises ValueError or TypeError naming the argument.
    """
    op = "gated"
    _checks.check_floating(op, x=x, gate=gate)
    if x.dim() == 0:
        raise ValueError(f"fastattn.{op}: x must have a last dim, given {_checks.describe(x)}")
    _checks.check_shape(op, "gate", gate, tuple(x.shape), "x's")
    return call("gated", x, gate, requested(op, None))


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding in its half-rotation form ("RoFormer", arXiv 2104.09864, equation 34, halves instead of pairs).

    Dim i and i + D/2 are rotated by position * theta^(-2i/D); angles, sines and products in float32 (float64 for float64).

    q: (B, Hq, L, D); k: (B, Hkv, L, D), D even. positions: (L,), (1, L) or (B, L), int32 or int64, any order, zero or more.
    Returns rotated q and k, contiguous. Differentiable in q and k. Raises ValueError or TypeError naming the argument.
    """
    op = "rotary"
    positions = _check_rotary(op, q, k, positions, theta)
    return call("rotary", q, k, positions, float(theta), False, requested(op, None))


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
) -> torch.Tensor:
    """`rotary` of q and k, the latter written with v into a cache: one launch on a GPU, for decoding and prefill.

    q, k, positions, theta: as for `rotary`. v: (B, Hkv, L, Dv). slots: (B, L), int32 or int64, the row of the cache that each token
    takes; no two of a sequence alike, each in [0, capacity), which is not checked.
    keys: (B, Hkv, capacity, D); values: (B, Hkv, capacity, Dv); q's dtype and device; written in place.
    Returns rotated q, contiguous. It has no gradients: an input that requires one raises NotImplementedError outside of no_grad.
    Raises ValueError or TypeError naming the argument.
    """
    op = "rotary_append"
    positions = _check_rotary(op, q, k, positions, theta)
    _checks.check_tensor(op, "v", v, dims=4)
    _checks.check_shape(op, "v", v, (*k.shape[:3], v.shape[3]), "k's heads and tokens")
    for name, cache, new in (("keys", keys, k), ("values", values, v)):
        _checks.check_tensor(op, name, cache, dims=4)
        shape = (*new.shape[:2], cache.shape[2], new.shape[3])
        _checks.check_shape(op, name, cache, shape, "batch, heads, capacity and head dim")
    _checks.check_floating(op, q=q, k=k, v=v, keys=keys, values=values)
    _checks.check_integer(op, "slots", slots, dims=2)
    _checks.check_shape(op, "slots", slots, (q.shape[0], q.shape[2]), "(B, L)")
    _checks.check_same_device(op, q=q, slots=slots)
    if needs_grad((q, k, v, keys, values)):
        raise NotImplementedError(f"fastattn.{op}: it has no gradients; call it under torch.no_grad()")
    return call(op, q, k, v, positions, slots, keys, values, float(theta), requested(op, None))


def _check_rotary(
    op: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, theta: float
) -> torch.Tensor:
    """The positions as (L,) or (B, L)."""
    for name, t in (("q", q), ("k", k)):
        _checks.check_tensor(op, name, t, dims=4)
    _checks.check_floating(op, q=q, k=k)
    _checks.check_integer(op, "positions", positions, dims=(1, 2))
    _checks.check_same_device(op, q=q, positions=positions)
    if (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(
            f"fastattn.{op}: k must have q's batch, length and head dim, given q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if q.shape[3] % 2:
        raise ValueError(f"fastattn.{op}: q must have an even head dim, given {q.shape[3]}")
    if positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions[0]
    shape = (q.shape[2],) if positions.dim() == 1 else (q.shape[0], q.shape[2])
    _checks.check_shape(op, "positions", positions, shape, "(L,), (1, L) or (B, L)")
    _checks.check_positive(op, "theta", theta)
    return positions
