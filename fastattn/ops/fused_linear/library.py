"""A product by torch's library between a backend's row kernels. `rows` is the backend's module of ops/rowwise."""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F


def flat(t: torch.Tensor) -> torch.Tensor:
    """(..., C) as (M, C) with a contiguous last dim."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous() if t.shape[1] > 1 else t.resolve_neg()


def operand(rows: ModuleType, x, gate, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """(the product's operand (M, K), computed by row kernels; rstd, or (0,) without a norm)."""
    if eps is not None:
        x, _, rstd = rows.rms_norm(x, None, None, eps, 0.0)
        return flat(x), rstd
    x = flat(x if gate is None else rows.gated(x, gate).flatten(-2))
    return x, x.new_empty(0, dtype=torch.float32)


def forward(rows: ModuleType, x, weight, gate, residual, eps, swiglu, save, out, product):
    """(out, product, rstd) of a call with a non-empty result. `out` and `product` are buffers of the results' shapes."""
    columns = weight.shape[0]
    a, rstd = operand(rows, x, gate, eps)
    if swiglu:
        gate_up = F.linear(a, weight)
        product = gate_up.view(product.shape) if save else product
        out = rows.swiglu(gate_up).view(out.shape)
        out = out if residual is None else out.add_(residual)
    elif residual is None:
        torch.mm(a, weight.t(), out=out.view(-1, columns))
    else:
        torch.addmm(flat(residual), a, weight.t(), out=out.view(-1, columns))
    return out, product, rstd


def weight_gradient(grad: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(grad.t(), a, out=out)


def operand_gradient(grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(grad, weight, out=out)


def backward(
    rows: ModuleType, grad, x, weight, gate, rstd, product, eps, swiglu, need_x, need_weight,
    weight_gradient: Callable[..., None] = weight_gradient, operand_gradient: Callable[..., None] = operand_gradient,
):  # fmt: skip
    """(dx, dweight, dgate), (0,) for a gradient that is not needed. weight_gradient(grad (M, N), a (M, K), out (N, K)) and
    operand_gradient(grad (M, N), weight (N, K), out (M, K)) compute the products."""
    dx = dgate = dweight = None
    grad = flat(rows.swiglu_backward(grad, product) if swiglu else grad)  # (M, N)
    if need_weight:
        # recompute the norm or gate, one pass over x: saving its result would take as much memory as x
        a, _ = operand(rows, x, gate, eps)
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if grad.numel() == 0:
            dweight.zero_()
        else:
            weight_gradient(grad, a, dweight)
    if need_x:
        da = x.new_empty(grad.shape[0], weight.shape[1])
        if grad.shape[1] == 0:
            da.zero_()
        elif da.numel():
            operand_gradient(grad, weight, da)
        da = da.view(x.shape)
        if eps is not None:
            dx, _ = rows.rms_norm_backward(da, None, x, None, rstd, eps, 0.0)
        elif gate is not None:
            dx, dgate = rows.gated_backward(da, x, gate)
        else:
            dx = da
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dweight, dgate))
