"""Gated attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...masks import unserved_lists
from ...runtime import native
from ...runtime import tuning as _tuning
from ..attention.cpu import lookup, mask_fields, unserved
from . import tuning  # noqa: F401  declares what `lookup` serves


def refusal(q, k, v, assignment, sharpness, *rest) -> str | None:
    """Why the CPU kernel cannot serve this call, whose mask is the last member, or None."""
    return (
        unserved(q, k, v)
        or unserved_lists(rest[-1])
        or native.unserved_dtype(assignment, "assignment")
        or native.unserved_dtype(sharpness, "sharpness")
    )


def refusal_backward(grad_out, grad_lse, q, k, v, assignment, sharpness, *rest) -> str | None:
    return refusal(q, k, v, assignment, sharpness, *rest)


def configure(q, k, v, *_) -> _tuning.Choice:
    return lookup("gated_attention", q, k, v)


def configure_backward(grad_out, grad_lse, q, k, v, *_) -> _tuning.Choice:
    return lookup("gated_attention_backward", q, k, v)


def _call(
    kernel: str,
    name: str,
    q,
    k,
    v,
    assignment,
    sharpness,
    window: int,
    gate: int,
    scale: float,
    mask,
    **tensors,
) -> None:
    native.run(
        kernel,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        assignment=assignment.float().contiguous(),
        sharpness=sharpness.float(),
        window=window,
        gate=gate,
        scale=scale,
        threads=native.threads(),
        **mask_fields(q, k, mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def gated_attention(*members):
    return gated_attention_leading(3, *members)


def gated_attention_leading(reads, q, k, v, assignment, sharpness, window, gate, scale, mask):
    """(out, lse, state), or the first `reads` of them."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if reads > 1 else None
    state = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    if out.numel():
        _call(
            "gated_attention_forward",
            "gated_attention",
            q,
            k,
            v,
            assignment,
            sharpness,
            window,
            gate,
            scale,
            mask,
            out=out,
            lse=lse,
            state=state,
        )
    return (out, lse, state)[:reads]


def gated_attention_backward(
    grad_out, grad_lse, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
):
    if not q.numel():  # also where key heads serve no query head
        return tuple(
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in (q, k, v, assignment, sharpness)
        )
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    tokens, groups = q.shape[2], assignment.shape[2]
    # the kernel stores the sum of heads that it handles together at the first of them
    by_query = q.new_zeros(q.shape[0], q.shape[1], tokens, groups, dtype=torch.float32)
    by_key = q.new_zeros(q.shape[0], k.shape[1], tokens, groups, dtype=torch.float32)
    by_row = q.new_zeros(q.shape[:3], dtype=torch.float32)
    _call(
        "gated_attention_backward",
        "gated_attention_backward",
        q,
        k,
        v,
        assignment,
        sharpness,
        window,
        gate,
        scale,
        mask,
        grad_out=native.rows(grad_out),
        grad_lse=grad_lse,
        out=native.rows(out),
        state=state.contiguous(),
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        grad_query_assignment=by_query,
        grad_key_assignment=by_key,
        grad_sharpness=by_row,
    )
    grad_assignment = (by_query.sum(1) + by_key.sum(1)).to(assignment.dtype)
    return *grads, grad_assignment, by_row.sum(dtype=torch.float64).to(sharpness.dtype)
