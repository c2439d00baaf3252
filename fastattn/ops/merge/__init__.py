"""Merging attention results of disjoint sets of keys."""

from collections.abc import Sequence
from typing import Any

import torch

from ...runtime import checks as _checks
from ...runtime.checks import statistics_dtype
from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the op


def merge(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    sink: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over all keys from its results over disjoint parts of them.

    lse = log sum_a e^lse_a, out = sum_a e^(lse_a - lse) out_a: what one call over the union of the keys gives, gradients included.

    parts: a sequence of (out (..., D), lse (...)), as `attention(..., return_lse=True)` gives them, of one shape and dtype; lse is
        float32, float64 for float64. No key may be in two parts: it would count twice. lse + log(c) counts every key of a part c
        times. A part whose lse is -inf has no keys.
    sink: a number or a tensor (H,) of out's dtype or float32, of parts (..., H, L, D), with a gradient: a score that joins the
        normaliser once and has no value, as of `attention`; the parts are then without.

    Returns (out (..., D) in the parts' dtype, lse (...)); computed in float32 (float64 for float64). A row without keys in any part
    gives 0 and -inf. Raises ValueError or TypeError, naming the argument, before anything is computed.

        >>> q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
        >>> near = fastattn.attention(q, k, v, mask=fastattn.Mask(causal=True, window=(3, 0)), return_lse=True)
        >>> far = fastattn.attention(q, k, v, mask=fastattn.Mask(window=(None, 0), dense=torch.ones(8, 8).tril(-4).bool()), return_lse=True)
        >>> out, lse = fastattn.merge([near, far])
    """
    op = "merge"
    outs, lses = _parts(op, parts, "lse")
    if sink is not None and not isinstance(sink, torch.Tensor):
        heads = outs.shape[-3] if outs.dim() > 3 else 1
        sink = outs.new_full((heads,), _checks.as_number(op, "sink", sink), dtype=statistics_dtype(outs))
    return call(op, outs, lses, sink, requested(op, backend))


def merge_sums(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of a score without a log-sum-exp over disjoint parts of the keys: numerators and row sums add.

    parts: a sequence of (numerator (..., D), sum (...)): sum_j w_ij v_j and sum_j w_ij over the part's keys.
    Returns (sum of numerators / sum of sums in the numerators' dtype, 0 where that is 0; sum of sums), computed in float32 (float64 for
    float64), with gradients. Weights that nothing normalises (sigmoid) need no merging: their outputs add.
    """
    numerators, sums = _parts("merge_sums", parts, "sum")
    wide = statistics_dtype(numerators)
    total = sums.to(wide).sum(0)
    nothing = total == 0
    out = numerators.to(wide).sum(0) / total.masked_fill(nothing, 1.0)[..., None]
    return out.masked_fill(nothing[..., None], 0.0).to(numerators.dtype), total


def _parts(op: str, parts: Any, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts one above the other, (parts, ..., D) and (parts, ...)."""
    if isinstance(parts, torch.Tensor) or not isinstance(parts, Sequence) or not parts:
        raise TypeError(
            f"fastattn.{op}: parts must be a sequence of (out, {second}), one at least, given {_checks.describe(parts)}"
        )
    outs: list[torch.Tensor] = []
    seconds: list[torch.Tensor] = []
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(
                f"fastattn.{op}: parts[{i}] must be (out, {second}), given {_checks.describe(part)}"
            )
        out, of_rows = part
        _checks.check_floating(op, **{f"parts[{i}]'s out": out})
        first = outs[0] if outs else out
        _checks.check_like(op, f"parts[{i}]'s out", out, "parts[0]'s", first)
        _checks.check_exact(
            op,
            f"parts[{i}]'s {second}",
            of_rows,
            tuple(first.shape[:-1]),
            statistics_dtype(first),
            first.device,
            "its out without D",
        )
        outs.append(out)
        seconds.append(of_rows)
    return torch.stack(outs), torch.stack(seconds)
