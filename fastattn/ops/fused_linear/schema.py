"""The declaration of torch.ops.fastattn.fused_linear and fused_linear_backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.declare import Autograd, declare, gradient_like, pull, save
from ...runtime.registry import dispatch
from . import cpu, reference
from .checks import check_fused_linear, check_fused_linear_backward

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


class Call(NamedTuple):
    x: torch.Tensor  # (..., K), or with a gate (..., H, D)
    weight: torch.Tensor  # (N, K)
    gate: torch.Tensor | None  # as x
    residual: torch.Tensor | None  # (..., N)
    eps: float | None  # None: no norm of x's rows
    swiglu: bool  # the halves of weight's rows are gate and up
    save: bool  # whether to return the product before SwiGLU, for the backward


class BackwardCall(NamedTuple):
    grad: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    gate: torch.Tensor | None
    rstd: torch.Tensor
    product: torch.Tensor
    eps: float | None
    swiglu: bool
    need_x: bool  # x or gate
    need_weight: bool


def _lead(x: torch.Tensor, gate: torch.Tensor | None) -> tuple[int, ...]:
    return x.shape[:-1] if gate is None else x.shape[:-2]


def _fake(x, weight, gate, residual, eps, swiglu, save):
    lead, columns = _lead(x, gate), weight.shape[0]
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*lead, columns // 2 if swiglu else columns),
        x.new_empty((*lead, columns) if swiglu and save else (0,)),
        x.new_empty(lead if eps is not None else (0,), dtype=statistics),
    )


def _fake_backward(grad, x, weight, gate, rstd, product, eps, swiglu, need_x, need_weight):
    return gradient_like(x, x, need_x), gradient_like(weight, x, need_weight), gradient_like(gate, x, need_x)


def _reference(x, weight, gate, residual, eps, swiglu, save):
    out, product, rstd = reference.fused_linear(x, weight, gate, residual, eps, swiglu, save)
    return out.contiguous(), product, rstd


def _reference_backward(grad, x, weight, gate, rstd, product, eps, swiglu, need_x, need_weight):
    gradients = pull(reference.result, (grad,), (x, weight, gate, eps, swiglu), (0, 1, 2))
    needed = zip(gradients, (need_x, need_weight, need_x), strict=True)
    return tuple(x.new_empty(0) if t is None or not need else t for t, need in needed)


def _setup_context(ctx, inputs, output):
    x, weight, gate, _, ctx.eps, ctx.swiglu, ctx.save, ctx.backend = inputs
    _, product, rstd = output
    ctx.mark_non_differentiable(product, rstd)
    ctx.set_materialize_grads(False)
    save(ctx, x, weight, gate, rstd, product)


def _backward(ctx, grad, grad_product, grad_rstd):
    if grad is None:
        return (None,) * 8
    x, weight, gate, rstd, product = ctx.saved_tensors
    need_x, need_weight, need_gate, need_residual = ctx.needs_input_grad[:4]
    dx = dweight = dgate = None
    if need_x or need_weight or need_gate:
        if ctx.swiglu and not ctx.save:
            raise RuntimeError("fastattn.fused_linear: save must be True for a gradient through swiglu")
        dx, dweight, dgate = dispatch(
            "fused_linear_backward",
            grad,
            x,
            weight,
            gate,
            rstd,
            product,
            ctx.eps,
            ctx.swiglu,
            need_x or need_gate,
            need_weight,
            ctx.backend,
        )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dgate if need_gate else None,
        grad if need_residual else None,
        None,
        None,
        None,
        None,
    )


declare(
    "fused_linear",
    Call,
    outputs=("out", "product", "rstd"),
    fake=_fake,
    check=check_fused_linear,
    backends=(
        cpu_backend(cpu.fused_linear, cpu.refusal, cpu.configure),
        triton_backend(triton.fused_linear, triton.refusal, triton.configure),
        reference_backend(_reference),
    ),
    gradients=Autograd(_setup_context, _backward),
)
declare(
    "fused_linear_backward",
    BackwardCall,
    outputs=("grad_x", "grad_weight", "grad_gate"),
    fake=_fake_backward,
    check=check_fused_linear_backward,
    backends=(
        cpu_backend(cpu.fused_linear_backward, cpu.refusal, cpu.configure_backward),
        triton_backend(triton.fused_linear_backward, triton.refusal),
        reference_backend(_reference_backward),
    ),
)
