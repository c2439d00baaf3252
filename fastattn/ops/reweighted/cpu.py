"""LSSA and LSSAR on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ... import _config, _native
from ..attention.cpu import lookup, mask_fields, unserved
from . import tuning  # noqa: F401  declares what `_config.lookup` serves


def refusal(name: str, *args) -> str | None:
    """Why the CPU kernel cannot serve these arguments of `name`, or None."""
    return unserved(*_qkv(name, args))


def configure(name: str, *args) -> _config.Choice:
    return lookup(name, *_qkv(name, args))


def _qkv(name: str, args: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return args[1:4] if name.endswith("backward") else args[:3]


def _call(kernel: str, name: str, q, k, v, power: float | None, mask, **tensors) -> None:
    _native.run(
        kernel,
        q=_native.rows(q),
        k=_native.rows(k),
        v=_native.rows(v),
        power=1.0 if power is None else power,
        reweigh=int(power is not None),
        threads=_native.threads(),
        **mask_fields(q, k, *mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def softplus_attention(q, k, v, power, *mask):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    statistics = q.new_empty(*q.shape[:3], 3, dtype=torch.float32)
    if out.numel():
        tensors = {"out": out, "statistics": statistics}
        _call("reweighted_forward", "softplus_attention", q, k, v, power, mask, **tensors)
    return out, statistics


def softplus_attention_backward(grad_out, q, k, v, out, statistics, power, *mask):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if any(g.numel() for g in grads):
        _call(
            "reweighted_backward",
            "softplus_attention_backward",
            q,
            k,
            v,
            power,
            mask,
            grad_out=_native.rows(grad_out),
            out=_native.rows(out),
            statistics=statistics.contiguous(),
            grad_q=grads[0],
            grad_k=grads[1],
            grad_v=grads[2],
        )
    return grads
