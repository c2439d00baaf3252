"""Tiled attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ... import _config, _native
from ...scores import BY_CODE
from . import tuning  # noqa: F401  declares what `_config.lookup` serves

_LARGEST_HEAD_DIM = 256


def refusal(name: str, *args) -> str | None:
    """Why the CPU kernel cannot serve these arguments of `name`, or None."""
    q, k, v = args[:3] if name == "attention" else args[2:5]
    if q.dtype not in _native.FAST_DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    for what, size in (("head dim", q.shape[3]), ("head dim of v", v.shape[3])):
        if not 1 <= size <= _LARGEST_HEAD_DIM:
            return f"it serves head dims from 1 to {_LARGEST_HEAD_DIM}, not a {what} of {size}"
    if max(q.shape[2], k.shape[2]) >= 2**31:
        return "it serves lengths below 2**31"
    if name == "attention_backward" and args[8]:
        return "it does not differentiate a tensor bias"
    return None


def configure(name: str, *args) -> _config.Choice:
    q, k, v, _, score = (args[0:5]) if name == "attention" else (*args[2:6], args[9])
    return _lookup(name, q, k, v, score)


def _lookup(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: int) -> _config.Choice:
    return _config.lookup(
        name,
        "cpu",
        structural={
            "dtype": str(q.dtype).removeprefix("torch."),
            "score": BY_CODE[score].name,
            "head_dim": q.shape[3],
            "value_dim": v.shape[3],
        },
        sizes={
            "batch": q.shape[0],
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "q_length": q.shape[2],
            "k_length": k.shape[2],
        },
        device="cpu",
    )


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t itself where its last dim is contiguous, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _plane(t: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """t broadcast to (B, H, Lq, Lk) by strides of 0, its last dim contiguous."""
    if t is None:
        return None
    if t.shape[3] != shape[3] or (t.stride(3) != 1 and shape[3] > 1):
        t = t.expand(*t.shape[:3], shape[3]).contiguous()
    return t.expand(shape)


def attention(
    q,
    k,
    v,
    bias,
    score,
    scale,
    bias_value,
    causal,
    window_left,
    window_right,
    prefix_lengths,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    key_lengths,
    dense,
):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3] if BY_CODE[score].normalised else (0,), dtype=torch.float32)
    if not out.numel():
        return out, lse
    config = _lookup("attention", q, k, v, score).values
    plane = (*q.shape[:3], k.shape[2])
    _native.kernel("attention_forward")(
        _native.params(
            "AttentionParams",
            q=_rows(q),
            k=_rows(k),
            v=_rows(v),
            out=out,
            lse=lse if lse.numel() else None,
            bias=_plane(bias, plane),
            dense=_plane(dense, plane),
            prefix_lengths=prefix_lengths,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            key_lengths=key_lengths,
            scale=scale,
            bias_value=bias_value or 0.0,
            default_bias=int(bias_value is None and bias is None),
            score=score,
            causal=int(causal),
            window_left=window_left,
            window_right=window_right,
            threads=_native.threads(),
            **config,
        )
    )
    return out, lse
