"""Tiled attention with softmax, sigmoid and softplus scores."""

import warnings
from typing import Any, Literal, Never, overload

import torch

from ...bias import DistanceBias
from ...masks import Mask, check_broadcast, check_mask, default_scale
from ...runtime import checks as _checks
from ...runtime import hints
from ...runtime.checks import statistics_dtype
from ...runtime.registry import call, requested
from ...score import Score
from . import schema  # noqa: F401  registers the ops
from .checks import ALL_DROPPED, check_heads, check_qkv
from .scores import SCORES


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    score: str | Score = "softmax",
    scale: float | torch.Tensor | None = None,
    bias: float | torch.Tensor | DistanceBias | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    sink: float | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | torch.Generator | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    score: str | Score = "softmax",
    scale: float | torch.Tensor | None = None,
    bias: float | torch.Tensor | DistanceBias | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    sink: float | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | torch.Generator | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *positional: Any,
    score: str | Score = "softmax",
    scale: float | torch.Tensor | None = None,
    bias: float | torch.Tensor | DistanceBias | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    sink: float | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **other: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with a softmax, sigmoid or softplus score.

    s_ij = scale * q_i.k_j + bias and out_i = sum_j w_ij v_j. Softmax and softplus weights w are divided by their row sum, sigmoid
    weights are not ("Attention Is All You Need", arXiv 1706.03762; "Theory, Analysis, and Best Practices for Sigmoid
    Self-Attention", arXiv 2409.04431). The options apply in this order: scale, soft cap, bias, mask, sink, dropout.

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv. One floating dtype and device, any strides
        (the fast backends copy only tensors whose last dim is strided).
    score: "softmax", "sigmoid", "softplus" or a `fastattn.Score`, made of a Python function; bias, softcap, sink and dropout_p
        are then refused, as the function says what they would. Softplus is log(1 + e^s). A row whose softplus scores are all far below 0 gets
        softmax's weights, their limit, so that underflow never makes a weight 0.
    scale: a number, default 1/sqrt(D), or a tensor of q's dtype or float32 broadcastable to (B, Hq, Lq, 1), which may need a
        gradient: one scale for each query, as in log-n scaling and Llama 4's temperatures. q is then multiplied by it and rounded
        to q's dtype before the scores are formed, as a model would do.
    bias: added to the scaled scores: a number, a tensor of q's dtype broadcastable to (B, Hq, Lq, Lk), or a `fastattn.DistanceBias`,
        a table by distance (T5, ALiBi: `fastattn.bias`). Tensors and tables may need a gradient. Default 0; for sigmoid -log(n),
        where n is the number of keys of the row's sequence (of its document when packed), without the mask's padding.
    mask: a fastattn.Mask. By default every query attends every key.
    softcap: a number c above 0: scaled products become c * tanh(product / c) before the bias ("Gemma 2", arXiv 2408.00118).
    sink: for softmax only. A number or a tensor (Hq,) of q's dtype or float32, which may need a gradient: a score t that joins each
        row's normaliser but has no value, so the weights are e^s_ij / (e^t + sum_j e^s_ij) ("gpt-oss", arXiv 2508.10925). 0 gives
        "softmax plus one", -inf no sink. lse includes the sink.
    dropout_p: in [0, 1], default 0. After the normalisation each weight becomes 0 with this probability, and the others are divided by
        1 - dropout_p. The probability is rounded to a multiple of 1/65536; a positive one becomes at least 1/65536. lse has no dropout.
    rng: the source of dropout's random numbers: an int64 tensor (2,) on q's device, seed and offset; or a torch.Generator of q's
        device, from which these two are drawn. Default: the device's own generator, which torch.manual_seed sets. For one seed and
        offset the same weights are dropped on every device and backend, with any number of threads and any tile size; they depend on
        the batch entry, the head and the positions of query and key in the tensors (Philox 4x32-10).
    return_lse: also return the natural log-sum-exp of each row (log of the normaliser), (B, Hq, Lq), float32 (float64 for
        float64), differentiable. Not defined for sigmoid.

    Returns (B, Hq, Lq, Dv) in q's dtype. A row that attends no key gives 0, lse -inf (with a sink, the sink) and gradient 0.
    Raises ValueError, TypeError or NotImplementedError, naming the argument, before anything is computed.

    >>> q, k, v = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    >>> out, lse = fastattn.attention(q, k, v, mask=fastattn.Mask(causal=True), return_lse=True)
    """
    op = "attention"
    if positional or other:
        hints.refuse(op, attention, positional, other)
    if mask is None and bias is None:
        check_heads(op, q, k, v)  # the op checks the rest
    else:
        check_qkv(op, q, k, v)
    if isinstance(score, Score):
        given = {"bias": bias, "softcap": softcap, "sink": sink, "dropout_p": dropout_p or None}
        return _by_function(op, q, k, v, score, scale, mask, given, return_lse, backend)
    _checks.check_choice(op, "score", score, tuple(SCORES))
    row = SCORES[score]
    if return_lse and not row.normalised:
        raise ValueError(
            f"fastattn.{op}: return_lse is not defined for score={score!r}, which has no normaliser"
        )
    mask = check_mask(op, mask)
    tensor_bias, bias_value = _bias(op, bias, q, k, None if row.log_n_bias else 0.0)
    if sink is not None and not isinstance(sink, torch.Tensor):
        sink = q.new_full((q.shape[1],), _checks.as_number(op, "sink", sink), dtype=statistics_dtype(q))
    if isinstance(scale, torch.Tensor) and (scale.dim() or scale.requires_grad or scale.is_cuda):
        q, scale = _scaled(op, q, scale), 1.0
    dropped = _dropped(op, dropout_p) if dropout_p != 0 else 0
    if mask.blocks is not None:
        _warn_of_leaks(op, mask, q, k, v)
    results = call(
        "attention",
        q,
        k,
        v,
        tensor_bias,
        sink,
        row.code,
        default_scale(q.shape[-1]) if scale is None else _checks.as_number(op, "scale", scale),
        bias_value,
        None if softcap is None else _checks.as_number(op, "softcap", softcap),
        dropped,
        _rng(op, rng, q) if dropped else None,
        mask.args(op, q, k),
        requested(op, backend),
        reads=2 if return_lse else 1,
    )
    return (results[0], results[1]) if return_lse else results[0]


def _by_function(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score: Score,
    scale: float | torch.Tensor | None,
    mask: Mask | None,
    options: dict[str, Any],
    return_lse: bool,
    backend: str | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from ..flex import by_function  # it is made of what this module has

    check_qkv(op, q, k, v)
    if return_lse and score.normalise != "softmax":
        raise ValueError(
            f"fastattn.{op}: return_lse is not defined for a Score of normalise={score.normalise!r}, which has no softmax"
        )
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(
                f"fastattn.{op}: {name} does not go with a Score, given {_checks.describe(value)}; write it in the Score's function"
            )
    args = check_mask(op, mask).args(op, q, k)
    if isinstance(scale, torch.Tensor) and (scale.dim() or scale.requires_grad or scale.is_cuda):
        q, scale = _scaled(op, q, scale), 1.0
    number = default_scale(q.shape[-1]) if scale is None else _checks.as_number(op, "scale", scale)
    out, lse = by_function.attention(q, k, v, score, number, args, requested(op, backend))
    return (out, lse) if return_lse and lse is not None else out


def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *positional: Never,
    scale: float | torch.Tensor | None = None,
    bias: float | torch.Tensor | DistanceBias | None = None,
    mask: Mask | None = None,
    backend: str | None = None,
    **other: Never,
) -> torch.Tensor:
    """Sigmoid attention: out_i = sum_j sigmoid(scale * q_i.k_j + bias) v_j (arXiv 2409.04431).

    `attention` with score="sigmoid": the same arguments, defaults and errors.

    >>> q = torch.randn(1, 2, 7, 16)
    >>> out = fastattn.sigmoid_attention(q, q, q, mask=fastattn.Mask(causal=True))
    """
    if positional or other:
        hints.refuse("sigmoid_attention", sigmoid_attention, positional, other)
    return attention(q, k, v, score="sigmoid", scale=scale, bias=bias, mask=mask, backend=backend)


def _warn_of_leaks(op: str, mask: Mask, *inputs: torch.Tensor) -> None:
    """Warns where a causal model would be trained with lists that later tokens choose; Python shows a text once a place."""
    leaks = mask.blocks.leaks if mask.blocks is not None else None
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if leaks and mask.causal and trained and not _checks.traced():
        warnings.warn(
            f"fastattn.{op}: the mask is causal, but its block lists leak the future: {leaks}. A model trained so sees later tokens",
            stacklevel=4,
        )


def _scaled(op: str, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q times one scale for each query. Its gradient, g.q for the product's gradient g, needs no division."""
    wide = statistics_dtype(q)
    if scale.dtype not in (q.dtype, wide) or scale.is_nested:
        given = _checks.describe(scale)
        dtypes = " or ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in (q.dtype, wide)))
        raise TypeError(f"fastattn.{op}: scale must be a number or a tensor of {dtypes}, given {given}")
    _checks.check_same_device(op, q=q, scale=scale)
    full = (*q.shape[:3], 1)
    if scale.dim() > 4 or not _checks.broadcasts((1,) * (4 - scale.dim()) + tuple(scale.shape), full):
        raise ValueError(
            f"fastattn.{op}: scale of shape {tuple(scale.shape)} does not broadcast to (B, Hq, Lq, 1) = {full}"
        )
    return (q * scale.to(wide)).to(q.dtype)


def _dropped(op: str, dropout_p: float) -> int:
    """The number of weights, of 65536, that are dropped."""
    share = _checks.as_number(op, "dropout_p", dropout_p)
    if not 0 <= share <= 1:
        raise ValueError(f"fastattn.{op}: dropout_p must lie in [0, 1], given {dropout_p}")
    return max(round(share * ALL_DROPPED), 1) if share > 0 else 0


def _rng(op: str, rng: torch.Tensor | torch.Generator | None, q: torch.Tensor) -> torch.Tensor:
    """Seed and offset for one call, (2,) on q's device, without reading from the device."""
    if isinstance(rng, torch.Tensor):
        return rng
    if rng is not None and not isinstance(rng, torch.Generator):
        raise TypeError(
            f"fastattn.{op}: rng must be a torch.Generator, an int64 tensor of two numbers or None, "
            f"given {_checks.describe(rng)}"
        )
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=q.device, generator=rng)


def _bias(
    op: str,
    bias: float | torch.Tensor | DistanceBias | None,
    q: torch.Tensor,
    k: torch.Tensor,
    default: float | None,
) -> tuple[torch.Tensor | None, float | None]:
    """(tensor bias, (B or 1, H or 1, Lq or 1, Lk or 1) or one value for each distance; number). A number of None means the score's default."""
    if bias is None:
        return None, default
    if isinstance(bias, DistanceBias):
        _checks.check_same_device(op, q=q, bias=bias.table)
        if bias.table.dtype not in (q.dtype, statistics_dtype(q)) or bias.table.shape[0] not in (
            1,
            q.shape[1],
        ):
            given = _checks.describe(bias.table)
            raise ValueError(
                f"fastattn.{op}: bias, a DistanceBias, must have a table of q's dtype or float32 with {q.shape[1]} heads or one, given {given}"
            )
        return bias.values(q.shape[2], k.shape[2]), 0.0
    if not isinstance(bias, torch.Tensor):
        return None, _checks.as_number(op, "bias", bias)
    _checks.check_floating(op, q=q, bias=bias)
    return check_broadcast(op, "bias", bias, q, k), 0.0
