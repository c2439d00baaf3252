"""Device functions of grouped attention: tiles of tokens ordered by signature, the tiles that share a group, the attended pairs."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.triton import Line, gather_tile, offset
from ..attention.triton_tiles import key_interval, place

SUMMARY = 4  # numbers for each tile: OR and AND of its signatures, its first and its last position
_SUMMARY = tl.constexpr(SUMMARY)
_CHUNK = tl.constexpr(64)  # summaries read together
_FAR = tl.constexpr(1 << 30)


class Tokens(NamedTuple):
    """One value for each token, (entries, L), as a kernel operand: a pointer and the stride of an entry."""

    base: torch.Tensor
    entry: int


def tokens(t: torch.Tensor) -> Tokens:
    return Tokens(t, t.stride(0))


class Groups(NamedTuple):
    """The signatures of a call's queries and keys, their order by signature, and a summary of each tile of the side that kernels loop
    over."""

    signatures_q: Tokens
    signatures_k: Tokens
    order_q: Tokens
    order_k: Tokens
    summary: Tokens


class Queries(NamedTuple):
    """A tile's queries (M,)."""

    position: tl.tensor  # in their document
    inside: tl.tensor  # False past the last query
    begin: tl.tensor  # their key intervals
    end: tl.tensor
    signature: tl.tensor


class Keys(NamedTuple):
    """One head's keys and values, with the signatures and the order of their tokens."""

    k: Line
    v: Line
    signatures: tl.tensor
    order: tl.tensor


class Run(NamedTuple):
    """The conditions by which a tile selects tiles of the other side from their summaries (`next_run`)."""

    summary: tl.tensor
    stop: tl.tensor  # number of tiles
    union: tl.tensor  # OR of the tile's signatures
    common: tl.tensor  # and AND
    bound: tl.tensor
    latest: tl.tensor
    lowest: tl.tensor


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _both(a, b):
    return a & b


@triton.jit
def sequence_tokens(t, entry, start):
    """A pointer to the value of a sequence's first token."""
    return t.base + offset(entry, t.entry) + start


@triton.jit
def tokens_of_tile(order, first, count, BLOCK: tl.constexpr, SORTED: tl.constexpr):
    """(positions of a tile's tokens in their document, which of them exist)."""
    position = first + tl.arange(0, BLOCK)
    inside = position < count
    if SORTED:
        position = tl.load(order + offset(position, 1), mask=inside, other=0)
    return position, inside


@triton.jit
def query_tokens(order, signatures, first, extent, META: tl.constexpr):
    """The queries of one tile."""
    position, inside = tokens_of_tile(order, first, extent.queries, META.block_m, META.sorted)
    begin, end = key_interval(position, extent, META.causal)
    end = tl.where(inside, end, 0)
    signature = tl.load(signatures + offset(position, 1), mask=inside, other=0)
    return Queries(position, inside, begin, end, signature)


@triton.jit
def _tile_summary_kernel(signatures, order, offsets, summary, tiles, length, BLOCK: tl.constexpr):
    """summary (sequences, tiles, SUMMARY): tells whether a pair of tiles can be skipped, or needs no test of its pairs."""
    program = tl.program_id(0)
    tile, document = program % tiles, program // tiles
    entry = document
    start = length * 0
    count = length
    if offsets is not None:
        entry = document * 0
        start = tl.load(offsets + document)
        count = tl.load(offsets + document + 1) - start
    rows, inside = tokens_of_tile(sequence_tokens(order, entry, start), tile * BLOCK, count, BLOCK, True)
    pointers = sequence_tokens(signatures, entry, start) + offset(rows, 1)
    signature = tl.load(pointers, mask=inside, other=0)  # tokens past the end belong to no group
    row = summary + offset(program, _SUMMARY)
    tl.store(row, tl.reduce(signature, 0, _either))
    tl.store(row + 1, tl.reduce(signature, 0, _both))
    tl.store(row + 2, tl.min(tl.where(inside, rows, _FAR), 0).to(tl.int64))
    tl.store(row + 3, tl.max(tl.where(inside, rows, -1), 0).to(tl.int64))


