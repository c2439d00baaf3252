"""Grouped sparse attention (Focus, arXiv 2604.03260): the router's balance, its signatures, training and inference forms."""

from typing import Literal, overload

import torch

from ...masks import LONGEST, Mask, check_mask, default_scale
from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..attention import check_qkv
from . import checks, schema  # noqa: F401  the latter registers the ops
from .checks import GATES, MAX_GROUPS  # noqa: F401  the latter is for routers


@overload
def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Balanced assignment of tokens to groups by Sinkhorn's iterations (arXiv 2604.03260), in the log domain.

    With X = scores / temperature and u = 0, `iterations` times: v_g = -log sum_tokens exp(X + u), u_l = -log sum_groups exp(X + v);
    the result is exp(X + u + v). Rows sum to 1, column sums tend to L / G.

    scores: (B, L, G), G at most 63, any floating dtype; computed in float32 (float64 for float64).
    temperature: more than zero. iterations: 1 to 10000; kernels keep a few numbers of each.
    causal: the column sums of token l run over the tokens up to l, so that no assignment depends on a later token. Without it they
        run over the whole sequence, and a causal model that is trained so sees the future through its routing.
    lengths: (B,) integers, the tokens of each sequence. Later tokens are padding: no sum counts them and their rows are 0.
        Default L.
    cu_seqlens: (documents + 1,) integers from 0, never decreasing: documents packed in a batch of one, each balanced by itself.
        `lengths` is then one a document; rows after the last one are 0.
    potentials: (B, 1, G) or (1, 1, G), log column potentials v of an earlier call, held fixed: the result is softmax(X + v). For
        decoding, where tokens come one at a time. `iterations`, `causal`, `lengths`, `cu_seqlens` and `backend` then play no part.
    return_potentials: also return v as (B, 1, G), one a document when packed, at the last token (of `lengths`) when causal. It
        carries no gradient.

    The backward is exact for the iterations that were run. It keeps `scores` alone and computes the potentials again, so that
    memory is linear in L for any number of iterations (the Triton kernel holds one number per token and iteration while it runs).

    Returns (B, L, G) in scores' dtype, differentiable in scores. Raises ValueError or TypeError naming the argument.
    """
    op = "sinkhorn"
    backend = requested(op, backend)
    if potentials is not None:
        temperature = _checks.as_positive(op, "temperature", temperature)
        checks.check_sinkhorn(scores, lengths, cu_seqlens, temperature, iterations, causal)
        _checks.check_tensor(op, "potentials", potentials, dims=3)
        _checks.check_same_device(op, scores=scores, potentials=potentials)
        batch, _, groups = scores.shape
        if not _checks.broadcasts(potentials.shape, (batch, 1, groups)) or potentials.shape[2] != groups:
            raise ValueError(
                f"fastattn.{op}: potentials must have shape ({batch} or 1)x1x{groups}, given {_checks.describe(potentials)}"
            )
        wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
        fixed = potentials.detach().to(wide)
        assignment = torch.softmax(scores.to(wide) / temperature + fixed, dim=-1).to(scores.dtype)
        return (assignment, potentials) if return_potentials else assignment
    assignment, column_potentials = call(
        "sinkhorn",
        scores,
        lengths,
        cu_seqlens,
        temperature,
        iterations,
        causal,
        backend,
    )
    return (assignment, column_potentials) if return_potentials else assignment


def focus_groups(assignment: torch.Tensor, *, top_k: int = 1) -> torch.Tensor:
    """The groups of each token as a bit signature: bit g is set when g is among its `top_k` largest assignments.

    assignment: (B, L, G) floating, G at most 63. Among equal entries the lower group wins. top_k: 1 to G.

    Returns int64 (B, L), never negative, as 63 groups fit. Two tokens share a group where `&` of their signatures is not 0. A token
    whose row is all zero (padding, see `sinkhorn`) gets 0 and shares no group. No gradient.
    Raises ValueError or TypeError naming the argument.
    """
    op = "focus_groups"
    _checks.check_tensor(op, "assignment", assignment, dims=3)
    _checks.check_floating(op, assignment=assignment)
    groups = checks.check_group_count(op, "assignment", assignment)
    count = _checks.as_integer(top_k)
    if count is None or not 1 <= count <= groups:
        raise ValueError(f"fastattn.{op}: top_k must lie in [1, {groups}], given {top_k!r}")
    order = assignment.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    signature = (
        torch.ones_like(order).bitwise_left_shift(order).sum(-1)
    )  # distinct bits: their sum is their OR
    return signature.masked_fill((assignment == 0).all(-1), 0)


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
    backend: str | None = None,
) -> torch.Tensor:
    """Causal softmax attention to a local window and, beyond it, to tokens that share a group (arXiv 2604.03260).

    Query i attends key j when j <= i and (i - j <= window or groups_i & key_groups_j != 0): itself, the `window` keys before it, and
    every earlier key with a group in common. A key counts once, however many groups it shares. Positions are those in the document
    when packed. The last query is aligned with the last key, as in decoding.

    q: (B, Hq, Lq, D); k: (B, Hkv, Lk, D); v: (B, Hkv, Lk, Dv), Hq a multiple of Hkv. One floating dtype and device.
    groups: (B, Lq) int32 or int64 signatures, a bit a group, not negative, shared by all heads (`focus_groups`). A token of
        signature 0 attends the keys of its window alone, and is attended within the window alone.
    key_groups: (B, Lk), the keys' signatures; default `groups`, which needs Lq == Lk.
    window: keys before the query that it always attends, 0 or more, default 128.
    scale: default 1/sqrt(D).
    mask: a fastattn.Mask that narrows this further (packed documents, key lengths, window, dense); default none. Attention stays
        causal whatever the mask says. A mask with prefix_lengths is refused.

    Returns (B, Hq, Lq, Dv) in q's dtype, differentiable in q, k and v. A row that attends no key gives 0 and gradient 0.
    Raises ValueError, TypeError or NotImplementedError, naming the argument, before anything is computed.
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
    return call(
        "grouped_attention",
        q,
        k,
        v,
        signatures,
        signatures if key_groups is groups else key_groups.long(),
        _window(window),
        default_scale(q.shape[3]) if scale is None else scale,
        check_mask(op, mask).args(op, q, k)._replace(causal=True),
        requested(op, backend),
    )[0]


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    assignment: torch.Tensor,
    *,
    window: int = 128,
    sharpness: float | torch.Tensor = 1.0,
    gate: str = "multiply",
    scale: float | None = None,
    mask: Mask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal softmax attention that trains a router: scores of distant keys are gated by how well two assignments agree.

    With g_ij = sigmoid(sharpness * a_i.a_j), a the assignment (arXiv 2604.03260):

        gate="multiply"   s_ij = scale * q_i.k_j * (1 if i - j <= window else g_ij)
        gate="log"        s_ij = scale * q_i.k_j + (0 if i - j <= window else log g_ij)

    An assignment is not negative, so that the gate lies in [0.5, 1) and never prunes. `multiply` is the published equation and
    flattens distant scores; `log` scales distant weights.

    q: (B, Hq, L, D); k: (B, Hkv, L, D); v: (B, Hkv, L, Dv), Hq a multiple of Hkv. One floating dtype and device.
    assignment: (B, L, G) floating, its own dtype, shared by all heads (`sinkhorn`).
    window: keys before the query that are not gated, default 128.
    sharpness: a number, or a floating tensor of one element that gets a gradient.
    scale: default 1/sqrt(D).
    mask: as in `grouped_attention`.

    Returns (B, Hq, L, Dv) in q's dtype, differentiable in q, k, v, assignment and sharpness. Raises as `grouped_attention`.
    """
    op = "gated_attention"
    check_qkv(op, q, k, v)
    if isinstance(sharpness, torch.Tensor):
        if sharpness.numel() != 1:
            raise ValueError(
                f"fastattn.{op}: sharpness must be a number or a tensor of one element, given {_checks.describe(sharpness)}"
            )
        sharpness = sharpness.reshape(())
    else:
        number = _checks.as_number(op, "sharpness", sharpness, kind="a number or a tensor")
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        sharpness = torch.ones((), dtype=wide, device=q.device) * number
    _checks.check_choice(op, "gate", gate, GATES)
    return call(
        "gated_attention",
        q,
        k,
        v,
        assignment,
        sharpness,
        _window(window),
        GATES.index(gate),
        default_scale(q.shape[3]) if scale is None else scale,
        check_mask(op, mask).args(op, q, k)._replace(causal=True),
        requested(op, backend),
    )[0]


def _window(window: int) -> int:
    """`window`, but no wider than the longest sequence: a sum with it must not overflow."""
    count = _checks.as_integer(window)
    return LONGEST if count is not None and count > LONGEST else window
