"""Attention by a `fastattn.Score`: its functions as a program, its weights by score_attention, a softmax by flex_attention."""

from collections.abc import Callable

import torch

from ...masks import MaskArgs
from ...runtime import checks as _checks
from ...runtime.registry import call, explaining, needs_grad
from ...score import Score
from . import _run, plain, prepare
from .plan import Plan, planned
from .row_statistics import row_statistics

_OP, _WHAT = "attention", "the score"  # of messages


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score: Score,
    scale: float,
    mask: MaskArgs,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse of a softmax) of `fastattn.attention` with a Score. Arguments are checked but for what the functions do."""
    if torch.compiler.is_dynamo_compiling():
        # the functions are traced by this package, which Dynamo must not trace itself
        return torch.compiler.disable(_attention)(q, k, v, score, scale, mask, backend)
    return _attention(q, k, v, score, scale, mask, backend)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score: Score,
    scale: float,
    mask: MaskArgs,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    softmax = score.normalise == "softmax"
    if (backend == "reference" or q.dtype == torch.float64) and explaining.calls is None:
        if backend not in ("", "reference"):
            raise NotImplementedError(
                f"fastattn.attention: the {backend} backend does not serve a Score in float64"
            )
        if softmax:
            out, lse, _ = plain.flex_attention(q, k, v, score.of({}), None, scale, mask)
            return out, lse

        def weight_of(statistics: dict[str, torch.Tensor]) -> Callable:
            return score.of(statistics, of_product=False)

        normalised = score.normalise == "sum"
        return plain.score_attention(q, k, v, score.before, weight_of, normalised, scale, mask), None
    if softmax:
        return _run(q, k, v, score.of({}), None, scale, mask, backend, _OP, _WHAT)
    dtype = q.dtype
    if set(score.statistics) - {"count"}:
        # gradients through the statistics and through the weights add up before they are rounded
        q, k, v = (t.to(_checks.statistics_dtype(t)) for t in (q, k, v))
    of_rows = (score.before, score.statistics, q, k, scale, mask, backend)
    if explaining.calls is None:
        statistics = row_statistics(*of_rows)
    else:  # what makes them is told after the call
        wide = _checks.statistics_dtype(q)
        statistics = {name: q.new_zeros(q.shape[:3], dtype=wide) for name in score.statistics}
    out = weighted(score.of(statistics), q, k, v, score.normalise == "sum", scale, mask, backend)
    if explaining.calls is not None:
        row_statistics(*of_rows)
    return out.to(dtype), None


def weighted(
    weight: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    normalised: bool,
    scale: float,
    mask: MaskArgs,
    backend: str,
) -> torch.Tensor:
    """out of the op: values times what a function (s, b, h, q, k) makes of each scaled product."""
    _, plan, tables, indices = prepared(weight, q, k, mask, gradients=needs_grad([v]) or None)
    members = (q, k, v, tables, indices, plan.program, normalised, scale, plan.mask, backend)
    return call("score_attention", *members, reads=1)[0]


def prepared(
    weight: Callable, q: torch.Tensor, k: torch.Tensor, mask: MaskArgs, *, gradients: bool | None = None
) -> tuple[prepare.Traced, Plan, torch.Tensor | None, torch.Tensor | None]:
    """(a trace of a function (s, b, h, q, k), its plan, and the tables and indices that its program loads from).

    gradients: whether the program is to have derivatives; None: as q, k and what the function captures require them.
    """
    sizes = prepare.Sizes(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    traced = prepare.traced(weight, None, sizes, op=_OP, what=_WHAT, weighs=True)
    prepare.check_devices(traced, q.device)
    wide = _checks.statistics_dtype(q)
    if gradients is None:
        gradients = needs_grad([q, k, *traced.graph.tensors])
    plan = planned(traced, mask, gradients, q.device, wide)
    return traced, plan, *plan.tables(traced, wide, q.device)
