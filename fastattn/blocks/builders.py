"""What chooses block lists: fixed patterns, and selections by scores. Plain torch, without a gradient.

Every builder says whether it leaks: whether a later token can change an earlier token's list, so that a model trained with a causal
mask sees the future. `Blocks.leaks` carries it. Ties go to the lower block, so that every device agrees.
"""

from typing import Any

import torch

from ..runtime.checks import as_integer, as_number, check_floating, check_tensor, describe
from .lists import Blocks

_POOLED = "a query block's list is chosen by all of its tokens and keys"
_LAST = "every list is chosen by the last queries"


def _size(op: str, name: str, value: Any, least: int = 1) -> int:
    count = as_integer(value)
    if count is None or count < least:
        raise ValueError(
            f"fastattn.blocks.{op}: {name} must be an integer of {least} or more, given {describe(value)}"
        )
    return count


def _pair(op: str, block: Any) -> tuple[int, int]:
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"fastattn.blocks.{op}: block must be (queries, keys), given {block!r}")
    return _size(op, "block", block[0]), _size(op, "block", block[1])


def _qk(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    check_floating(f"blocks.{op}", q=q, k=k)
    for name, t in (("q", q), ("k", k)):
        check_tensor(f"blocks.{op}", name, t, dims=4)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"fastattn.blocks.{op}: k must have q's batch and head dim and heads that divide q's, given {describe(q)} and {describe(k)}"
        )


def _ends(block: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, last) token of each block."""
    first = torch.arange(0, length, block, device=device)
    return first, (first + block).clamp(max=length) - 1


def _pool(x: torch.Tensor, block: int, pool: str = "mean") -> torch.Tensor:
    """(B, H, blocks, D) float32: the mean, largest or last token of each block, the last of which may be short."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    length = x.shape[2]
    first, last = _ends(block, length, x.device)
    if pool == "last":
        return x[:, :, last]
    short = -length % block
    fill = 0.0 if pool == "mean" else -torch.inf
    blocks = (
        torch.nn.functional.pad(x, (0, 0, 0, short), value=fill).unflatten(2, (-1, block))
        if length
        else x[:, :, :, None]
    )
    if pool == "max":
        return blocks.amax(3)
    return blocks.sum(3) / (last - first + 1).to(x.dtype)[:, None]


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q (B, Hq, n, D) against k (B, Hkv, m, D), each key head serving its group: (B, Hq, n, m)."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)


def _chosen(scores: torch.Tensor, allowed: torch.Tensor, forced: torch.Tensor, top: int) -> torch.Tensor:
    """bool: of each row's allowed blocks the `top` with the largest scores, forced ones first."""
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    return chosen & (allowed | forced)


def local(
    window: tuple[int | None, int | None],
    *,
    block: tuple[int, int],
    q_length: int,
    k_length: int | None = None,
    device: torch.device | str | None = None,
) -> Blocks:
    """The blocks that a window touches: keys j with i + Lk - Lq - left <= j <= i + Lk - Lq + right for some query i of the block.

    window: (left, right) as `Mask` has it; None is no limit. The window itself is the mask's: `Mask(window=..., blocks=...)`.
    Leaks: no, it is a fixed pattern.
    """
    bq, bk = _pair("local", block)
    k_length = q_length if k_length is None else k_length
    first, last = (t + k_length - q_length for t in _ends(bq, q_length, device))
    key, key_end = _ends(bk, k_length, device)
    left, right = window
    table = torch.ones(len(first), len(key), dtype=torch.bool, device=device)
    if left is not None:
        table = table & (key_end >= first[:, None] - left)
    if right is not None:
        table = table & (key <= last[:, None] + right)
    return Blocks.from_dense(table, block=(bq, bk), q_length=q_length, k_length=k_length)


