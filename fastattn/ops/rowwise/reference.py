"""The definitions of the recurrence pieces, in plain torch."""

import torch
import torch.nn.functional as F


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed (..., D), x + residual or (0,), reciprocal rms (...,)); the norm is of the sum as rounded to x's dtype."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = wide * rstd[..., None]
    if weight is not None:
        normed = normed * _wide(weight)
    return normed.to(x.dtype), x.new_empty(0) if residual is None else total, rstd


def rms_norm_of_sum(total: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return rms_norm(total, None, weight, eps)[0]


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (torch.sigmoid(_wide(gate)) * _wide(x)).to(x.dtype)


def angles(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """(..., D/2) rotation angles: position * theta^(-2i/D)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    return positions.to(dtype)[..., None] * (1.0 / theta**exponent)


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, theta: float, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    angle = angles(
        positions, q.shape[-1], theta, torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    angle = angle[:, None] if positions.dim() == 2 else angle  # (B, 1, L, D/2) or (L, D/2)
    cos, sin = angle.cos(), angle.sin()
    if inverse:
        sin = -sin

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rotary_append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, theta: float,
) -> torch.Tensor:  # fmt: skip
    """q rotated; rotated k and v go to rows `slots` (B, L) of keys and values (B, H, capacity, D), in place."""
    q, k = rotary(q, k, positions, theta, False)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    keys[rows, :, slots.long()] = k.transpose(1, 2)
    values[rows, :, slots.long()] = v.transpose(1, 2)
    return q
