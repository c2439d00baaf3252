"""The definitions of the row-wise ops, in plain torch."""

import torch
import torch.nn.functional as F

from ...runtime.arithmetic import wide


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed (..., D), x + residual or (0,), reciprocal rms (...,)). The sum is rounded to the wider of the two dtypes before the
    norm."""
    total = x if residual is None else x + residual
    rows = wide(total)
    rstd = torch.rsqrt(rows.square().mean(-1) + eps)
    normed = rows * rstd[..., None]
    if weight is not None:
        normed = normed * (wide(weight) + weight_offset)
    return normed.to(x.dtype), x.new_empty(0) if residual is None else total, rstd


def rms_norm_of_sum(
    total: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, dtype: torch.dtype
) -> torch.Tensor:
    """The normed rows of x + residual, in `dtype`."""
    normed = total if weight is None else total.to(torch.promote_types(total.dtype, weight.dtype))
    return rms_norm(normed, None, weight, eps, weight_offset)[0].to(dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (torch.sigmoid(wide(gate)) * wide(x)).to(x.dtype)


def angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """(..., D/2) rotation angles, position * theta^(-2i/D), in float64: at position 131072 a float32 angle is off by 9e-3."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    return positions.double()[..., None] * (1.0 / theta**exponent)


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, theta: float, interleaved: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    angle = angles(positions, q.shape[-1], theta)
    angle = angle if positions.dim() == 2 else angle[None]  # (B or 1, L, D/2)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return rotary_tables(q, k, angle.cos().to(dtype), angle.sin().to(dtype), interleaved, inverse)


def parts(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """The two parts of the last dim that are rotated together: its halves, or its even and odd indices."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def rotary_tables(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (B or 1, L, D or D/2). inverse: apply the transpose, which undoes a rotation."""
    cos, sin = (wide(t)[:, None] for t in (cos, sin))
    (c1, c2), (s1, s2) = (parts(t, interleaved) if t.shape[-1] == q.shape[-1] else (t, t) for t in (cos, sin))
    if inverse:
        s1, s2 = -s2, -s1

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = parts(wide(x), interleaved)
        left, right = first * c1 - second * s1, second * c2 + first * s2
        whole = torch.stack([left, right], -1).flatten(-2) if interleaved else torch.cat([left, right], -1)
        return whole.to(x.dtype)

    return rotate(q), rotate(k)


def rotary_append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, theta: float,
) -> torch.Tensor:  # fmt: skip
    """Rotated q. Writes rotated k and v to rows `slots` (B, L) of keys and values (B, H, capacity, D), in place."""
    q, k = rotary(q, k, positions, theta, False, False)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    keys[rows, :, slots.long()] = k.transpose(1, 2)
    values[rows, :, slots.long()] = v.transpose(1, 2)
    return q
