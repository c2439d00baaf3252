"""torch.ops.fastattn.{rms_norm, swiglu, gated, rotary, rotary_append} and their backwards: schema, fake, autograd, backends."""

import torch

from ...runtime.registry import (
    Backend,
    cpu_backend,
    dispatch,
    reference_backend,
    reference_backward,
    register_op,
    save,
    triton_backend,
)
from . import checks


def _contiguous_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _triton(name: str):
    return triton_backend("fastattn.ops.rowwise.triton", name, configure="configure")


def _reference_vjp(name: str, outputs: int, wrt: tuple[int, ...]):
    def load():
        from . import reference

        return reference_backward(getattr(reference, name), outputs, wrt)

    return Backend("reference", load)


# --- rms_norm ------------------------------------------------------------------------------------------------------


def _rms_norm_fake(x, residual, weight, eps):
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.new_empty(0) if residual is None else _contiguous_like(x)
    return _contiguous_like(x), total, x.new_empty(x.shape[:-1], dtype=statistics)


def _rms_norm_setup(ctx, inputs, output):
    x, residual, weight, ctx.eps, ctx.backend = inputs
    _, total, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(rstd)
    save(ctx, total if ctx.has_residual else x, weight, rstd)
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx, grad_normed, grad_total, grad_rstd):
    total, weight, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_total = None
    if grad_normed is None:
        return grad_total, grad_total if ctx.has_residual else None, None, None, None
    grad, grad_weight = dispatch(
        "rms_norm_backward", grad_normed, grad_total, total, weight, rstd, ctx.eps, ctx.backend
    )
    return grad, grad if ctx.has_residual else None, None if weight is None else grad_weight, None, None


def _rms_norm_backward_fake(grad_normed, grad_total, total, weight, rstd, eps):
    return _contiguous_like(total), total.new_empty(0) if weight is None else _contiguous_like(weight)


def _load_rms_norm_backward():
    from . import reference

    pull = reference_backward(reference.rms_norm_of_sum, 1, (0, 1))

    def rms_norm_backward(grad_normed, grad_total, total, weight, rstd, eps):
        grad, grad_weight = pull(grad_normed, total, weight, eps)
        return grad if grad_total is None else grad + grad_total, grad_weight

    return rms_norm_backward


register_op(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_rms_norm_fake,
    check=checks.check_rms_norm,
    backends=(
        cpu_backend(__package__, "rms_norm"),
        _triton("rms_norm"),
        reference_backend(__package__, "rms_norm"),
    ),
    backward=_rms_norm_backward,
    setup_context=_rms_norm_setup,
)
register_op(
    "rms_norm_backward",
    "(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor? weight, Tensor rstd, float eps, str backend) "
    "-> (Tensor, Tensor)",
    fake=_rms_norm_backward_fake,
    check=checks.check_rms_norm_backward,
    backends=(
        cpu_backend(__package__, "rms_norm_backward"),
        _triton("rms_norm_backward"),
        Backend("reference", _load_rms_norm_backward),
    ),
)


# --- swiglu --------------------------------------------------------------------------------------------------------


def _swiglu_fake(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _swiglu_setup(ctx, inputs, output):
    save(ctx, inputs[0])
    ctx.backend = inputs[1]


def _swiglu_backward(ctx, grad):
    return dispatch("swiglu_backward", grad, *ctx.saved_tensors, ctx.backend), None


register_op(
    "swiglu",
    "(Tensor gate_up, str backend) -> Tensor",
    fake=_swiglu_fake,
    check=checks.check_swiglu,
    backends=(
        cpu_backend(__package__, "swiglu"),
        _triton("swiglu"),
        reference_backend(__package__, "swiglu"),
    ),
    backward=_swiglu_backward,
    setup_context=_swiglu_setup,
)
register_op(
    "swiglu_backward",
    "(Tensor grad, Tensor gate_up, str backend) -> Tensor",
    fake=lambda grad, gate_up: _contiguous_like(gate_up),
    check=checks.check_swiglu_backward,
    backends=(
        cpu_backend(__package__, "swiglu_backward"),
        _triton("swiglu_backward"),
        _reference_vjp("swiglu", 1, (0,)),
    ),
)


# --- gated ---------------------------------------------------------------------------------------------------------


def _gated_setup(ctx, inputs, output):
    save(ctx, *inputs[:2])
    ctx.backend = inputs[2]


def _gated_backward(ctx, grad):
    return (*dispatch("gated_backward", grad, *ctx.saved_tensors, ctx.backend), None)


register_op(
    "gated",
    "(Tensor x, Tensor gate, str backend) -> Tensor",
    fake=lambda x, gate: _contiguous_like(x),
    check=checks.check_gated,
    backends=(cpu_backend(__package__, "gated"), _triton("gated"), reference_backend(__package__, "gated")),
    backward=_gated_backward,
    setup_context=_gated_setup,
)
register_op(
    "gated_backward",
    "(Tensor grad, Tensor x, Tensor gate, str backend) -> (Tensor, Tensor)",
    fake=lambda grad, x, gate: (_contiguous_like(x), _contiguous_like(gate)),
    check=checks.check_gated_backward,
    backends=(
        cpu_backend(__package__, "gated_backward"),
        _triton("gated_backward"),
        _reference_vjp("gated", 1, (0, 1)),
    ),
)


# --- rotary: its backward is the rotation by the opposite angle -----------------------------------------------------


def _rotary_setup(ctx, inputs, output):
    _, _, positions, ctx.theta, ctx.inverse, ctx.backend = inputs
    save(ctx, positions)


def _rotary_backward(ctx, grad_q, grad_k):
    (positions,) = ctx.saved_tensors
    grads = dispatch("rotary", grad_q, grad_k, positions, ctx.theta, not ctx.inverse, ctx.backend)
    return (*grads, None, None, None, None)


register_op(
    "rotary",
    "(Tensor q, Tensor k, Tensor positions, float theta, bool inverse, str backend) -> (Tensor, Tensor)",
    fake=lambda q, k, positions, theta, inverse: (_contiguous_like(q), _contiguous_like(k)),
    check=checks.check_rotary,
    backends=(
        cpu_backend(__package__, "rotary"),
        _triton("rotary"),
        reference_backend(__package__, "rotary"),
    ),
    backward=_rotary_backward,
    setup_context=_rotary_setup,
    twice=True,
)


# --- rotary_append: without gradients, since it writes to a cache ----------------------------------------------------

register_op(
    "rotary_append",
    "(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor slots, Tensor(a!) keys, Tensor(b!) values, float theta, "
    "str backend) -> Tensor",
    fake=lambda q, *rest: _contiguous_like(q),
    check=checks.check_rotary_append,
    check_contents=checks.check_rotary_append_contents,
    backends=(
        triton_backend("fastattn.ops.rowwise.triton", "rotary_append", refusal="refusal_append"),
        reference_backend(__package__, "rotary_append"),
    ),
)
