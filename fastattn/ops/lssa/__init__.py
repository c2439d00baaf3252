"""Length-scaled softplus attention (LSSA) and its re-weighted form (LSSAR)."""

from typing import Literal, overload

import torch

from ...masks import Mask, check_mask
from ...runtime.registry import call, requested
from ..attention import check_qkv
from . import schema  # noqa: F401  registers the ops


@overload
def lssa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    power: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def lssa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    power: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def lssa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    power: float | None = None,
    mask: Mask | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softplus attention with a length-dependent scale (LSSA) and, with `power`, re-weighting (LSSAR), arXiv 2501.13428.

    With qh = q/|q|, kh = k/|k|, n_i the number of keys that row i attends and c_i = log(D) * log(n_i):

        s_ij = softplus(c_i * qh_i.kh_j)
        LSSA   w_ij = s_ij / sum_j s_ij
        LSSAR  w_ij = relu(s_ij * n_i / sum_j s_ij - O_i)^power, divided by its row sum

    O_i = 1, or 0 for rows that attend three keys or fewer (the first three of a causal sequence). A q or k of norm at most 1e-12
    counts as 0 and gets no gradient. If all scores of a row are equal (within 8 * eps * (1 + c_i)), all its LSSAR weights are 0 and
    the row gives 0.

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv, D at least 1. One floating dtype and device.
        Apply a rotary embedding before the call: the op normalises q and k itself.
    power: None for LSSA; a number of at least 1 for LSSAR (15 for length extrapolation, 3 near the training length). No power
        overflows: each weight is at most 1 before it is normalised.
    mask: a fastattn.Mask. By default every query attends every key. n_i counts the keys that the mask allows for the row.
    return_lse: also return log(sum_j s_ij), the logarithm of LSSA's denominator, (B, Hq, Lq), float32 (float64 for float64),
        differentiable. Default False; not defined for LSSAR, whose weights depend on the row's mean.

    Returns (B, Hq, Lq, Dv) in q's dtype. Differentiable once in q, k and v. A row that attends no key gives 0, lse -inf and gradient 0.
    Raises ValueError, TypeError or NotImplementedError, naming the argument, before anything is computed.

    `fastattn.softplus_attention` is this function under its earlier name, which messages, tuned tables and torch.ops still use.
    `attention` with score="softplus" is another op: it has neither the length-dependent scale nor the normalised q and k.

    >>> q = torch.randn(1, 2, 9, 16)
    >>> out = fastattn.lssa_attention(q, q, q, power=3, mask=fastattn.Mask(causal=True))
    """
    op = "softplus_attention"
    check_qkv(op, q, k, v)
    if return_lse and power is not None:
        raise ValueError(
            f"fastattn.{op}: return_lse is not defined for power={power!r}: LSSAR has no log-sum-exp"
        )
    args = check_mask(op, mask).args(op, q, k)
    results = call(op, q, k, v, power, args, requested(op, backend), reads=2 if return_lse else 1)
    return (results[0], results[1]) if return_lse else results[0]


softplus_attention = lssa_attention
