"""torch.ops.fastattn.fused_linear and fused_linear_backward: schema, fake, autograd, backends."""

import torch

from ...runtime.registry import (
    Backend,
    cpu_backend,
    dispatch,
    reference_backward,
    register_op,
    save,
    triton_backend,
)
from .checks import check_fused_linear, check_fused_linear_backward


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
    def like(t, needed):
        return (
            x.new_empty(0)
            if t is None or not needed
            else torch.empty_like(t, memory_format=torch.contiguous_format)
        )

    return like(x, need_x), like(weight, need_weight), like(gate, need_x)


def _load_reference():
    from .reference import fused_linear

    def implementation(*args):
        out, product, rstd = fused_linear(*args)
        return out.contiguous(), product, rstd

    return implementation


def _load_reference_backward():
    from .reference import result

    pull = reference_backward(result, 1, (0, 1, 2))

    def fused_linear_backward(grad, x, weight, gate, rstd, product, eps, swiglu, need_x, need_weight):
        dx, dweight, dgate = pull(grad, x, weight, gate, eps, swiglu)
        absent = x.new_empty(0)
        return (
            dx if need_x else absent,
            dweight if need_weight else absent.clone(),
            dgate if need_x else absent.clone(),
        )

    return fused_linear_backward


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


register_op(
    "fused_linear",
    "(Tensor x, Tensor weight, Tensor? gate, Tensor? residual, float? eps, bool swiglu, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    check=check_fused_linear,
    backends=(
        cpu_backend(__package__, "fused_linear"),
        triton_backend(f"{__package__}.triton", "fused_linear", configure="configure"),
        Backend("reference", _load_reference),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
register_op(
    "fused_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? gate, Tensor rstd, Tensor product, float? eps, bool swiglu, "
    "bool need_x, bool need_weight, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    check=check_fused_linear_backward,
    backends=(
        cpu_backend(__package__, "fused_linear_backward"),
        triton_backend(f"{__package__}.triton", "fused_linear_backward"),
        Backend("reference", _load_reference_backward),
    ),
)
