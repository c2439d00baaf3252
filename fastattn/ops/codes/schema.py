"""The declarations of torch.ops.fastattn.{vq_logits, vq_cross_entropy, vq_argmax, vq_sample, nearest_codes} and backwards."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.declare import Autograd, Gradients, bits, declare, save
from ...runtime.registry import dispatch
from ...runtime.schema import Size
from ..vocabulary import fake_statistics, gradients_like, saved_or_recomputed, selected
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


def _on_cpu(run):
    return cpu_backend(run, cpu.refusal, cpu.configure)


def _on_triton(run):
    return triton_backend(run, triton.refusal, triton.configure)


# --- vq_logits -------------------------------------------------------------------------------------------------------


class HeadCall(NamedTuple):
    h: torch.Tensor  # (N, d)
    codebook: torch.Tensor  # (K, d)
    codes: torch.Tensor  # (V,)
    bias: torch.Tensor | None  # (V,)


def _logits_backward(grad_out, h, codebook, codes, bias, wanted):
    return selected(reference.vq_logits_gradients(grad_out, h, codebook, codes, bias), wanted, h)


_check_head, _check_head_contents = checks.head_checks("vq_logits")

declare(
    "vq_logits",
    HeadCall,
    fake=lambda h, codebook, codes, bias: h.new_empty(h.shape[0], codes.shape[0]),
    check=_check_head,
    check_contents=_check_head_contents,
    backends=(
        _on_cpu(cpu.vq_logits),
        _on_triton(triton.vq_logits),
        reference_backend(reference.vq_logits),
    ),
    gradients=Gradients(
        of=("h", "codebook", "bias"),
        optional=("h", "codebook", "bias"),
        check=checks.check_vq_logits_backward,
        check_contents=checks.check_vq_logits_backward_contents,
        backends=(
            cpu_backend(cpu.vq_logits_backward, cpu.refusal),
            triton_backend(triton.vq_logits_backward, triton.refusal),
            reference_backend(_logits_backward),
        ),
    ),
)


# --- vq_cross_entropy ------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = (0, 1, 3, 4)  # h, codebook, bias, shadow


class LossCall(NamedTuple):
    h: torch.Tensor  # (N, d)
    codebook: torch.Tensor  # (K, d)
    codes: torch.Tensor  # (V,)
    bias: torch.Tensor | None  # (V,)
    shadow: torch.Tensor | None  # (V, d)
    target: torch.Tensor  # (N,)
    ignore_index: Size
    reduction: str
    # a bit for each of h, codebook, bias, shadow: gradients that the forward computes, for an incoming gradient of 1
    gradients: int


class LossBackwardCall(NamedTuple):
    grad: torch.Tensor
    h: torch.Tensor
    codebook: torch.Tensor
    codes: torch.Tensor
    bias: torch.Tensor | None
    shadow: torch.Tensor | None
    target: torch.Tensor
    statistics: torch.Tensor  # (2, N)
    ignore_index: Size
    reduction: str
    wanted: int  # bits as in `gradients`


def _loss_fake(h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients):
    return *fake_statistics(h, reduction), *gradients_like((h, codebook, bias, shadow), gradients)


def _loss(h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients):
    options = (codebook, codes, bias, shadow, target, ignore_index, reduction)
    loss, statistics = reference.vq_cross_entropy(h, *options)
    grads = (None,) * 4
    if gradients:
        grads = reference.vq_cross_entropy_gradients(torch.ones_like(loss), h, *options)
    return loss, statistics, *selected(grads, gradients, h)


def _loss_gradients(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted
):
    grads = reference.vq_cross_entropy_gradients(
        grad, h, codebook, codes, bias, shadow, target, ignore_index, reduction
    )
    return selected(grads, wanted, h)


def _loss_setup(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.reduction, ctx.gradients, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    save(ctx, *tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    tensors = ctx.saved_tensors
    saved, saved_grads = tensors[:7], tensors[7:]

    def recompute(wanted):
        return dispatch(
            "vq_cross_entropy_backward", grad, *saved, ctx.ignore_index, ctx.reduction, wanted, ctx.backend
        )

    wanted = bits(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
    dh, dcodebook, dbias, dshadow = saved_or_recomputed(wanted, ctx.gradients, grad, saved_grads, recompute)
    return dh, dcodebook, None, dbias, dshadow, None, None, None, None, None


declare(
    "vq_cross_entropy",
    LossCall,
    outputs=("loss", "statistics", "grad_h", "grad_codebook", "grad_bias", "grad_shadow"),
    fake=_loss_fake,
    check=checks.check_vq_cross_entropy,
    check_contents=checks.check_vq_cross_entropy_contents,
    backends=(
        _on_cpu(cpu.vq_cross_entropy),
        _on_triton(triton.vq_cross_entropy),
        reference_backend(_loss),
    ),
    gradients=Autograd(_loss_setup, _loss_backward),
)
declare(
    "vq_cross_entropy_backward",
    LossBackwardCall,
    outputs=("grad_h", "grad_codebook", "grad_bias", "grad_shadow"),
    fake=lambda grad, h, codebook, codes, bias, shadow, *options: gradients_like(
        (h, codebook, bias, shadow), options[-1]
    ),
    check=checks.check_vq_cross_entropy_backward,
    check_contents=checks.check_vq_cross_entropy_backward_contents,
    backends=(
        cpu_backend(cpu.vq_cross_entropy_backward, cpu.refusal),
        triton_backend(triton.vq_cross_entropy_backward, triton.refusal),
        reference_backend(_loss_gradients),
    ),
)


# --- choices of a token or a code ------------------------------------------------------------------------------------


class SampleCall(NamedTuple):
    h: torch.Tensor  # (N, d)
    codebook: torch.Tensor  # (K, d)
    codes: torch.Tensor  # (V,)
    bias: torch.Tensor | None  # (V,)
    uniform: torch.Tensor  # (N, 2)
    temperature: float


class NearestCall(NamedTuple):
    x: torch.Tensor  # (N, d)
    codebook: torch.Tensor  # (K, d)


def _one_a_row(rows, *_):
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


_check_argmax, _check_argmax_contents = checks.head_checks("vq_argmax")

declare(
    "vq_argmax",
    HeadCall,
    fake=_one_a_row,
    check=_check_argmax,
    check_contents=_check_argmax_contents,
    backends=(
        _on_cpu(cpu.vq_argmax),
        _on_triton(triton.vq_argmax),
        reference_backend(reference.vq_argmax),
    ),
)
declare(
    "vq_sample",
    SampleCall,
    fake=_one_a_row,
    check=checks.check_vq_sample,
    check_contents=checks.check_vq_sample_contents,
    backends=(
        _on_cpu(cpu.vq_sample),
        triton_backend(triton.vq_sample, triton.refusal_sample, triton.configure),
        reference_backend(reference.vq_sample),
    ),
)
declare(
    "nearest_codes",
    NearestCall,
    fake=_one_a_row,
    check=checks.check_nearest_codes,
    backends=(
        _on_cpu(cpu.nearest_codes),
        _on_triton(triton.nearest_codes),
        reference_backend(reference.nearest_codes),
    ),
)
