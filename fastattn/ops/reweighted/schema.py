"""torch.ops.fastattn.softplus_attention and softplus_attention_backward: schema, fake, autograd, backends."""

import torch

from ... import masks
from ..._registry import Backend, reference_backward, register_op, triton_backend

_OPTIONS = f"float? power, {masks.SCHEMA}"
_INPUTS = 3  # q, k, v


def _fake(q, k, v, power, *mask):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 3, dtype=statistics)


def _fake_backward(grad_out, q, k, v, out, statistics, power, *mask):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _cpu(name: str) -> Backend:
    def load():
        from . import cpu

        return getattr(cpu, name)

    def supports(*args):
        from . import cpu

        return cpu.refusal(name, *args)

    def configure(*args):
        from . import cpu

        return cpu.configure(name, *args)

    return Backend("cpu", load, supports, configure, devices=("cpu",))


def _load_reference():
    from .reference import softplus_attention

    return softplus_attention


def _load_reference_backward():
    from .reference import softplus_attention

    pull = reference_backward(lambda *args: softplus_attention(*args)[0], 1, (0, 1, 2))

    def softplus_attention_backward(grad_out, q, k, v, out, statistics, *options):
        return pull(grad_out, q, k, v, *options)

    return softplus_attention_backward


def _setup_context(ctx, inputs, output):
    q, k, v, *options = inputs
    out, statistics = output
    ctx.options = [None if isinstance(o, torch.Tensor) else o for o in options]
    ctx.where = [i for i, o in enumerate(options) if isinstance(o, torch.Tensor)]
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(q, k, v, out, statistics, *(options[i] for i in ctx.where))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    q, k, v, out, statistics, *tensors = ctx.saved_tensors
    options = list(ctx.options)
    for i, t in zip(ctx.where, tensors, strict=True):
        options[i] = t
    none = (None,) * len(options)
    if grad_out is None:
        return (None,) * _INPUTS + none
    grads = torch.ops.fastattn.softplus_attention_backward(grad_out, q, k, v, out, statistics, *options)
    return *grads, *none


register_op(
    "softplus_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    backends=(
        _cpu("softplus_attention"),
        triton_backend("fastattn.ops.reweighted.triton", "softplus_attention", configure="configure"),
        Backend("reference", _load_reference),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
register_op(
    "softplus_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, {_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    backends=(
        _cpu("softplus_attention_backward"),
        triton_backend(
            "fastattn.ops.reweighted.triton_backward", "softplus_attention_backward", configure="configure"
        ),
        Backend("reference", _load_reference_backward),
    ),
)