@triton.jit
def next_run(run, tile, EARLIER: tl.constexpr):
    """The next run of tiles from `tile` on that share a group with `union` and have a token before position `bound` (EARLIER), or at or
    after it. All tokens of the tiles in [begin, full_end) share a group of `common` and lie in [latest, lowest), so all their pairs
    are attended. The tiles in [full_end, end) do not. One of the two ranges is empty. begin is `stop` if no tile is left.

    The compiler pipelines a loop over such a range, but not a loop that tests each tile.
    """
    begin = tile * 0 + run.stop
    end = begin
    full_end = begin
    while tile < run.stop:
        ahead = tile + tl.arange(0, _CHUNK)
        row = run.summary + offset(ahead, _SUMMARY)
        valid = ahead < run.stop
        earliest = tl.load(row + 2, mask=valid, other=_FAR)
        last = tl.load(row + 3, mask=valid, other=-1)
        live = (tl.load(row, mask=valid, other=0) & run.union) != 0
        if EARLIER:
            live = live & (earliest < run.bound)
        else:
            live = live & (last >= run.bound)
        begin = tl.min(tl.where(live, ahead, run.stop), 0)
        full = (tl.load(row + 1, mask=valid, other=0) & run.common) != 0
        full = live & full & (earliest >= run.latest) & (last < run.lowest)
        full_end = tl.min(tl.where((ahead >= begin) & (full == 0), ahead, tile + _CHUNK), 0)
        end = full_end
        if full_end <= begin:
            end = tl.min(tl.where((ahead > begin) & ((live == 0) | full), ahead, tile + _CHUNK), 0)
        tile = tl.where(begin < run.stop, run.stop, tile + _CHUNK)
    return begin, full_end, end


@triton.jit
def over_runs(
    state,
    BODY: tl.constexpr,
    operands,
    run,
    first,
    SCORE: tl.constexpr,
    META: tl.constexpr,
    EARLIER: tl.constexpr,
):
    """The state after BODY(state, operands, tile, SCORE, META, MASKED) of each tile of the runs; `first` is the first run."""
    begin, full_end, end = first
    while begin < run.stop:
        for tile in range(begin, full_end):
            state = BODY(state, operands, tile, SCORE, META, False)
        for tile in range(full_end, end):
            state = BODY(state, operands, tile, SCORE, META, True)
        begin, full_end, end = next_run(run, end, EARLIER)
    return state


@triton.jit
def counted(queries, keys, key_signature, key_inside, SORTED: tl.constexpr):
    """Which pairs a pass takes, within the queries' intervals: pairs that share a group if SORTED, else pairs that share none.

    Values of queries are broadcast along one dim of the result, values of keys along the other.
    """
    begin, end, signature = queries
    allowed = key_inside & (keys >= begin) & (keys < end)
    shared = signature & key_signature
    if SORTED:
        return allowed & (shared != 0)
    return allowed & (shared == 0)


@triton.jit
def keys_of(k, v, groups, work, kv_head):
    """The keys of a program's sequence."""
    return Keys(
        place(k, work.entry, kv_head, work.start_k), place(v, work.entry, kv_head, work.start_k),
        sequence_tokens(groups.signatures_k, work.entry, work.start_k),
        sequence_tokens(groups.order_k, work.entry, work.start_k),
    )  # fmt: skip


@triton.jit
def run_of(groups, document, signature, low, high, bound, tiles):
    """The conditions on `tiles` tiles of the other side, for a tile with these signatures and intervals."""
    union, common = tl.reduce(signature, 0, _either), tl.reduce(signature, 0, _both)
    summary = groups.summary.base + offset(document, groups.summary.entry)
    return Run(summary, tiles, union, common, bound, tl.max(low, 0), tl.min(high, 0))


@triton.jit
def nearby(queries, extent, near):
    """The queries, with their intervals cut to their windows."""
    diagonal = queries.position + extent.shift
    begin = tl.maximum(queries.begin, diagonal - near)
    end = tl.minimum(queries.end, diagonal + near + 1)
    return Queries(queries.position, queries.inside, begin, end, queries.signature)


@triton.jit
def near_tiles(near_queries, BLOCK_N: tl.constexpr):
    """[begin, end) of the tiles that contain the keys of these intervals."""
    return tl.min(near_queries.begin, 0) // BLOCK_N, tl.cdiv(tl.max(near_queries.end, 0), BLOCK_N)


@triton.jit
def load_keys(side, queries, extent, tile, META: tl.constexpr, MASKED: tl.constexpr):
    """A tile of keys: (keys (N, D), values (N, Dv), and if MASKED the attended pairs (M, N) with the queries)."""
    keys, valid = tokens_of_tile(side.order, tile * META.block_n, extent.keys, META.block_n, META.sorted)
    valid = valid & (keys < extent.key_length)  # padding may hold anything and is not read
    k_tile = gather_tile(side.k.base, keys, side.k.stride, valid, META.head_dim, META.block_d)
    v_tile = gather_tile(side.v.base, keys, side.v.stride, valid, META.v_dim, META.block_dv)
    allowed = valid
    if MASKED:
        key_signature = tl.load(side.signatures + offset(keys, 1), mask=valid, other=0)
        rows = queries.begin[:, None], queries.end[:, None], queries.signature[:, None]
        allowed = counted(rows, keys[None, :], key_signature[None, :], valid[None, :], META.sorted)
    return k_tile, v_tile, allowed
