"""Sinkhorn's iterations in Triton, in the log domain, base 2: chunks of tokens, one launch an iteration.

With x = scores * log2(e) / temperature and u_0 = 0: v_t = -LSE over tokens (x + u_t-1) and u_t = -LSE over groups (x + v_t); the
result is 2^(x + u + v) of the last iteration. A launch combines the chunks' sums of the previous launch in a fixed order that does
not depend on the grid. The forward saves only the scores. The backward repeats the iterations, keeps u of each, and then goes
backwards through them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning as _tuning
from ...runtime.triton import LN2, load_tile, offset, store_tile
from . import tuning  # noqa: F401  declares what is looked up

_LN2 = tl.constexpr(LN2)
_NOWHERE = tl.constexpr(-1e30)  # the logarithm of an empty sum: finite, so that differences are not NaN
_CHUNK_BLOCK = tl.constexpr(32)  # chunks whose sums are combined at a time


@triton.jit
def _joined(top, total, other_top, other_total):
    """Adds two sums, each given as (reference, sum relative to 2^reference). Sums may be signed."""
    new_top = tl.maximum(top, other_top)
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp2(top - finite_top) + other_total * tl.exp2(other_top - finite_top)


@triton.jit
def _combined(sums, begin, end, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """The total (reference, sum), each (BLOCK_G,), of chunks [begin, end); `sums` is (chunks, 2, GROUPS)."""
    group = tl.arange(0, BLOCK_G)
    top = tl.full([BLOCK_G], _NOWHERE, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for first in range(begin, end, _CHUNK_BLOCK):
        chunk = first + tl.arange(0, _CHUNK_BLOCK)
        keep = (chunk < end)[:, None] & (group < GROUPS)[None, :]
        pointers = sums + offset(chunk, 2 * GROUPS)[:, None] + group[None, :]
        tops = tl.load(pointers, mask=keep, other=_NOWHERE)
        totals = tl.load(pointers + GROUPS, mask=keep, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(totals * tl.exp2(tops - new_top[None, :]), 0)
        top = new_top
    return top, total


@triton.jit
def _store_sums(sums, chunk, top, total, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    group = tl.arange(0, BLOCK_G)
    pointers = sums + offset(chunk, 2 * GROUPS) + group
    tl.store(pointers, top, mask=group < GROUPS)
    tl.store(pointers + GROUPS, total, mask=group < GROUPS)


@triton.jit
def _tile(base, row, tokens, factor, GROUPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_G: tl.constexpr):
    """(TOKENS, BLOCK_G) float32: rows from `row` on of a contiguous (rows, GROUPS) tensor, times factor."""
    tile = load_tile(base + offset(row, GROUPS), GROUPS, tokens, GROUPS, TOKENS, BLOCK_G, True)
    return tile.to(tl.float32) * factor


class _Chunk(NamedTuple):
    """A program's tokens and its sequence's chunks. Causal sums up to a token combine the chunks [begin, number) and the token's own."""

    number: tl.tensor
    owner: tl.tensor  # the sequence, or -1
    begin: tl.tensor  # the sequence's chunks are [begin, end)
    end: tl.tensor
    # the chunks [begin, together) are the prefix's, whose tokens all use the sums of the whole prefix; `begin` without a prefix
    together: tl.tensor
    row: tl.tensor  # the first token's row
    tokens: tl.tensor  # number of tokens


@triton.jit
def _chunk(begins, counts, prefixes, firsts, owners, TOKENS: tl.constexpr):
    number = tl.program_id(0)
    owner = tl.load(owners + number)
    has_owner = owner >= 0
    begin = tl.load(firsts + owner, mask=has_owner, other=0)
    end = tl.load(firsts + owner + 1, mask=has_owner, other=0)
    count = tl.load(counts + owner, mask=has_owner, other=0)
    together = begin
    before = (number - begin) * TOKENS
    if prefixes is not None:  # a prefix's last chunk may be short
        prefix = tl.load(prefixes + owner, mask=has_owner, other=0)
        together = begin + tl.cdiv(prefix, TOKENS).to(tl.int32)
        inside = number < together
        before = tl.where(inside, before, prefix + (number - together) * TOKENS)
        count = tl.where(inside, prefix, count)
    row = tl.load(begins + owner, mask=has_owner, other=0) + before
    return _Chunk(number, owner, begin, end, together, row, count - before)


