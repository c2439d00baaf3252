"""Tiled attention with softmax, sigmoid and softplus scores."""

import torch

from ... import _checks
from ..._registry import call, requested
from ...masks import Mask, check_mask, default_scale
from ...scores import SCORES
from . import schema  # noqa: F401  registers the ops


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    score: str = "softmax",
    scale: float | None = None,
    bias: float | torch.Tensor | None = None,
    mask: Mask | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with a softmax, sigmoid or softplus score.

    s_ij = scale * q_i.k_j + bias; softmax and softplus weights are divided by their row sum, sigmoid weights are not
    ("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431).

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv. One floating dtype and device, any strides
        (the fast backends copy only what has a strided last dim).
    score: "softmax", "sigmoid" or "softplus".
    scale: default 1/sqrt(D).
    bias: added to the scaled scores: a number, or a tensor of q's dtype broadcastable to (B, Hq, Lq, Lk). Default 0; for sigmoid
        -log(n), n the number of keys of the row's sequence (its document when packed, key_lengths when given).
    mask: a fastattn.Mask; default every key.
    return_lse: also return the natural log-sum-exp of each row (log of the normaliser), (B, Hq, Lq), float32 (float64 for
        float64), differentiable. Not defined for sigmoid.

    Returns (B, Hq, Lq, Dv) in q's dtype. A row with nothing to attend to gives 0, lse -inf and gradient 0.
    Raises ValueError, TypeError or NotImplementedError, naming the argument, before anything is computed.
    """
    op = "attention"
    check_qkv(op, q, k, v)
    _checks.check_choice(op, "score", score, tuple(SCORES))
    row = SCORES[score]
    if return_lse and not row.normalised:
        raise ValueError(
            f"fastattn.{op}: return_lse is not defined for score={score!r}, which has no normaliser"
        )
    mask = check_mask(op, mask)
    tensor_bias, bias_value = _bias(op, bias, q, k, None if row.log_n_bias else 0.0)
    out, lse = call(
        "attention",
        q,
        k,
        v,
        tensor_bias,
        row.code,
        default_scale(q.shape[-1]) if scale is None else _number(op, "scale", scale),
        bias_value,
        *mask.schema_args(op, q, k),
        requested(op, backend),
    )
    return (out, lse) if return_lse else out


def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    bias: float | torch.Tensor | None = None,
    mask: Mask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sigmoid attention: out_i = sum_j sigmoid(scale * q_i.k_j + bias) v_j (arXiv 2409.04431).

    `attention` with score="sigmoid": the same arguments, defaults and errors.
    """
    return attention(q, k, v, score="sigmoid", scale=scale, bias=bias, mask=mask, backend=backend)


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Ranks, dtypes, devices and sizes of q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv)."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(op, name, t, dims=4)
    _checks.check_floating(op, q=q, k=k, v=v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"fastattn.{op}: k has a batch of {k.shape[0]}, q has {q.shape[0]}; they must agree")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"fastattn.{op}: v must have k's batch, heads and length {tuple(k.shape[:3])}, given {tuple(v.shape[:3])}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"fastattn.{op}: k has head dim {k.shape[3]}, q has {q.shape[3]}; they must agree")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"fastattn.{op}: k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}")


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"fastattn.{op}: {name} must be a number, given {_checks.describe(value)}")
    return float(value)


def _bias(
    op: str, bias: float | torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, default: float | None
) -> tuple[torch.Tensor | None, float | None]:
    """(tensor bias as (B or 1, H or 1, Lq or 1, Lk or 1), number); None for the number means the score's own default."""
    if bias is None:
        return None, default
    if not isinstance(bias, torch.Tensor):
        return None, _number(op, "bias", bias)
    _checks.check_floating(op, q=q, bias=bias)
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(
            f"fastattn.{op}: bias of shape {tuple(bias.shape)} does not broadcast to (B, Hq, Lq, Lk) = {full}"
        )
    return bias.view(shape), 0.0
