"""torch.ops.fastattn.softplus_attention and softplus_attention_backward: schema, fake, autograd, backends."""

import torch

from ... import masks
from ...runtime.registry import (
    Backend,
    cpu_backend,
    dispatch,
    reference_backend,
    reference_backward,
    register_op,
    save_inputs,
    saved_inputs,
    triton_backend,
)
from .checks import check_softplus_attention, check_softplus_attention_backward

_OPTIONS = f"float? power, {masks.SCHEMA}"
_INPUTS = 3  # q, k, v


def _fake(q, k, v, power, *mask):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 3, dtype=statistics)


def _fake_backward(grad_out, q, k, v, out, statistics, power, *mask):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _load_reference_backward():
    from .reference import softplus_attention

    pull = reference_backward(lambda *args: softplus_attention(*args)[0], 1, (0, 1, 2))

    def softplus_attention_backward(grad_out, q, k, v, out, statistics, *options):
        return pull(grad_out, q, k, v, *options)

    return softplus_attention_backward


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    save_inputs(ctx, inputs, output)


def _backward(ctx, grad_out, _):
    (q, k, v, *options), (out, statistics) = saved_inputs(ctx)
    none = (None,) * len(options)
    if grad_out is None:
        return (None,) * _INPUTS + none
    grads = dispatch("softplus_attention_backward", grad_out, q, k, v, out, statistics, *options)
    return *grads, *none


register_op(
    "softplus_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    check=check_softplus_attention,
    backends=(
        cpu_backend(__package__, "softplus_attention"),
        triton_backend("fastattn.ops.lssa.triton", "softplus_attention", configure="configure"),
        reference_backend(__package__, "softplus_attention"),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
register_op(
    "softplus_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, {_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    check=check_softplus_attention_backward,
    backends=(
        cpu_backend(__package__, "softplus_attention_backward"),
        triton_backend(
            "fastattn.ops.lssa.triton_backward", "softplus_attention_backward", configure="configure"
        ),
        Backend("reference", _load_reference_backward),
    ),
)
