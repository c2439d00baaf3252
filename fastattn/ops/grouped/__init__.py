"""Grouped sparse attention (arXiv 2604.03260), to a local window and to the tokens that share a group; signatures of groups."""

from typing import Literal, overload

import torch

from ...masks import Mask, check_mask, default_scale
from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..attention import check_qkv
from ..focus import as_window, check_group_count
from . import checks, schema  # noqa: F401  schema registers the op


def focus_groups(assignment: torch.Tensor, *, top_k: int = 1) -> torch.Tensor:
    """The groups of each token as a bit signature: bit g is set when g is among its `top_k` largest assignments.

    assignment: (B, L, G) floating, G at most 63. Among equal entries the lower group wins. top_k: 1 to G.

    Returns int64 (B, L), not negative. Two tokens share a group if `&` of their signatures is not 0. A token whose row is all zero
    (padding, see `sinkhorn`) gets the signature 0 and shares no group. No gradient (arXiv 2604.03260).
    Raises ValueError or TypeError naming the argument.

    >>> groups = fastattn.focus_groups(torch.rand(1, 9, 4), top_k=2)
    """
    op = "focus_groups"
    _checks.check_tensor(op, "assignment", assignment, dims=3)
    _checks.check_floating(op, assignment=assignment)
    groups = check_group_count(op, "assignment", assignment)
    count = _checks.as_integer(top_k)
    if count is None or not 1 <= count <= groups:
        raise ValueError(f"fastattn.{op}: top_k must lie in [1, {groups}], given {top_k!r}")
    order = assignment.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    signature = torch.ones_like(order).bitwise_left_shift(order).sum(-1)  # distinct bits: the sum is their OR
    return signature.masked_fill((assignment == 0).all(-1), 0)


@overload
def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    *,
    key_groups: torch.Tensor | None = None,
    window: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    *,
    key_groups: torch.Tensor | None = None,
    window: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    *,
    key_groups: torch.Tensor | None = None,
    window: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention to a local window and, beyond it, to tokens that share a group (arXiv 2604.03260).

    Query i attends key j when j <= i and (i - j <= window or groups_i & key_groups_j != 0): itself, the `window` keys before it, and
    every earlier key with a group in common. A key counts once, however many groups it shares. When packed, positions count from the
    document's start. The last query is aligned with the last key, as in decoding. With `mask.prefix_lengths`, query i may also attend
    later keys: key j is attended when j < max(i + 1, prefix) and (|i - j| <= window or a group is shared).

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv. One floating dtype and device.
    groups: (B, Lq) int32 or int64 signatures, one bit for each group, not negative, shared by all heads (`focus_groups`). A token with
        signature 0 attends, and is attended, only within the window.
    key_groups: (B, Lk), the keys' signatures. Default `groups`, which needs Lq == Lk.
    window: the number of keys before the query, and in a prefix after it, that it always attends; 0 or more, default 128.
    scale: default 1/sqrt(D).
    mask: a fastattn.Mask that excludes further keys (packed documents, key lengths, window, dense) or adds those of a prefix
        (prefix_lengths); default none. Outside of a prefix attention is causal even if the mask is not.
    return_lse: also return the natural log-sum-exp of each row's scores over all keys that it attends, (B, Hq, Lq), float32 (float64
        for float64), differentiable. Default False.

    Returns (B, Hq, Lq, Dv) in q's dtype. Differentiable once in q, k and v. A row that attends no key gives 0, lse -inf and gradient 0.
    Raises ValueError, TypeError or NotImplementedError, naming the argument, before anything is computed.

    >>> q, assignment = torch.randn(1, 2, 9, 16), torch.rand(1, 9, 4)
    >>> out = fastattn.grouped_attention(q, q, q, fastattn.focus_groups(assignment), window=3)
    """
    op = "grouped_attention"
    check_qkv(op, q, k, v)
    if key_groups is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"fastattn.{op}: key_groups must be given where q and k differ in length, given {q.shape[2]} and {k.shape[2]}"
            )
        key_groups = groups
    for name, value, length in (("groups", groups, q.shape[2]), ("key_groups", key_groups, k.shape[2])):
        checks.check_signatures(op, name, value, q, length)
    signatures = groups.long()
    results = call(
        "grouped_attention",
        q,
        k,
        v,
        signatures,
        signatures if key_groups is groups else key_groups.long(),
        as_window(window),
        default_scale(q.shape[3]) if scale is None else scale,
        check_mask(op, mask).args(op, q, k)._replace(causal=True),
        requested(op, backend),
        reads=2 if return_lse else 1,
    )
    return (results[0], results[1]) if return_lse else results[0]