def first(
    count: int,
    *,
    block: tuple[int, int],
    q_length: int,
    k_length: int | None = None,
    device: torch.device | str | None = None,
) -> Blocks:
    """The first `count` key blocks, for every query block (attention sinks).

    Leaks: no, it is a fixed pattern.
    """
    bq, bk = _pair("first", block)
    count = _size("first", "count", count, 0)
    k_length = q_length if k_length is None else k_length
    table = (torch.arange(-(-k_length // bk), device=device) < count).expand(-(-q_length // bq), -1)
    return Blocks.from_dense(table, block=(bq, bk), q_length=q_length, k_length=k_length)


def diagonal(
    *,
    block: tuple[int, int],
    q_length: int,
    k_length: int | None = None,
    device: torch.device | str | None = None,
) -> Blocks:
    """The key blocks of the queries' own positions, the last query on the last key.

    Leaks: no, it is a fixed pattern.
    """
    return local((0, 0), block=block, q_length=q_length, k_length=k_length, device=device)


def pooled_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block: tuple[int, int],
    top: int,
    causal: bool = False,
    pool: str = "mean",
) -> Blocks:
    """For each query block the `top` key blocks J with the largest products of pooled queries and pooled keys.

    q: (B, Hq, Lq, D), k: (B, Hkv, Lk, D); lists for each query head. A key block is the mean (`pool` "max": the largest, "last": the
        last) of its keys, a query block the mean of its queries.
    causal: a query block is its first token; only key blocks that are complete there are scored, and those that hold positions of
        the query block itself are forced and count within `top`.
    Leaks: yes, as the pooled tokens of a query block choose for all of them; with causal=True no.
    """
    op = "pooled_topk"
    _qk(op, q, k)
    bq, bk = _pair(op, block)
    top = _size(op, "top", top)
    if pool not in ("mean", "max", "last"):
        raise ValueError(f"fastattn.blocks.{op}: pool must be one of 'mean', 'max', 'last', given {pool!r}")
    lq, lk = q.shape[2], k.shape[2]
    keys = _pool(k, bk, pool)
    if not causal:
        scores = _products(_pool(q, bq), keys)
        every = torch.ones_like(scores, dtype=torch.bool)
        table = _chosen(scores, every, ~every, top)
        return Blocks.from_dense(table, block=(bq, bk), q_length=lq, k_length=lk, leaks=_POOLED)
    begin, end = _ends(bq, lq, q.device)
    key, key_end = _ends(bk, lk, q.device)
    begin, end = begin + lk - lq, end + lk - lq
    complete = key_end <= begin[:, None]
    own = ~complete & (key <= end[:, None])
    scores = _products(q.detach()[:, :, ::bq].to(keys.dtype), keys)
    table = _chosen(scores, complete.expand_as(scores), own.expand_as(scores), top)
    return Blocks.from_dense(table | own, block=(bq, bk), q_length=lq, k_length=lk)


def moba(q: torch.Tensor, k: torch.Tensor, *, block: int, top: int) -> Blocks:
    """Mixture of block attention (Lu et al., arXiv 2502.13189): a list a token and query head, its own block and the top - 1 earlier
    blocks J with the largest q_i . mean(k_J). Use it with `Mask(causal=True, blocks=...)`.

    q: (B, Hq, Lq, D), k: (B, Hkv, Lk, D), the last query on the last key.
    Leaks: no; only complete blocks before a token's own are scored.
    """
    op = "moba"
    _qk(op, q, k)
    block, top = _size(op, "block", block), _size(op, "top", top)
    lq, lk = q.shape[2], k.shape[2]
    keys = _pool(k, block)
    scores = _products(q.detach().to(keys.dtype), keys)
    own = (torch.arange(lq, device=q.device) + lk - lq) // block
    number = torch.arange(keys.shape[2], device=q.device)
    earlier = (number < own[:, None]).expand_as(scores)
    table = _chosen(scores, earlier, (number == own[:, None]).expand_as(scores), top)
    return Blocks.from_dense(table, block=(1, block), q_length=lq, k_length=lk)


def nsa(
    weights: torch.Tensor,
    *,
    kv_heads: int,
    block: int,
    top: int,
    k_length: int,
    width: int | None = None,
    stride: int | None = None,
) -> Blocks:
    """Native sparse attention's selection (Yuan et al., arXiv 2502.11089): a list a token and key head. A block's importance is the sum
    of the compressed branch's probabilities over the group's heads and the compressed blocks that overlap it. The first block and the
    token's own are forced; `top` blocks a token at most, none after its own.

    weights: (B, Hq, Lq, compressed blocks), the compressed branch's probabilities; compressed block c pools keys from c * stride on,
        `width` of them; both are `block` by default. 0 where the block is not complete at the token, the last query on the last key.
    Leaks: no, if the weights do not; only complete blocks have weights.
    """
    op = "nsa"
    check_tensor(f"blocks.{op}", "weights", weights, dims=4)
    check_floating(f"blocks.{op}", weights=weights)
    kv_heads, block, top = _size(op, "kv_heads", kv_heads), _size(op, "block", block), _size(op, "top", top)
    width = block if width is None else _size(op, "width", width)
    stride = width if stride is None else _size(op, "stride", stride)
    if weights.shape[1] % kv_heads:
        raise ValueError(
            f"fastattn.blocks.{op}: kv_heads must divide the {weights.shape[1]} heads of weights, given {kv_heads}"
        )
    lq, compressed = weights.shape[2:]
    begin = torch.arange(compressed, device=weights.device) * stride
    key, key_end = _ends(block, k_length, weights.device)
    overlap = (begin[:, None] <= key_end) & (begin[:, None] + width > key)
    of_group = (
        weights.detach()
        .unflatten(1, (kv_heads, -1))
        .sum(2, dtype=torch.promote_types(weights.dtype, torch.float32))
    )
    importance = of_group @ overlap.to(of_group.dtype)
    own = (torch.arange(lq, device=weights.device) + k_length - lq)[:, None] // block
    number = torch.arange(len(key), device=weights.device)
    # the first block comes after the token's own, where only one has room
    importance = importance.masked_fill(number == 0, torch.finfo(importance.dtype).max)
    allowed, own = ((t.expand_as(importance)) for t in (number <= own, number == own))
    table = _chosen(importance, allowed, own, top)
    return Blocks.from_dense(table, block=(1, block), q_length=lq, k_length=k_length)


def _covered(p: torch.Tensor, gamma: float, least: int) -> torch.Tensor:
    """bool: of each row the smallest set by falling p whose mass reaches gamma, `least` at least."""
    values, order = p.sort(dim=-1, descending=True, stable=True)
    keep = (values.cumsum(-1) - values < gamma) & (values > 0)
    keep = keep | (torch.arange(p.shape[-1], device=p.device) < least)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, keep)


def _share(op: str, name: str, value: float) -> float:
    share = as_number(f"blocks.{op}", name, value)
    if not 0 <= share <= 1:
        raise ValueError(f"fastattn.blocks.{op}: {name} must lie in [0, 1], given {value}")
    return share


def coverage(
    p: torch.Tensor,
    gamma: float,
    *,
    block: tuple[int, int],
    q_length: int,
    k_length: int,
    least: int = 1,
    leaks: str | None = None,
) -> Blocks:
    """Of each row of probabilities the smallest set of key blocks, by falling p, whose mass reaches gamma; `least` blocks at least.

    p: (B or 1, heads, ceil(q_length / bq), ceil(k_length / bk)), rows that sum to 1. Blocks of p = 0 are only listed to fill `least`.
    Leaks: as p does; say so in `leaks`.
    """
    op = "coverage"
    check_tensor(f"blocks.{op}", "p", p, dims=4)
    check_floating(f"blocks.{op}", p=p)
    gamma, least = _share(op, "gamma", gamma), _size(op, "least", least, 0)
    wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
    table = _covered(wide, gamma, least)
    return Blocks.from_dense(table, block=_pair(op, block), q_length=q_length, k_length=k_length, leaks=leaks)


def vertical_slash(
    q: torch.Tensor, k: torch.Tensor, *, block: tuple[int, int], vertical: float = 0.9, slash: float = 0.9
) -> Blocks:
    """MInference's pattern (Jiang et al., arXiv 2407.02490): columns and diagonals that the last queries attend.

    The probabilities of the last bq queries over all keys, causal with the last query on the last key and the scale 1/sqrt(D), are
    summed over columns and over diagonals (by i - j); of each the smallest set whose mass reaches `vertical` or `slash` is kept. A
    block is listed if it has a kept column or diagonal; the first key block and the queries' own are listed always.

    q: (B, Hq, Lq, D), k: (B, Hkv, Lk, D); lists for each query head, of blocks that a causal mask allows.
    Leaks: yes, the last queries choose for all of them: for the prefill of inference only.
    """
    op = "vertical_slash"
    _qk(op, q, k)
    bq, bk = _pair(op, block)
    vertical, slash = _share(op, "vertical", vertical), _share(op, "slash", slash)
    lq, lk = q.shape[2], k.shape[2]
    p = _last_rows(q, k, bq)
    rows = p.shape[2]
    columns = _covered(p.sum(2) / rows, vertical, 1)  # (B, Hq, Lk)
    key, key_end = _ends(bk, lk, q.device)
    apart = torch.arange(lk - rows, lk, device=q.device)[:, None] - torch.arange(lk, device=q.device)  # i - j
    summed = p.new_zeros(*p.shape[:2], lk).scatter_add(
        2, apart.clamp(min=0).flatten().expand(*p.shape[:2], -1), p.flatten(2)
    )
    slashes = _covered(summed / rows, slash, 1)
    before = torch.nn.functional.pad(slashes.cumsum(-1), (1, 0))  # kept diagonals below each distance
    begin, end = (t + lk - lq for t in _ends(bq, lq, q.device))
    nearest = (begin[:, None] - key_end).clamp(0, lk)
    farthest = (end[:, None] - key + 1).clamp(0, lk)
    reached = before[:, :, farthest] > before[:, :, nearest]
    starts = torch.nn.functional.pad(columns.cumsum(-1), (1, 0))
    listed = (starts[:, :, key_end + 1] > starts[:, :, key])[:, :, None]
    own = (key <= end[:, None]) & (key_end >= begin[:, None])
    table = (reached | listed | own | (torch.arange(len(key), device=q.device) == 0)) & (key <= end[:, None])
    return Blocks.from_dense(table, block=(bq, bk), q_length=lq, k_length=lk, leaks=_LAST)


def _last_rows(q: torch.Tensor, k: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, Hq, rows, Lk) float32: causal probabilities of the last queries, the last on the last key."""
    rows = min(rows, q.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    lk = k.shape[2]
    scores = (
        _products(q.detach()[:, :, q.shape[2] - rows :].to(wide), k.detach().to(wide))
        / max(q.shape[3], 1) ** 0.5
    )
    i, j = torch.arange(lk - rows, lk, device=q.device)[:, None], torch.arange(lk, device=q.device)
    return scores.masked_fill(j > i, -torch.inf).softmax(-1).nan_to_num()


def flexprefill(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block: tuple[int, int],
    gamma: float = 0.9,
    tau: float = 0.1,
    least: int = 1,
) -> Blocks:
    """FlexPrefill (Lai et al., arXiv 2502.20766): a head whose pooled scores tell the last queries' distribution gets a coverage of its
    pooled scores, any other head `vertical_slash`.

    For the last query block, the distribution over key blocks by pooled scores, softmax(mean(q_I) . mean(k_J) / sqrt(D)), is compared
    with the true one, of its queries' probabilities; a head is query-aware where the square root of their Jensen-Shannon divergence
    (natural logarithm) is below tau. Its query block I lists the smallest set of causal key blocks whose pooled probabilities reach
    gamma, `least` at least, and the first and its own.

    q: (B, Hq, Lq, D), k: (B, Hkv, Lk, D); lists for each query head.
    Leaks: yes, the last queries choose for all of them: for the prefill of inference only.
    """
    op = "flexprefill"
    _qk(op, q, k)
    bq, bk = _pair(op, block)
    gamma, tau, least = _share(op, "gamma", gamma), _share(op, "tau", tau), _size(op, "least", least, 0)
    lq, lk = q.shape[2], k.shape[2]
    rest = vertical_slash(q, k, block=(bq, bk), vertical=gamma, slash=gamma)
    if not lq or not lk:
        return rest
    begin, end = (t + lk - lq for t in _ends(bq, lq, q.device))
    key, key_end = _ends(bk, lk, q.device)
    scores = _products(_pool(q, bq), _pool(k, bk)) / max(q.shape[3], 1) ** 0.5
    seen = key <= end[:, None]
    pooled = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    last = _last_rows(q, k, lq - (lq - 1) // bq * bq)
    number = torch.arange(lk, device=q.device) // bk
    true = last.new_zeros(*last.shape[:2], len(key)).index_add(2, number, last.mean(2))
    guess = pooled[:, :, -1]
    middle = (true + guess) / 2
    of_true, of_guess = (torch.xlogy(x, x / middle.clamp(min=1e-30)).sum(-1) for x in (true, guess))
    divergence = (of_true + of_guess) / 2
    aware = divergence.clamp(min=0).sqrt() < tau  # (B, Hq)
    own = seen & (key_end >= begin[:, None])
    covered = (_covered(pooled, gamma, least) & seen) | own | (seen & (key == 0))
    table = torch.where(aware[..., None, None], covered, rest.table())
    return Blocks.from_dense(table, block=(bq, bk), q_length=lq, k_length=lk, leaks=_LAST)


def tree_topk(
    q: torch.Tensor, k: torch.Tensor, *, block: tuple[int, int], top: int, causal: bool = False
) -> Blocks:
    """HiP's search (Lee et al., arXiv 2406.09827): for each query block `top` ranges of key blocks, halved until each is one block.

    A round halves every range, scores each half by the key in its middle against the pooled queries, and keeps the `top` largest:
    O(top log(blocks)) products a query block in place of all.

    q: (B, Hq, Lq, D), k: (B, Hkv, Lk, D); lists for each query head. A query block is the mean of its queries; with causal=True its
        first token, ranges hold only key blocks that are complete there, and the blocks of its own positions are listed besides.
    Leaks: yes, as the pooled tokens of a query block choose for all of them; with causal=True no.
    """
    op = "tree_topk"
    _qk(op, q, k)
    bq, bk = _pair(op, block)
    top = _size(op, "top", top)
    lq, lk = q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    begin, end = (t + lk - lq for t in _ends(bq, lq, q.device))
    key, key_end = _ends(bk, lk, q.device)
    nk = len(key)
    complete = (
        (key_end <= begin[:, None]).sum(-1) if causal else torch.full_like(begin, nk)
    )  # blocks that are searched
    pooled = q.detach()[:, :, ::bq].to(wide) if causal else _pool(q, bq)
    keys = k.detach().to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    parts = torch.arange(top + 1, device=q.device)
    edges = complete[:, None] * parts // top  # (nq, top + 1)
    low, high = (t.expand(*q.shape[:2], -1, -1) for t in (edges[:, :-1], edges[:, 1:]))
    for _ in range(max(nk, 1).bit_length()):
        middle = (low + high + 1) // 2
        low, high = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
        place = ((low + high) * bk // 2).clamp(0, max(lk - 1, 0))
        index = place.flatten(2)[..., None].expand(-1, -1, -1, q.shape[3])
        there = (
            keys.gather(2, index).unflatten(2, place.shape[2:])
            if lk
            else keys.new_zeros(*place.shape, q.shape[3])
        )
        scores = (there @ pooled[..., None])[..., 0].masked_fill(low >= high, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top]
        low, high = low.gather(-1, order), high.gather(-1, order)
    number = torch.where(low < high, low, nk)
    table = torch.zeros(*q.shape[:2], len(begin), nk + 1, dtype=torch.bool, device=q.device).scatter(
        3, number, True
    )[..., :nk]
    if causal:
        table = table | ((key <= end[:, None]) & (key_end > begin[:, None]))
    leaks = None if causal else _POOLED
    return Blocks.from_dense(table, block=(bq, bk), q_length=lq, k_length=lk, leaks=leaks)
