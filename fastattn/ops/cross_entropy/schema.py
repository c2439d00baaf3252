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

_DIFFERENTIABLE = (0, 1, 2, 4)  # h, weight, bias, temperature


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


class LinearCall(NamedTuple):
    h: torch.Tensor  # (N, d)
    weight: torch.Tensor  # (V, d)
    bias: torch.Tensor | None  # (V,)
    target: torch.Tensor  # (N,)
    temperature: torch.Tensor | None  # (N,), of StableMax
    transform: int
    softcap: float
    z_loss: float
    ignore_index: Size
    reduction: str
    gradients: (
        int  # a bit for each of h, weight, bias, temperature: found in the forward pass, of a gradient of 1
    )


class LinearBackwardCall(NamedTuple):
    grad: torch.Tensor
    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    temperature: torch.Tensor | None
    statistics: torch.Tensor  # (2, N)
    transform: int
    softcap: float
    z_loss: float
    ignore_index: Size
    reduction: str
    wanted: int  # bits as in `gradients`


def _fake(
    h, weight, bias, target, temperature, transform, softcap, z_loss, ignore_index, reduction, gradients
):
    return *fake_statistics(h, reduction), *gradients_like((h, weight, bias, temperature), gradients)


def _fake_backward(grad, h, weight, bias, target, temperature, *options):
    return gradients_like((h, weight, bias, temperature), options[-1])


def _reference(h, weight, bias, target, temperature, *options):
    *options, gradients = (weight, bias, target, temperature, *options)
    loss, statistics = reference.linear_cross_entropy(h, *options)
    found = (None,) * 4
    if gradients:
        found = reference.linear_cross_entropy_gradients(torch.ones_like(loss), h, *options)
    return loss, statistics, *selected(found, gradients, h)


def _reference_backward(grad, h, weight, bias, target, temperature, statistics, *options):
    *options, wanted = options
    found = reference.linear_cross_entropy_gradients(grad, h, weight, bias, target, temperature, *options)
    return selected(found, wanted, h)


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


declare(
    "linear_cross_entropy",
    LinearCall,
    outputs=("loss", "statistics", "grad_h", "grad_weight", "grad_bias", "grad_temperature"),
    fake=_fake,
    check=checks.check_linear_cross_entropy,
    check_contents=checks.check_linear_cross_entropy_contents,
    backends=(
        cpu_backend(cpu.linear_cross_entropy, cpu.refusal, cpu.configure),
        cuda_backend(cuda.linear_cross_entropy, cuda.refusal),
        triton_backend(triton.linear_cross_entropy, triton.refusal, triton.configure),
        reference_backend(_reference),
    ),
    gradients=Autograd(_setup_context, _backward),
)
declare(
    "linear_cross_entropy_backward",
    LinearBackwardCall,
    outputs=("grad_h", "grad_weight", "grad_bias", "grad_temperature"),
    fake=_fake_backward,
    check=checks.check_linear_cross_entropy_backward,
    check_contents=checks.check_linear_cross_entropy_backward_contents,
    backends=(
        cpu_backend(cpu.linear_cross_entropy_backward, cpu.refusal),
        cuda_backend(cuda.linear_cross_entropy_backward, cuda.refusal),
        triton_backend(triton.linear_cross_entropy_backward, triton.refusal),
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
