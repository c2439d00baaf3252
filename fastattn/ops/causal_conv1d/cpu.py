"""causal_conv1d on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native
from .. import documents

_SLICE = native.defaults("causal_conv1d_backward")["slice"]


def refusal(x, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return native.unserved_dtype(x)


def refusal_backward(grad_out, grad_state, x, *_) -> str | None:
    return native.unserved_dtype(x)


def _call(kernel: str, x, weight, bias, initial_state, cu_seqlens, silu, **tensors) -> None:
    native.run(
        kernel,
        x=native.plain(x),
        weight=native.plain(weight),
        bias=None if bias is None else native.plain(bias),
        initial_state=None if initial_state is None else native.plain(initial_state),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        silu=int(silu),
        threads=native.threads(),
        **tensors,
    )


def causal_conv1d(*members):
    return causal_conv1d_leading(2, *members)


def causal_conv1d_leading(reads, x, weight, bias, initial_state, cu_seqlens, silu):
    """(out, state), or the first `reads` of them."""
    batch, _, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs = [out]
    if reads > 1:
        outputs.append(x.new_empty(documents.count(batch, cu_seqlens), weight.shape[1] - 1, channels))
    if any(t.numel() for t in outputs):
        state = outputs[1] if reads > 1 else None
        _call("causal_conv1d_forward", x, weight, bias, initial_state, cu_seqlens, silu, out=out, state=state)
    documents.clear_rest(cu_seqlens, out)
    return tuple(outputs)


def causal_conv1d_backward(grad_out, grad_state, x, weight, bias, initial_state, cu_seqlens, silu, wanted):
    batch, length, channels = x.shape
    taps = weight.shape[1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    needs_weight, needs_bias, needs_state = (bool(wanted >> i & 1) for i in range(3))
    needs_state = needs_state and initial_state is not None
    grad_initial = x.new_empty(initial_state.shape if needs_state else 0)
    sums = x.new_empty(batch, -(-length // _SLICE), taps + 1, channels, dtype=torch.float32)
    if grad_x.numel() or grad_initial.numel():
        _call(
            "causal_conv1d_backward",
            x,
            weight,
            bias,
            initial_state,
            cu_seqlens,
            silu,
            grad_out=native.plain(grad_out),
            grad_state=None if grad_state is None else grad_state.contiguous(),
            grad_x=grad_x,
            grad_initial_state=grad_initial if needs_state else None,
            grad_sums=sums,
        )
    documents.clear_rest(cu_seqlens, grad_x)
    total = sums.sum((0, 1))  # (K + 1, D)
    absent = x.new_empty(0)
    return (
        grad_x,
        total[:taps].mT.to(weight.dtype).contiguous() if needs_weight else absent,
        total[taps].to(bias.dtype) if needs_bias and bias is not None else absent,
        grad_initial,
    )
