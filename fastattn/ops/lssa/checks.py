"""The checks of LSSA's and LSSAR's arguments, run for every caller."""

import math

from ... import masks
from ...runtime import checks
from ..attention.checks import check_qkv, check_results
from ..focus import check_grad_lse


def _check(op: str, q, k, v, power, mask) -> None:
    check_qkv(op, q, k, v)
    if q.shape[3] == 0:
        raise ValueError(f"fastattn.{op}: q must have a head dim of 1 or more, given {checks.describe(q)}")
    if power is not None:
        checks.check_positive(op, "power", power)
        if not 1 <= power < math.inf:
            raise ValueError(
                f"fastattn.{op}: power must be None or a finite number of at least 1, given {power!r}"
            )
    masks.check_args(op, q, k, mask)


def check_softplus_attention(q, k, v, power, mask) -> None:
    _check("softplus_attention", q, k, v, power, mask)


def check_softplus_attention_backward(grad_out, grad_lse, q, k, v, out, statistics, power, mask) -> None:
    op = "softplus_attention_backward"
    _check(op, q, k, v, power, mask)
    check_results(op, grad_out, q, v, out, statistics, "statistics", (*q.shape[:3], 3))
    check_grad_lse(op, grad_lse, q, tuple(q.shape[:3]) if power is None else (0,))
