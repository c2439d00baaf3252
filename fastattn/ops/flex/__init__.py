"""flex_attention: softmax attention with a score and a mask that are Python functions."""

from collections.abc import Callable
from typing import Any

import torch

from ...masks import NO_MASK, Mask, MaskArgs, default_scale
from ...runtime import checks as _checks
from ...runtime.registry import call, explaining, needs_grad, requested
from ..attention.checks import check_heads, check_qkv
from ..attention.scores import SCORES
from . import plain, prepare
from . import schema as _schema  # noqa: F401  registers the ops
from . import schema_weights as _schema_weights  # noqa: F401  and those of a Score
from .block_mask import from_block_mask, is_block_mask
from .plan import planned

_OP = "flex_attention"


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict | None = None,
    *,
    return_aux: Any = None,
    backend: str | None = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`, run at once, forward and backward, without a compiler.

    out_i = sum_j softmax_j(score_mod(scale * q_i.k_j, b, h, i, j)) v_j over the keys j that block_mask allows ("Flex Attention",
    arXiv 2412.05496). The functions are traced in every call, a fraction of a millisecond, into a program that the tiles of
    `fastattn.attention` run on their scores, and differentiated, so that q, k, v and what score_mod captures have gradients.

    query: (B, Hq, Lq, D); key: (B or 1, Hkv, Lk, D); value: (B or 1, Hkv, Lk, Dv), of one floating dtype and device.
    score_mod(score, b, h, q_idx, kv_idx) -> score: a function of one score and of the numbers of batch entry, query head, query and key.
        It may use arithmetic, comparisons, torch.where, clamp, exp, log, tanh, gelu and the like, and elements of captured tensors,
        `bias[h, q_idx - kv_idx + n]`. Floating tensors that it captures may require a gradient. Scores are float32.
    block_mask: a `fastattn.Mask`; a function mask_mod(b, h, q_idx, kv_idx) -> bool (True = attend); or torch's BlockMask, whose block
        lists count as in torch's compiled kernels: blocks that they do not list are not attended.
    scale: default 1/sqrt(D).
    enable_gqa: key and value may have fewer heads, which divide Hq.
    return_lse: also return the natural log-sum-exp of each row, (B, Hq, Lq), float32 (float64 for float64), differentiable.
    return_aux: torch's AuxRequest(lse=, max_scores=); an AuxOutput is returned beside the output. max_scores has no gradient.
    kernel_options: accepted and not used, so that code written for torch runs; its "BACKEND" is refused.
    backend: None for the best one, or its name. "reference" calls the functions on all scores at once, with autograd, and serves
        what no kernel can; float64 is served by it.

    Returns (B, Hq, Lq, Dv) in query's dtype. A row that attends no key gives 0, lse -inf and gradient 0.
    Raises NotImplementedError, naming the line, for what no kernel can do: a branch on a value, an index that depends on the score,
    rows of captured tensors, random numbers. IndexError for an index out of range, ValueError or TypeError for other arguments.

    Example:
        >>> slopes = torch.tensor([0.5, 0.25], requires_grad=True)
        >>> alibi = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)
        >>> causal = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
        >>> q = torch.randn(1, 2, 100, 64)
        >>> out = fastattn.flex_attention(q, q, q, score_mod=alibi, block_mask=causal)
        >>> out.sum().backward()
    """
    arguments = (
        query,
        key,
        value,
        score_mod,
        block_mask,
        scale,
        enable_gqa,
        return_lse,
        kernel_options,
        return_aux,
        backend,
    )
    if torch.compiler.is_dynamo_compiling():
        # the functions are traced by this module, which Dynamo must not trace itself
        return torch.compiler.disable(_flex_attention)(*arguments)
    return _flex_attention(*arguments)


def _flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    kernel_options: dict | None,
    return_aux: Any,
    backend: str | None,
) -> Any:
    key, value = _check_arguments(query, key, value, score_mod, kernel_options, enable_gqa)
    number = default_scale(query.shape[-1]) if scale is None else _checks.as_number(_OP, "scale", scale)
    mask_mod, mask = _mask(block_mask, query, key)
    name = requested(_OP, backend)
    wants_max = return_aux is not None and getattr(return_aux, "max_scores", False)
    if (name == "reference" or query.dtype == torch.float64 or wants_max) and explaining.calls is None:
        if name not in ("", "reference"):
            what = "float64" if query.dtype == torch.float64 else "max_scores"
            raise NotImplementedError(f"fastattn.{_OP}: the {name} backend does not serve {what}")
        results: tuple = plain.flex_attention(query, key, value, score_mod, mask_mod, number, mask)
    else:
        results = _run(query, key, value, score_mod, mask_mod, number, mask, name)
    return _returned(results, return_lse, return_aux)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Callable | None,
    mask_mod: Callable | None,
    scale: float,
    mask: MaskArgs,
    backend: str,
    op: str = _OP,
    what: str = "score_mod",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the op. op, what: how messages call it and score_mod."""
    sizes = prepare.Sizes(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    traced = prepare.traced(score_mod, mask_mod, sizes, op=op, what=what)
    prepare.check_devices(traced, q.device)
    wide = _checks.statistics_dtype(q)
    gradients = needs_grad([q, k, v, *traced.graph.tensors])
    plan = planned(traced, mask, gradients, q.device, wide)
    if plan.program is None:
        softmax = SCORES["softmax"].code
        results = call(
            "attention", q, k, v, None, None, softmax, scale, 0.0, None, 0, None, plan.mask, backend, reads=2
        )
    else:
        tables, indices = plan.tables(traced, wide, q.device)
        results = call(
            _OP, q, k, v, tables, indices, plan.program, plan.classes, scale, plan.mask, backend, reads=2
        )
    return results[0], results[1]


def _check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Any,
    kernel_options: dict | None,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """key and value of query's batch."""
    check_heads(_OP, q, k, v)
    if k.shape[0] == 1 and v.shape[0] == 1 and q.shape[0] > 1:
        k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"fastattn.{_OP}: key has {k.shape[1]} heads and query {q.shape[1]}; enable_gqa=True lets heads of key be shared"
        )
    check_qkv(_OP, q, k, v)
    if score_mod is not None and not callable(score_mod):
        raise TypeError(
            f"fastattn.{_OP}: score_mod must be a function or None, given {_checks.describe(score_mod)}"
        )
    if kernel_options and "BACKEND" in kernel_options:
        raise NotImplementedError(
            f'fastattn.{_OP}: kernel_options["BACKEND"] names a kernel of torch; leave it out, or give backend="cpu", "triton" or "reference"'
        )
    return k, v


def _mask(block_mask: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[Callable | None, MaskArgs]:
    """(a mask function or None, what a Mask says)."""
    none = NO_MASK.args(_OP, q, k)
    if block_mask is None:
        return None, none
    if isinstance(block_mask, Mask):
        return None, block_mask.args(_OP, q, k)
    if is_block_mask(block_mask):
        return from_block_mask(_OP, block_mask, q, k), none
    if callable(block_mask):
        return block_mask, none
    hint = (
        "; a bool tensor goes in as fastattn.Mask(dense=...)" if isinstance(block_mask, torch.Tensor) else ""
    )
    raise TypeError(
        f"fastattn.{_OP}: block_mask must be a fastattn.Mask, a function, torch's BlockMask or None, "
        f"given {_checks.describe(block_mask)}{hint}"
    )


def _returned(results: tuple, return_lse: bool, return_aux: Any) -> Any:
    out, lse, *top = results
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        wanted = {
            "lse": lse if return_aux.lse else None,
            "max_scores": top[0] if return_aux.max_scores else None,
        }
        return out, AuxOutput(**wanted)
    return (out, lse) if return_lse else out
