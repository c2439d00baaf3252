"""Grouped attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...masks import unserved_lists
from ...runtime import native
from ...runtime import tuning as _tuning
from ..attention.cpu import lookup, mask_fields, unserved
from . import tuning  # noqa: F401  declares what `lookup` serves


def refusal(q, k, v, groups, key_groups, window, scale, mask) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return (
        unserved(q, k, v)
        or unserved_lists(mask)
        or ("it does not serve a dense mask" if mask.dense is not None else None)
    )


def refusal_backward(
    grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask
) -> str | None:
    return refusal(q, k, v, groups, key_groups, window, scale, mask)


def configure(q, k, v, *_) -> _tuning.Choice:
    return lookup("grouped_attention", q, k, v)


def configure_backward(grad_out, grad_lse, q, k, v, *_) -> _tuning.Choice:
    return lookup("grouped_attention_backward", q, k, v)


def _call(
    kernel: str, name: str, q, k, v, groups, key_groups, window: int, scale: float, mask, **tensors
) -> None:
    native.run(
        kernel,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        groups=groups.contiguous(),
        key_groups=key_groups.contiguous(),
        window=window,
        scale=scale,
        threads=native.threads(),
        **mask_fields(q, k, mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def grouped_attention(*members):
    return grouped_attention_leading(3, *members)


def grouped_attention_leading(reads, q, k, v, groups, key_groups, window, scale, mask):
    """(out, lse, state), or the first `reads` of them."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if reads > 1 else None
    state = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    if out.numel():
        _call(
            "grouped_forward",
            "grouped_attention",
            q,
            k,
            v,
            groups,
            key_groups,
            window,
            scale,
            mask,
            out=out,
            lse=lse,
            state=state,
        )
    return (out, lse, state)[:reads]


def grouped_attention_backward(
    grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask
):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if any(g.numel() for g in grads):
        _call(
            "grouped_backward",
            "grouped_attention_backward",
            q,
            k,
            v,
            groups,
            key_groups,
            window,
            scale,
            mask,
            grad_out=native.rows(grad_out),
            grad_lse=grad_lse,
            out=native.rows(out),
            state=state.contiguous(),
            grad_q=grads[0],
            grad_k=grads[1],
            grad_v=grads[2],
        )
    return grads
