"""The row-wise operations between a model's matrix products: norm, SwiGLU, gate, rotary embedding."""

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
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    *,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dim, with the residual addition before it.

    x * rsqrt(mean(x^2) + eps) * (weight + weight_offset), computed in float32 and rounded once ("Root Mean Square Layer
    Normalization", arXiv 1910.07467, equation 4).

    x: (..., D), any strides. residual: of x's shape, any floating dtype, default none; added before the norm. The sum is rounded to the
    wider of the two dtypes. weight: (D,), any floating dtype, default none: float32 weights for bfloat16 rows, as under autocast and
    FSDP, are not rounded. eps: default 1e-6. weight_offset: default 0; 1 for weights that start at 0, as in Gemma; not used without a
    weight. Returns the normed tensor in x's dtype, or (normed, x + residual) with a residual. Differentiable once in x, residual and
    weight; each gradient has its tensor's dtype.

    >>> normed, total = fastattn.rms_norm(torch.randn(4, 8), residual=torch.randn(4, 8), weight=torch.zeros(8), weight_offset=1)

    Raises ValueError or TypeError naming the argument.
    """
    reads = 1 if residual is None else 2
    results = call(
        "rms_norm", x, residual, weight, eps, weight_offset, requested("rms_norm", backend), reads=reads
    )
    return results[0] if residual is None else (results[0], results[1])


def swiglu(gate_up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up for gate and up in one tensor ("GLU Variants Improve Transformer", arXiv 2002.05202, equation 6).

    gate_up: (..., 2I), floating, the gate in the first half; any strides. Returns (..., I) in its dtype, computed in float32 and rounded
    once. Differentiable once. Raises ValueError or TypeError naming the argument.

    >>> y = fastattn.swiglu(torch.randn(4, 16))
    """
    return call("swiglu", gate_up, requested("swiglu", backend))


def gated(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """sigmoid(gate) * x, element by element, computed in float32 and rounded once ("Language Modeling with Gated Convolutional
    Networks", arXiv 1612.08083, equation 1).

    x, gate: (..., D), one shape and floating dtype, any strides. Returns that shape and dtype. Differentiable once in both.
    Raises ValueError or TypeError naming the argument.

    >>> y = fastattn.gated(torch.randn(4, 8), torch.randn(4, 8))
    """
    return call("gated", x, gate, requested("gated", backend))


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding ("RoFormer", arXiv 2104.09864, equation 34), of halves or of pairs.

    Dims i and i + D/2 (halves), or 2i and 2i + 1 (pairs), are rotated by position * theta^(-2i/D). Angles are formed in float64, because
    a float32 angle is off by 9e-3 at position 131072. Sines and products are float32 (float64 for float64).

    q: (B, Hq, L, D); k: (B, Hkv, L, D), D even, one floating dtype. positions: (L,), (1, L) or (B, L), int32 or int64, any order, zero
    or more. theta: default 10000. interleaved: pairs instead of halves, default False; on a CPU pairs need two more copies.
    Returns rotated q and k, contiguous. Differentiable in q and k. Raises ValueError or TypeError naming the argument.

    >>> q, k = fastattn.rotary(torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.arange(5))
    """
    return call("rotary", q, k, _one_row(positions), theta, interleaved, False, requested("rotary", backend))


def rotary_tables(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary` with given cosines and sines, for models that scale their angles (YaRN, arXiv 2309.00071, Llama 3, LongRoPE).

    Two dims (a, b), halves or pairs as in `rotary`, become a cos_a - b sin_a and b cos_b + a sin_b, computed in float32 and rounded
    once.

    q: (B, Hq, L, D); k: (B, Hkv, L, D), D even. cos, sin: (B or 1, L, D), or (B or 1, L, D/2) if both dims share their values;
    any floating dtype, any strides. interleaved: pairs instead of halves, in q, k and tables of D values; default False.
    Returns rotated q and k, contiguous. Linear and differentiable in q and k; tables get no gradient.

    >>> q, angle = torch.randn(1, 2, 5, 8), torch.arange(5.0)[None, :, None] * torch.rand(4)
    >>> q, k = fastattn.rotary_tables(q, q, angle.cos(), angle.sin())

    Raises ValueError, TypeError or NotImplementedError naming the argument.
    """
    op = "rotary_tables"
    for name, table in (("cos", cos), ("sin", sin)):
        if isinstance(table, torch.Tensor) and table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"fastattn.{op}: {name} gets no gradient; pass {name}.detach()")
    return call(op, q, k, cos, sin, interleaved, False, requested(op, backend))


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
    """`rotary` of q and k that also writes the rotated k and v into a cache, in one launch on a GPU; for decoding and prefill.

    q, k, positions, theta: as for `rotary`. v: (B, Hkv, L, Dv). slots: (B, L), int32 or int64: the row of the cache for each
    token, in [0, capacity), which is checked on the CPU. The slots of a sequence must differ; this is not checked.
    keys: (B, Hkv, capacity, D); values: (B, Hkv, capacity, Dv); q's dtype and device; written in place.
    Returns rotated q, contiguous. It has no gradients: an input that requires one raises NotImplementedError outside of no_grad.
    Raises ValueError or TypeError naming the argument.
    """
    op = "rotary_append"
    return call(op, q, k, v, _one_row(positions), slots, keys, values, theta, requested(op, backend))


def _one_row(positions: torch.Tensor) -> torch.Tensor:
    """Positions of shape (1, L) as (L,): all sequences of the batch share them."""
    shared = isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[0] == 1
    return positions[0] if shared else positions
