"""torch.ops.fastattn.linear_cross_entropy and stablemax_cross_entropy: schema, fake, autograd, backends."""

import torch

from ..._checks import statistics_dtype
from ..._registry import Backend, cpu_backend, reference_backend, register_op, triton_backend
from . import checks

_OPTIONS = "int transform, float softcap, float z_loss, int ignore_index, str reduction"
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
        found = [s * grad.to(s.dtype) if wanted >> i & 1 else None for i, s in enumerate(saved)]
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
    lse = h.new_empty(h.shape[0], dtype=statistics_dtype(h))
    loss = torch.empty_like(lse) if reduction == "none" else lse.new_empty(())
    return loss, lse, *gradients_like((h, weight, bias, temperature), gradients)


def _fake_backward(grad, h, weight, bias, target, temperature, lse, *options):
    return gradients_like((h, weight, bias, temperature), options[-1])


def _load_reference():
    from . import reference

    def linear_cross_entropy(h, weight, bias, target, *args):
        *args, gradients = (weight, bias, target, *args)
        loss, lse = reference.linear_cross_entropy(h, *args)
        found = (None,) * 4
        if gradients:
            found = reference.linear_cross_entropy_gradients(torch.ones_like(loss), h, *args)
        return loss, lse, *selected(found, gradients, h)

    return linear_cross_entropy


def _load_reference_backward():
    from . import reference

    def linear_cross_entropy_backward(grad, h, weight, bias, target, temperature, lse, *options):
        *options, wanted = options
        found = reference.linear_cross_entropy_gradients(grad, h, weight, bias, target, temperature, *options)
        return selected(found, wanted, h)

    return linear_cross_entropy_backward


def _setup_context(ctx, inputs, output):
    h, weight, bias, target, temperature, *ctx.options, ctx.gradients, ctx.backend = inputs
    _, lse, *found = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(h, weight, bias, target, temperature, lse, *found)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    none = (None,) * (len(ctx.options) + 2)
    if grad is None:
        return (None,) * 5 + none
    tensors = ctx.saved_tensors
    saved, found = tensors[:6], tensors[6:]

    def recompute(wanted):
        return torch.ops.fastattn.linear_cross_entropy_backward(
            grad, *saved, *ctx.options, wanted, ctx.backend
        )

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
    "(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, Tensor lse, "
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
    loss = logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits))
    return loss, torch.empty_like(loss)


def _stablemax_setup(ctx, inputs, output):
    logits, target, ctx.ignore_index, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1])
    ctx.set_materialize_grads(False)


def _stablemax_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    return (
        torch.ops.fastattn.stablemax_cross_entropy_backward(
            grad, *ctx.saved_tensors, ctx.ignore_index, ctx.backend
        ),
        None,
        None,
        None,
    )


register_op(
    "stablemax_cross_entropy",
    "(Tensor logits, Tensor target, int ignore_index, str backend) -> (Tensor, Tensor)",
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
    "(Tensor grad, Tensor logits, Tensor target, Tensor lse, int ignore_index, str backend) -> Tensor",
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    check=checks.check_stablemax_cross_entropy_backward,
    check_contents=checks.check_stablemax_cross_entropy_backward_contents,
    backends=(
        cpu_backend(__package__, "stablemax_cross_entropy_backward", tuned=False),
        triton_backend(_TRITON, "stablemax_cross_entropy_backward", configure="configure_rows"),
        reference_backend(__package__, "stablemax_cross_entropy_backward"),
    ),
)
