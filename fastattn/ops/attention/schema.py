"""torch.ops.fastattn.attention and attention_backward: schema, fake, autograd, backends.

Besides out and lse the forward returns state, from which the backward finds softmax weights that a float32 lse has no bits for:
each row's maximum, of the products q.k times the scale's sign, or with a tensor bias of the scores; and the logarithm of its sum
of weights relative to it, infinite for a row with nothing to attend to. Of softplus it is (-inf, lse), and in rows whose weights
may all underflow, where they are softmax's, as of that.
"""

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
from .checks import check_attention, check_attention_backward
from .scores import BY_CODE

_OPTIONS = f"int score, float scale, float? bias_value, {masks.SCHEMA}"
_INPUTS = 4  # q, k, v, bias


def _statistics(q: torch.Tensor, score: int) -> torch.Tensor:
    """Empty lse: (B, Hq, Lq), or (0,) for a score without a normaliser."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3] if BY_CODE[score].normalised else (0,), dtype=dtype)


def _state(q: torch.Tensor, score: int) -> torch.Tensor:
    """Empty state: (B, Hq, Lq, 2), or (0,) for a score without a normaliser."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], 2) if BY_CODE[score].normalised else (0,), dtype=dtype)


def _fake(q, k, v, bias, score, *options):
    return q.new_empty(*q.shape[:3], v.shape[3]), _statistics(q, score), _state(q, score)


def _fake_backward(grad_out, grad_lse, q, k, v, bias, out, lse, state, bias_grad, *options):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    return (
        *grads,
        torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_grad else q.new_empty(0),
    )


def _load_reference_backward():
    from .reference import attention

    def attention_backward(grad_out, grad_lse, q, k, v, bias, out, lse, state, bias_grad, score, *options):
        outputs = 2 if BY_CODE[score].normalised else 1

        def defined(*args):
            return attention(*args)[:outputs]

        wrt = (0, 1, 2, 3) if bias_grad else (0, 1, 2)
        grads = (grad_out, grad_lse)[:outputs]
        found = reference_backward(defined, outputs, wrt)(*grads, q, k, v, bias, score, *options)
        return found if bias_grad else (*found, q.new_empty(0))

    return attention_backward


def _setup_context(ctx, inputs, output):
    bias = inputs[3]
    ctx.bias_grad = bias is not None and bias.requires_grad
    ctx.mark_non_differentiable(output[2])
    save_inputs(ctx, inputs, output)


def _backward(ctx, grad_out, grad_lse, _):
    (q, k, v, bias, *options), (out, lse, state) = saved_inputs(ctx)
    none = (None,) * len(options)
    if grad_out is None and grad_lse is None:
        return (None,) * _INPUTS + none
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dbias = dispatch(
        "attention_backward", grad_out, grad_lse, q, k, v, bias, out, lse, state, ctx.bias_grad, *options
    )
    return dq, dk, dv, dbias if ctx.bias_grad else None, *none


register_op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    check=check_attention,
    backends=(
        cpu_backend(__package__, "attention"),
        triton_backend("fastattn.ops.attention.triton", "attention", configure="configure"),
        reference_backend(__package__, "attention"),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
register_op(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    "Tensor state, bool bias_grad, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    check=check_attention_backward,
    backends=(
        cpu_backend(__package__, "attention_backward"),
        triton_backend("fastattn.ops.attention.triton_backward", "attention_backward", configure="configure"),
        Backend("reference", _load_reference_backward),
    ),
)
