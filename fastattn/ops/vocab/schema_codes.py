"""torch.ops.fastattn.{vq_logits, vq_cross_entropy, vq_argmax, vq_sample, nearest_codes}: schema, fake, autograd, backends."""

import torch

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
from .schema import bits, fake_statistics, gradients_like, saved_or_recomputed, selected


def _triton(name: str, *, tuned: bool = False) -> Backend:
    configure = "configure" if tuned else None
    refusal = "refusal_sample" if name == "vq_sample" else "refusal"
    return triton_backend("fastattn.ops.vocab.triton_codes", name, refusal=refusal, configure=configure)


# --- vq_logits -------------------------------------------------------------------------------------------------------


def _load_logits_backward():
    from .reference import vq_logits_gradients

    def vq_logits_backward(grad, *args):
        *args, wanted = args
        return selected(vq_logits_gradients(grad, *args), wanted, grad)

    return vq_logits_backward


def _logits_setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    save(ctx, *tensors)


def _logits_backward(ctx, grad):
    wanted = bits(ctx.needs_input_grad[i] for i in (0, 1, 3))
    found = dispatch("vq_logits_backward", grad, *ctx.saved_tensors, wanted, ctx.backend)
    dh, dcodebook, dbias = (g if wanted >> i & 1 else None for i, g in enumerate(found))
    return dh, dcodebook, None, dbias, None


_check_logits, _check_logits_contents = checks.head_checks("vq_logits")

register_op(
    "vq_logits",
    "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, str backend) -> Tensor",
    fake=lambda h, codebook, codes, bias: h.new_empty(h.shape[0], codes.shape[0]),
    check=_check_logits,
    check_contents=_check_logits_contents,
    backends=(
        cpu_backend(__package__, "vq_logits", module="cpu_codes"),
        _triton("vq_logits", tuned=True),
        reference_backend(__package__, "vq_logits"),
    ),
    backward=_logits_backward,
    setup_context=_logits_setup,
)
register_op(
    "vq_logits_backward",
    "(Tensor grad, Tensor h, Tensor codebook, Tensor codes, Tensor? bias, int wanted, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda grad, h, codebook, codes, bias, wanted: gradients_like((h, codebook, bias), wanted),
    check=checks.check_vq_logits_backward,
    check_contents=checks.check_vq_logits_backward_contents,
    backends=(
        cpu_backend(__package__, "vq_logits_backward", module="cpu_codes", tuned=False),
        _triton("vq_logits_backward"),
        Backend("reference", _load_logits_backward),
    ),
)


# --- vq_cross_entropy ------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = (0, 1, 3, 4)  # h, codebook, bias, shadow


def _loss_fake(h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients):
    return *fake_statistics(h, reduction), *gradients_like((h, codebook, bias, shadow), gradients)


def _load_loss():
    from . import reference

    def vq_cross_entropy(h, codebook, codes, bias, shadow, target, ignore_index, *args):
        *args, gradients = (codebook, codes, bias, shadow, target, ignore_index, *args)
        loss, statistics = reference.vq_cross_entropy(h, *args)
        found = (None,) * 4
        if gradients:
            found = reference.vq_cross_entropy_gradients(torch.ones_like(loss), h, *args)
        return loss, statistics, *selected(found, gradients, h)

    return vq_cross_entropy


def _load_loss_backward():
    from .reference import vq_cross_entropy_gradients

    def vq_cross_entropy_backward(grad, h, codebook, codes, bias, shadow, target, statistics, *options):
        *options, wanted = options
        found = vq_cross_entropy_gradients(grad, h, codebook, codes, bias, shadow, target, *options)
        return selected(found, wanted, h)

    return vq_cross_entropy_backward


def _loss_setup(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.reduction, ctx.gradients, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    save(ctx, *tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    tensors = ctx.saved_tensors
    saved, found = tensors[:7], tensors[7:]

    def recompute(wanted):
        return dispatch(
            "vq_cross_entropy_backward", grad, *saved, ctx.ignore_index, ctx.reduction, wanted, ctx.backend
        )

    wanted = bits(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
    dh, dcodebook, dbias, dshadow = saved_or_recomputed(wanted, ctx.gradients, grad, found, recompute)
    return dh, dcodebook, None, dbias, dshadow, None, None, None, None, None


register_op(
    "vq_cross_entropy",
    "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, Tensor? shadow, Tensor target, SymInt ignore_index, "
    "str reduction, int gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_loss_fake,
    check=checks.check_vq_cross_entropy,
    check_contents=checks.check_vq_cross_entropy_contents,
    backends=(
        cpu_backend(__package__, "vq_cross_entropy", module="cpu_codes"),
        _triton("vq_cross_entropy", tuned=True),
        Backend("reference", _load_loss),
    ),
    backward=_loss_backward,
    setup_context=_loss_setup,
)
register_op(
    "vq_cross_entropy_backward",
    "(Tensor grad, Tensor h, Tensor codebook, Tensor codes, Tensor? bias, Tensor? shadow, Tensor target, Tensor statistics, "
    "SymInt ignore_index, str reduction, int wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted: (
        gradients_like((h, codebook, bias, shadow), wanted)
    ),
    check=checks.check_vq_cross_entropy_backward,
    check_contents=checks.check_vq_cross_entropy_backward_contents,
    backends=(
        cpu_backend(__package__, "vq_cross_entropy_backward", module="cpu_codes", tuned=False),
        _triton("vq_cross_entropy_backward"),
        Backend("reference", _load_loss_backward),
    ),
)


# --- choices of a token or a code ------------------------------------------------------------------------------------


def _one_a_row(rows, *_):
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


for _name, _schema, (_check, _check_contents) in (
    (
        "vq_argmax",
        "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, str backend) -> Tensor",
        checks.head_checks("vq_argmax"),
    ),
    (
        "vq_sample",
        "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, Tensor uniform, float temperature, str backend) -> Tensor",
        (checks.check_vq_sample, checks.check_vq_sample_contents),
    ),
    (
        "nearest_codes",
        "(Tensor x, Tensor codebook, str backend) -> Tensor",
        (checks.check_nearest_codes, None),
    ),
):
    register_op(
        _name,
        _schema,
        fake=_one_a_row,
        check=_check,
        check_contents=_check_contents,
        backends=(
            cpu_backend(__package__, _name, module="cpu_codes"),
            _triton(_name, tuned=True),
            reference_backend(__package__, _name),
        ),
    )