@triton.jit
def _column_potentials(
    x, u_before, valid, sums, chunk,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """v (TOKENS, BLOCK_G) from the chunks' sums of 2^(x + u_before). The sums run over the whole sequence, or if CAUSAL up to each token
    and at least over the prefix."""
    if CAUSAL:
        apart = chunk.number >= chunk.together
        stop = tl.where(apart, chunk.number, chunk.together)
        top, total = _combined(sums, chunk.begin, stop, GROUPS, BLOCK_G)
        own = valid & apart
        y = tl.where(own, x + u_before[:, None], _NOWHERE)
        ahead, within = tl.associative_scan((y, tl.where(own, 1.0, 0.0)), 0, _joined)
        ahead, within = _joined(ahead, within, top[None, :], total[None, :])
        return tl.where(valid, -(ahead + tl.log2(tl.where(valid, within, 1.0))), 0.0)
    top, total = _combined(sums, chunk.begin, chunk.end, GROUPS, BLOCK_G)
    inside_groups = tl.arange(0, BLOCK_G) < GROUPS
    v = tl.where(inside_groups, -(top + tl.log2(tl.where(inside_groups, total, 1.0))), 0.0)
    return tl.zeros([TOKENS, BLOCK_G], tl.float32) + v[None, :]


@triton.jit
def _row_potentials(x, v, valid):
    """u (TOKENS,) = -LSE over groups of x + v."""
    y = tl.where(valid, x + v, _NOWHERE)
    top = tl.maximum(tl.max(y, 1), _NOWHERE)
    total = tl.sum(tl.where(valid, tl.exp2(y - top[:, None]), 0.0), 1)
    counted = tl.max(valid.to(tl.int32), 1) > 0  # a NaN in these rows stays; an empty sum would be infinite
    return -(top + tl.log2(tl.where(counted, total, 1.0)))


@triton.jit
def _share(x, v, u, valid):
    """2^(x + u + v), limited to 1, which it exceeds by rounding only."""
    y = x + v + u[:, None]
    return tl.where(valid, tl.exp2(tl.where(y > 0.0, 0.0, y)), 0.0)  # a NaN stays


@triton.jit
def _sinkhorn_kernel(
    scores, out, potentials, u_before, u_after, sums_before, sums_after, begins, counts, prefixes, firsts, owners, scale,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One iteration of a chunk: v and u from sums_before, then sums_after, or `out` in the last iteration. Without sums_before u is 0."""
    chunk = _chunk(begins, counts, prefixes, firsts, owners, TOKENS)
    owner, row, tokens = chunk.owner, chunk.row, chunk.tokens
    if owner < 0:
        return
    token = tl.arange(0, TOKENS)
    valid = (token < tokens)[:, None] & (tl.arange(0, BLOCK_G) < GROUPS)[None, :]
    x = _tile(scores, row, tokens, scale, GROUPS, TOKENS, BLOCK_G)
    u = tl.zeros([TOKENS], tl.float32)
    if sums_before is not None:
        if CAUSAL:
            u = tl.load(u_before + row + token, mask=token < tokens, other=0.0)
        v = _column_potentials(x, u, valid, sums_before, chunk, CAUSAL, GROUPS, TOKENS, BLOCK_G)
        u = _row_potentials(x, v, valid)
        if out is not None:
            shares = _share(x, v, u, valid)
            store_tile(out + offset(row, GROUPS), GROUPS, tokens, shares, GROUPS, TOKENS, BLOCK_G)
            if chunk.number == chunk.end - 1:  # the potentials are the last token's
                group = tl.arange(0, BLOCK_G)
                last = tl.sum(tl.where((token == tokens - 1)[:, None], v, 0.0), 0)
                tl.store(potentials + offset(owner, GROUPS) + group, last * _LN2, mask=group < GROUPS)
    if u_after is not None:
        tl.store(u_after + row + token, u, mask=token < tokens)
    if sums_after is not None:
        y = tl.where(valid, x + u[:, None], _NOWHERE)
        top = tl.maximum(tl.max(y, 0), _NOWHERE)
        total = tl.sum(tl.where(valid, tl.exp2(y - top[None, :]), 0.0), 0)
        _store_sums(sums_after, chunk.number, top, total, GROUPS, BLOCK_G)


@triton.jit
def _sinkhorn_backward_kernel(
    scores, grad, gradient, out, slopes_before, slopes_after, u_before, u_after, sums, slope_sums,
    begins, counts, prefixes, firsts, owners, scale, back,
    CAUSAL: tl.constexpr, APPLY: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Backward of iteration t. Without APPLY: the chunk's sums of v_t's gradient. With APPLY: the gradients of x and u_t-1 from them.

    A token's v_t sums 2^(x + u) over the tokens before it, so its gradient reaches them with the factor 2^(x + u + v_t). The sums are
    relative to v_t of the earliest token, which is the largest, so they never overflow. `grad` is given for the last iteration, which
    is processed first; `out` is given for the first iteration.
    """
    chunk = _chunk(begins, counts, prefixes, firsts, owners, TOKENS)
    owner, row, tokens = chunk.owner, chunk.row, chunk.tokens
    if owner < 0:
        return
    token = tl.arange(0, TOKENS)
    valid = (token < tokens)[:, None] & (tl.arange(0, BLOCK_G) < GROUPS)[None, :]
    x = _tile(scores, row, tokens, scale, GROUPS, TOKENS, BLOCK_G)
    u_t = tl.load(u_after + row + token, mask=token < tokens, other=0.0)
    u = tl.load(u_before + row + token, mask=token < tokens, other=0.0)
    v = _column_potentials(x, u, valid, sums, chunk, CAUSAL, GROUPS, TOKENS, BLOCK_G)
    shares = _share(x, v, u_t, valid)
    if grad is not None:
        y = _tile(grad, row, tokens, 1.0, GROUPS, TOKENS, BLOCK_G) * shares
        slope_v = y - shares * tl.sum(y, 1)[:, None]
    else:
        slope = tl.load(slopes_before + row + token, mask=token < tokens, other=0.0)
        slope_v = -shares * slope[:, None]
    if CAUSAL:
        reference = tl.where(valid, v, _NOWHERE)
    else:
        reference = tl.where(valid, 0.0, 0.0)
    if APPLY:
        if CAUSAL:
            # the tokens of a prefix get the gradients of all its tokens, including those of their own chunk
            apart = chunk.number >= chunk.together
            start = tl.where(apart, chunk.number + 1, chunk.begin)
            ahead, whole = tl.associative_scan(
                (reference, tl.where(apart, slope_v, 0.0)), 0, _joined, reverse=True
            )
            later, carried = _combined(slope_sums, start, chunk.end, GROUPS, BLOCK_G)
            ahead = tl.where(valid, ahead - reference, _NOWHERE)
            later = tl.where(valid, later[None, :] - reference, _NOWHERE)
            whole = whole * tl.exp2(ahead) + carried[None, :] * tl.exp2(later)
        else:
            _, whole = _combined(slope_sums, chunk.begin, chunk.end, GROUPS, BLOCK_G)
            whole = whole[None, :]
        through_v = -_share(x, v, u, valid) * whole
        tl.store(slopes_after + row + token, tl.sum(through_v, 1), mask=token < tokens)
        value = slope_v + through_v
        if grad is None:
            value += _tile(gradient, row, tokens, 1.0, GROUPS, TOKENS, BLOCK_G)
        if out is not None:
            store_tile(out + offset(row, GROUPS), GROUPS, tokens, value * back, GROUPS, TOKENS, BLOCK_G)
        else:
            store_tile(gradient + offset(row, GROUPS), GROUPS, tokens, value, GROUPS, TOKENS, BLOCK_G)
    else:
        top = tl.max(reference, 0)
        total = tl.sum(slope_v * tl.exp2(reference - top[None, :]), 0)
        _store_sums(slope_sums, chunk.number, top, total, GROUPS, BLOCK_G)


def refusal(*args) -> str | None:
    scores = next(a for a in reversed(args) if isinstance(a, torch.Tensor) and a.is_floating_point())
    if scores.shape[2] > 64:
        return f"it serves at most 64 groups, not {scores.shape[2]}"
    return _triton.refusal(scores)


def _choose(scores) -> _tuning.Choice:
    batch, length, groups = scores.shape
    return _tuning.lookup(
        "sinkhorn",
        "triton",
        structural={"dtype": str(scores.dtype).removeprefix("torch."), "groups": groups},
        sizes={"batch": max(1, batch), "length": max(1, length)},
        device=_triton.target(scores.device),
    )


def configure(scores, *_) -> _tuning.Choice:
    return _choose(scores)


def configure_backward(grad, scores, *_) -> _tuning.Choice:
    return _choose(scores)


def _chunks_of(counts: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.div(counts + (tokens - 1), tokens, rounding_mode="floor")


class _Chunks:
    """A call's sequences cut into chunks of tokens, and the values of every launch. Nothing here waits for the device."""

    def __init__(self, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
        batch, length, groups = scores.shape
        config = _choose(scores).values
        tokens, device = config["tokens"], scores.device
        self.options = {"num_warps": config["num_warps"]}
        if cu_seqlens is None:
            begins = torch.arange(batch, device=device) * length
            counts = torch.full((batch,), length, device=device)
            self.count = batch * triton.cdiv(length, tokens)
        else:
            # elements on a GPU are not checked; clamping keeps every access inside the tensor
            cuts = cu_seqlens.long().clamp(0, length)
            begins, counts = cuts[:-1], cuts.diff().clamp(min=0)
            # an upper bound: the last chunk of each document may be short
            self.count = triton.cdiv(length, tokens) + begins.numel()
        if lengths is not None:
            counts = torch.minimum(counts, lengths.long().clamp(min=0))
        prefixes = None
        chunks = _chunks_of(counts, tokens)
        if prefix_lengths is not None:  # prefixes have their own chunks
            prefixes = torch.minimum(counts, prefix_lengths.long().clamp(min=0)).contiguous()
            chunks = _chunks_of(prefixes, tokens) + _chunks_of(counts - prefixes, tokens)
            self.count += prefixes.numel()
        ends = chunks.cumsum(0)
        chunk = torch.arange(self.count, device=device)
        owners = torch.searchsorted(ends, chunk, right=True)
        self.iterations = iterations
        self.rows = batch * length
        self.groups = groups
        self.values = {
            "scores": scores.contiguous(),
            "begins": begins.contiguous(),
            "counts": counts.contiguous(),
            "prefixes": prefixes,
            "firsts": torch.cat([ends.new_zeros(1), ends]).int(),
            "owners": torch.where(owners < ends.numel(), owners, -1).int(),
            "scale": _triton.LOG2E / temperature,
            "CAUSAL": causal,
            "GROUPS": groups,
            "TOKENS": tokens,
            "BLOCK_G": max(2, triton.next_power_of_2(groups)),
        }

    def sums(self, iterations: int) -> torch.Tensor:
        shape = (iterations, self.count, 2, self.groups)
        return self.values["scores"].new_empty(shape, dtype=torch.float32)

    def row_potentials(self, iterations: int) -> torch.Tensor:
        return self.values["scores"].new_empty(iterations, self.rows, dtype=torch.float32)

    def launch(self, kernel, **more) -> None:
        _triton.start(kernel, (self.count,), self.values | more, **self.options)

    def iterate(self, t: int, sums, u, *, out=None, potentials=None) -> None:
        """Compute u and the column sums of iteration t from those of t - 1, or `out` in the last. The buffers may hold fewer iterations."""
        last = t == self.iterations
        self.launch(
            _sinkhorn_kernel,
            out=out,
            potentials=potentials,
            u_before=None if u is None or t == 0 else u[(t - 1) % len(u)],
            u_after=None if u is None else u[t % len(u)],
            sums_before=None if t == 0 else sums[(t - 1) % len(sums)],
            sums_after=None if last else sums[t % len(sums)],
        )


def sinkhorn(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
    # zeros for rows that belong to no sequence
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_zeros(sequences, 1, scores.shape[2], dtype=torch.float32)
    if not out.numel() or not sequences:
        return out, potentials
    chunks = _Chunks(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal)
    # two buffers of each: no launch writes to the buffer that it reads
    sums, u = chunks.sums(2), chunks.row_potentials(2) if causal else None
    for t in range(iterations):
        chunks.iterate(t, sums, u)
    chunks.iterate(iterations, sums, u, out=out, potentials=potentials)
    return out, potentials


def sinkhorn_backward(grad, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if not out.numel() or (cu_seqlens is not None and cu_seqlens.shape[0] == 1):
        return out
    chunks = _Chunks(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal)
    sums, u = chunks.sums(iterations), chunks.row_potentials(iterations + 1)
    for t in range(iterations + 1):
        chunks.iterate(t, sums, u)
    slope_sums = chunks.sums(1)[0]
    gradient = torch.empty_like(out, dtype=torch.float32)
    slopes = chunks.row_potentials(2)
    for t in range(iterations, 0, -1):
        for apply in (False, True):
            chunks.launch(
                _sinkhorn_backward_kernel,
                grad=grad.contiguous() if t == iterations else None,
                gradient=gradient,
                out=out if t == 1 else None,
                slopes_before=slopes[(t + 1) % 2],
                slopes_after=slopes[t % 2],
                u_before=u[t - 1],
                u_after=u[t],
                sums=sums[t - 1],
                slope_sums=slope_sums,
                back=1.0 / temperature,
                APPLY=apply,
            )
    return out
