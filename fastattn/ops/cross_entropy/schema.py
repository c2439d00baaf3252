"""The declarations of torch.ops.fastattn.linear_cross_entropy, stablemax_cross_entropy and their backwards."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, cuda_backend, reference_backend, triton_backend
from ...runtime.declare import Autograd, Gradients, bits, declare, save
from ...runtime.registry import dispatch
from ...runtime.schema import Size
from ..vocabulary import fake_statistics, gradients_like, saved_or_recomputed, selected
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import cuda, triton
else:
    cuda, triton = Lazy(f"{__package__}.cuda"), Lazy(f"{__package__}.triton")

_GRADIENTS = ("grad_h", "grad_weight", "grad_bias", "grad_temperature", "grad_target")
_DIFFERENTIABLE = (0, 1, 2, 4, 3)  # h, weight, bias, temperature, target


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


class LinearCall(NamedTuple):
    h: torch.Tensor  # (N, d)
    weight: torch.Tensor  # (V, d)
    bias: torch.Tensor | None  # (V,)
    target: torch.Tensor  # (N,) class indices, or (N, V) probabilities
    temperature: torch.Tensor | None  # (N,)
    class_weight: torch.Tensor | None  # (V,)
    transform: int
    softcap: float
    z_loss: float
    label_smoothing: float
    ignore_index: Size
    reduction: str
    return_lse: bool
    # a bit for each of h, weight, bias, temperature, target: gradients that the forward computes, for an incoming gradient of 1
    gradients: int


class LinearBackwardCall(NamedTuple):
    grad: torch.Tensor
    grad_lse: torch.Tensor | None  # (N,)
    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    temperature: torch.Tensor | None
    class_weight: torch.Tensor | None
    statistics: torch.Tensor  # (2, N)
    transform: int
    softcap: float
    z_loss: float
    label_smoothing: float
    ignore_index: Size
    reduction: str
    wanted: int  # bits as in `gradients`


def _fake(h, weight, bias, target, temperature, class_weight, *options):
    *_, reduction, return_lse, gradients = options
    loss, statistics = fake_statistics(h, reduction)
    lse = statistics.new_empty(h.shape[0] if return_lse else 0)
    return loss, statistics, lse, *gradients_like((h, weight, bias, temperature, target), gradients)


def _fake_backward(grad, grad_lse, h, weight, bias, target, temperature, *options):
    return gradients_like((h, weight, bias, temperature, target), options[-1])


def _reference(h, *arguments):
    *arguments, return_lse, gradients = arguments
    loss, statistics, lse = reference.linear_cross_entropy(h, *arguments)
    grads = (None,) * 5
    if gradients:
        grads = reference.linear_cross_entropy_gradients(torch.ones_like(loss), None, h, *arguments)
    return loss, statistics, lse if return_lse else lse.new_empty(0), *selected(grads, gradients, h)


def _reference_backward(
    grad, grad_lse, h, weight, bias, target, temperature, class_weight, statistics, *options
):
    *options, wanted = options
    grads = reference.linear_cross_entropy_gradients(
        grad, grad_lse, h, weight, bias, target, temperature, class_weight, *options
    )
    return selected(grads, wanted, h)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.return_lse, ctx.gradients, ctx.backend = inputs
    tensors, ctx.options = tensors[:6], tensors[6:]
    _, statistics, lse, *gradients = output
    ctx.mark_non_differentiable(statistics, *(() if ctx.return_lse else (lse,)), *gradients)
    save(ctx, *tensors, statistics, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_statistics, grad_lse, *_):
    no_gradients = (None,) * (len(ctx.options) + 3)
    if grad is None and grad_lse is None:
        return (None,) * 6 + no_gradients
    tensors = ctx.saved_tensors
    saved, saved_grads = tensors[:7], tensors[7:]
    if grad is None:
        grad = grad_lse.new_zeros(grad_lse.shape if ctx.options[-1] == "none" else ())

    def recompute(wanted):
        return dispatch(
            "linear_cross_entropy_backward", grad, grad_lse, *saved, *ctx.options, wanted, ctx.backend
        )

    wanted = bits(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
    saved_bits = ctx.gradients if grad_lse is None else 0
    dh, dweight, dbias, dtemperature, dtarget = saved_or_recomputed(
        wanted, saved_bits, grad, saved_grads, recompute
    )
    return dh, dweight, dbias, dtarget, dtemperature, None, *no_gradients


declare(
    "linear_cross_entropy",
    LinearCall,
    outputs=("loss", "statistics", "lse", *_GRADIENTS),
    fake=_fake,
    check=checks.check_linear_cross_entropy,
    check_contents=checks.check_linear_cross_entropy_contents,
    backends=(
        cpu_backend(cpu.linear_cross_entropy, cpu.refusal_linear, cpu.configure),
        cuda_backend(cuda.linear_cross_entropy, cuda.refusal_linear),
        triton_backend(triton.linear_cross_entropy, triton.refusal_linear, triton.configure),
        reference_backend(_reference),
    ),
    gradients=Autograd(_setup_context, _backward),
)
declare(
    "linear_cross_entropy_backward",
    LinearBackwardCall,
    outputs=_GRADIENTS,
    fake=_fake_backward,
    check=checks.check_linear_cross_entropy_backward,
    check_contents=checks.check_linear_cross_entropy_backward_contents,
    backends=(
        cpu_backend(cpu.linear_cross_entropy_backward, cpu.refusal_linear_backward),
        cuda_backend(cuda.linear_cross_entropy_backward, cuda.refusal_linear_backward),
        triton_backend(triton.linear_cross_entropy_backward, triton.refusal_linear_backward),
        reference_backend(_reference_backward),
    ),
)


# --- stablemax_cross_entropy -----------------------------------------------------------------------------------------


class StablemaxCall(NamedTuple):
    logits: torch.Tensor  # (N, V)
    target: torch.Tensor  # (N,)
    ignore_index: Size


declare(
    "stablemax_cross_entropy",
    StablemaxCall,
    outputs=("out", "statistics"),
    fake=lambda logits, target, ignore_index: fake_statistics(logits, "none"),
    check=checks.check_stablemax_cross_entropy,
    check_contents=checks.check_stablemax_cross_entropy_contents,
    backends=(
        cpu_backend(cpu.stablemax_cross_entropy, cpu.refusal),
        triton_backend(triton.stablemax_cross_entropy, triton.refusal, triton.configure_rows),
        reference_backend(reference.stablemax_cross_entropy),
    ),
    gradients=Gradients(
        of=("logits",),
        saved=("statistics",),
        check=checks.check_stablemax_cross_entropy_backward,
        check_contents=checks.check_stablemax_cross_entropy_backward_contents,
        backends=(
            cpu_backend(cpu.stablemax_cross_entropy_backward, cpu.refusal),
            triton_backend(triton.stablemax_cross_entropy_backward, triton.refusal, triton.configure_rows),
            reference_backend(reference.stablemax_cross_entropy_backward),
        ),
    ),
)
