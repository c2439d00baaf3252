"""torch.ops.fastattn.linear_cross_entropy and stablemax_cross_entropy: schema, fake, autograd, backends."""

import torch

from ...runtime.checks import statistics_dtype
from ...runtime.registry import (
    Backend,
    cpu_backend,
    dispatch,
    reference_backend,
    register_op,
    save,
    triton_backend,
)
from . import checks

_OPTIONS = "int transform, float softcap, float z_loss, SymInt ignore_index, str reduction"
_TRITON = "fastattn.ops.vocab.triton"
_DIFFERENTIABLE = (0, 1, 2, 4)  # h, weight, bias, temperature


def gradients_like(tensors: tuple, wanted: int) -> tuple[torch.Tensor, ...]:
    """An empty gradient for each tensor whose bit is set, (0,) for the others."""
    first = next(t for t in tensors if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and wanted >> i & 1
        else first.new_empty(0)
        for i, t in enumerate(tensors)
    )


def fake_statistics(rows: torch.Tensor, reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty loss, and what backward needs of each row beside it: (2, N), the largest logit and the sum of the weights,
    of which the largest logit's is 1. A log-sum-exp of both would be rounded at the size of the logits."""
    statistics = rows.new_empty(2, rows.shape[0], dtype=statistics_dtype(rows))
    return statistics.new_empty(rows.shape[:1] if reduction == "none" else ()), statistics


def selected(found: tuple[torch.Tensor | None, ...], wanted: int, like: torch.Tensor) -> tuple:
    """The gradients whose bit is set, (0,) for the others."""
    return tuple(g if wanted >> i & 1 and g is not None else like.new_empty(0) for i, g in enumerate(found))


def bits(flags) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def saved_or_recomputed(
    wanted: int, found_before: int, grad: torch.Tensor, saved: tuple, recompute
) -> list[torch.Tensor | None]:
    """Gradients of the inputs that want one: those found in the forward pass times `grad`, or recompute(wanted)."""
    if wanted & ~found_before:
        found = recompute(wanted)
    else:
        # a scalar `grad` leaves the dtype of s, and is not rounded to it first
        found = [s * grad if wanted >> i & 1 else None for i, s in enumerate(saved)]
    return [g if wanted >> i & 1 else None for i, g in enumerate(found)]


def _cuda_backend(name: str) -> Backend:
    return Backend(
        "cuda",
        lambda: getattr(_cuda(), name),
        lambda *args: _cuda().refusal(*args),
        devices=("cuda",),
    )


def _cuda():
    from . import cuda

    return cuda


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


def _fake(
    h,
    weight,
    bias,
    target,
    temperature,
    transform,
    softcap,
    z_loss,
    ignore_index,
    reduction,
    gradients,
):
    return *fake_statistics(h, reduction), *gradients_like((h, weight, bias, temperature), gradients)


def _fake_backward(grad, h, weight, bias, target, temperature, statistics, *options):
    return gradients_like((h, weight, bias, temperature), options[-1])


def _load_reference():
    from . import reference

    def linear_cross_entropy(h, weight, bias, target, *args):
        *args, gradients = (weight, bias, target, *args)
        loss, statistics = reference.linear_cross_entropy(h, *args)
        found = (None,) * 4
        if gradients:
            found = reference.linear_cross_entropy_gradients(torch.ones_like(loss), h, *args)
        return loss, statistics, *selected(found, gradients, h)

    return linear_cross_entropy


def _load_reference_backward():
    from . import reference

    def linear_cross_entropy_backward(grad, h, weight, bias, target, temperature, statistics, *options):
        *options, wanted = options
        found = reference.linear_cross_entropy_gradients(grad, h, weight, bias, target, temperature, *options)
        return selected(found, wanted, h)

    return linear_cross_entropy_backward


def _setup_context(ctx, inputs, output):
    h, weight, bias, target, temperature, *ctx.options, ctx.gradients, ctx.backend = inputs
    _, statistics, *found = output
    ctx.mark_non_differentiable(*output[1:])
    save(ctx, h, weight, bias, target, temperature, statistics, *found)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    none = (None,) * (len(ctx.options) + 2)
    if grad is None:
        return (None,) * 5 + none
    tensors = ctx.saved_tensors
    saved, found = tensors[:6], tensors[6:]

    def recompute(wanted):
        return dispatch("linear_cross_entropy_backward", grad, *saved, *ctx.options, wanted, ctx.backend)

    wanted = bits(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
    dh, dweight, dbias, dtemperature = saved_or_recomputed(wanted, ctx.gradients, grad, found, recompute)
    return dh, dweight, dbias, None, dtemperature, *none


register_op(
    "linear_cross_entropy",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, "
    f"{_OPTIONS}, int gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    check=checks.check_linear_cross_entropy,
    check_contents=checks.check_linear_cross_entropy_contents,
    backends=(
        cpu_backend(__package__, "linear_cross_entropy"),
        _cuda_backend("linear_cross_entropy"),
        triton_backend(_TRITON, "linear_cross_entropy", configure="configure"),
        Backend("reference", _load_reference),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
register_op(
    "linear_cross_entropy_backward",
    "(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, Tensor statistics, "
    f"{_OPTIONS}, int wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    check=checks.check_linear_cross_entropy_backward,
    check_contents=checks.check_linear_cross_entropy_backward_contents,
    backends=(
        cpu_backend(__package__, "linear_cross_entropy_backward", tuned=False),
        _cuda_backend("linear_cross_entropy_backward"),
        triton_backend(_TRITON, "linear_cross_entropy_backward"),
        Backend("reference", _load_reference_backward),
    ),
)


# --- stablemax_cross_entropy -----------------------------------------------------------------------------------------


def _stablemax_fake(logits, target, ignore_index):
    return fake_statistics(logits, "none")


def _stablemax_setup(ctx, inputs, output):
    logits, target, ctx.ignore_index, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    save(ctx, logits, target, output[1])
    ctx.set_materialize_grads(False)


def _stablemax_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    return (
        dispatch("stablemax_cross_entropy_backward", grad, *ctx.saved_tensors, ctx.ignore_index, ctx.backend),
        None,
        None,
        None,
    )


register_op(
    "stablemax_cross_entropy",
    "(Tensor logits, Tensor target, SymInt ignore_index, str backend) -> (Tensor, Tensor)",
    fake=_stablemax_fake,
    check=checks.check_stablemax_cross_entropy,
    check_contents=checks.check_stablemax_cross_entropy_contents,
    backends=(
        cpu_backend(__package__, "stablemax_cross_entropy", tuned=False),
        triton_backend(_TRITON, "stablemax_cross_entropy", configure="configure_rows"),
        reference_backend(__package__, "stablemax_cross_entropy"),
    ),
    backward=_stablemax_backward,
    setup_context=_stablemax_setup,
)
register_op(
    "stablemax_cross_entropy_backward",
    "(Tensor grad, Tensor logits, Tensor target, Tensor statistics, SymInt ignore_index, str backend) -> Tensor",
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    check=checks.check_stablemax_cross_entropy_backward,
    check_contents=checks.check_stablemax_cross_entropy_backward_contents,
    backends=(
        cpu_backend(__package__, "stablemax_cross_entropy_backward", tuned=False),
        triton_backend(_TRITON, "stablemax_cross_entropy_backward", configure="configure_rows"),
        reference_backend(__package__, "stablemax_cross_entropy_backward"),
    ),
)
