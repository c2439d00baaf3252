"""The definition of fused_linear, in plain torch."""

import torch
import torch.nn.functional as F

from ..rowwise import reference as rows


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float | None,
    swiglu: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out; the product before SwiGLU with swiglu and save, else (0,); the reciprocal rms (...,) with eps, else (0,))."""
    product = x.new_empty(0)
    rstd = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    if eps is not None:
        x, _, rstd = rows.rms_norm(x, None, None, eps)
    if gate is not None:
        x = rows.gated(x, gate).flatten(-2)  # (..., H * D)
    out = F.linear(x, weight)
    if swiglu:
        product = out if save else product
        out = rows.swiglu(out)
    if residual is not None:
        out = out + residual
    return out, product, rstd


def result(x, weight, gate, eps, swiglu) -> torch.Tensor:
    return fused_linear(x, weight, gate, None, eps, swiglu, False)[0]
