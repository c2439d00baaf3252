"""The checks of fused_linear's arguments, run for every caller."""

import torch

from ...runtime import checks


def _check(op: str, x, weight, gate, eps, swiglu) -> tuple[int, ...]:
    """The shape of the result."""
    checks.check_floating(op, absent=("gate",), x=x, weight=weight, gate=gate)
    checks.check_tensor(op, "weight", weight, dims=2)
    columns, contracted = weight.shape
    if columns == 0 or contracted == 0:
        raise ValueError(f"fastattn.{op}: weight must not be empty, given {checks.describe(weight)}")
    if gate is not None:
        if eps is not None:
            raise ValueError(f"fastattn.{op}: norm_eps and gate exclude each other, given both")
        checks.check_shape(op, "gate", gate, x.shape, "x's")
        fits = x.dim() >= 2 and x.shape[-2] * x.shape[-1] == contracted
    else:
        fits = x.dim() >= 1 and x.shape[-1] == contracted
    if not fits:
        dims = "last two dims" if gate is not None else "last dim"
        raise ValueError(
            f"fastattn.{op}: x must have {dims} of {contracted}, weight's columns, given {checks.describe(x)}"
        )
    if eps is not None:
        checks.check_positive(op, "norm_eps", eps, zero=True)
    if swiglu and columns % 2:
        raise ValueError(
            f"fastattn.{op}: weight must have an even number of rows, gate | up, given {columns}"
        )
    lead = x.shape[:-1] if gate is None else x.shape[:-2]
    return (*lead, columns // 2 if swiglu else columns)


def check_fused_linear(x, weight, gate, residual, eps, swiglu, save) -> None:
    op = "fused_linear"
    shape = _check(op, x, weight, gate, eps, swiglu)
    if residual is not None:
        checks.check_floating(op, x=x, residual=residual)
        checks.check_shape(op, "residual", residual, shape, "the result's")


def check_fused_linear_backward(
    grad, x, weight, gate, rstd, product, eps, swiglu, need_x, need_weight
) -> None:
    op = "fused_linear_backward"
    shape = _check(op, x, weight, gate, eps, swiglu)
    checks.check_exact(op, "grad", grad, shape, x.dtype, x.device, "the result's")
    lead = shape[:-1]
    statistics = torch.promote_types(x.dtype, torch.float32)
    rstd_shape = lead if eps is not None else (0,)
    checks.check_exact(op, "rstd", rstd, rstd_shape, statistics, x.device, "as the forward gives it")
    product_shape = (*lead, weight.shape[0]) if swiglu else (0,)
    checks.check_exact(op, "product", product, product_shape, x.dtype, x.device, "as the forward saves it")
