"""LSSA and LSSAR on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...masks import unserved_lists
from ...runtime import native
from ...runtime import tuning as _tuning
from ..attention.cpu import lookup, mask_fields, unserved
from . import tuning  # noqa: F401  declares what `_tuning.lookup` serves


def refusal(q, k, v, power, mask) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return unserved(q, k, v) or unserved_lists(mask)


def refusal_backward(grad_out, grad_lse, q, k, v, *rest) -> str | None:
    return unserved(q, k, v) or unserved_lists(rest[-1])


def configure(q, k, v, power, mask) -> _tuning.Choice:
    return lookup("softplus_attention", q, k, v)


def configure_backward(grad_out, grad_lse, q, k, v, *_) -> _tuning.Choice:
    return lookup("softplus_attention_backward", q, k, v)


def _call(kernel: str, name: str, q, k, v, power: float | None, mask, **tensors) -> None:
    native.run(
        kernel,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        power=1.0 if power is None else power,
        reweigh=int(power is not None),
        threads=native.threads(),
        **mask_fields(q, k, mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def softplus_attention(*members):
    return softplus_attention_leading(3, *members)


def softplus_attention_leading(reads, q, k, v, power, mask):
    """(out, lse, statistics), or the first `reads` of them."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    statistics = q.new_empty(*q.shape[:3], 3, dtype=torch.float32)
    if out.numel():
        tensors = {"out": out, "statistics": statistics}
        _call("lssa_forward", "softplus_attention", q, k, v, power, mask, **tensors)
    if reads == 1:
        return (out,)
    return (out, row_lse(statistics, power), statistics)[:reads]


def row_lse(statistics: torch.Tensor, power: float | None) -> torch.Tensor:
    """The logarithms of LSSA's denominators, (B, Hq, Lq); (0,) for LSSAR."""
    return statistics[..., 2].log() if power is None else statistics.new_empty(0)


def softplus_attention_backward(grad_out, grad_lse, q, k, v, out, statistics, power, mask):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if any(g.numel() for g in grads):
        _call(
            "lssa_backward",
            "softplus_attention_backward",
            q,
            k,
            v,
            power,
            mask,
            grad_out=native.rows(grad_out),
            grad_lse=grad_lse if power is None else None,
            out=native.rows(out),
            statistics=statistics.contiguous(),
            grad_q=grads[0],
            grad_k=grads[1],
            grad_v=grads[2],
        )
    return grads
