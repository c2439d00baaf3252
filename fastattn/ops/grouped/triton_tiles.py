"""Device functions of grouped attention: tiles of tokens ordered by signature, which of them meet, which pairs count."""

import triton
import triton.language as tl

from ..._triton import offset
from ..attention.triton_tiles import key_interval

SUMMARY = 4  # of a tile: OR and AND of its signatures, its first and its last position
_SUMMARY = tl.constexpr(SUMMARY)
_CHUNK = tl.constexpr(64)  # summaries looked at together
_FAR = tl.constexpr(1 << 30)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _both(a, b):
    return a & b


@triton.jit
def tokens_of_tile(order, entry, order_b, start, first, count, BLOCK: tl.constexpr, SORTED: tl.constexpr):
    """(positions in their document of a tile's tokens, which of them are there)."""
    rows = first + tl.arange(0, BLOCK)
    inside = rows < count
    if SORTED:
        rows = tl.load(order + offset(entry, order_b) + start + offset(rows, 1), mask=inside, other=0)
    return rows, inside


@triton.jit
def query_tokens(
    order, order_b, groups, groups_b, entry, start, first, extent,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Of a tile's queries (positions, which are there, their key intervals begin and end, signatures)."""
    rows, inside = tokens_of_tile(order, entry, order_b, start, first, extent[0], BLOCK, SORTED)
    begin, end = key_interval(rows, extent, CAUSAL)
    end = tl.where(inside, end, 0)
    signature = tl.load(groups + offset(entry, groups_b) + start + offset(rows, 1), mask=inside, other=0)
    return rows, inside, begin, end, signature


@triton.jit
def union_and_common(signature):
    """OR and AND over a tile; a token that is not there counts as of no group."""
    return tl.reduce(signature, 0, _either), tl.reduce(signature, 0, _both)


@triton.jit
def _tile_summary_kernel(
    signatures, order, offsets, summary, signatures_b, order_b, tiles, length, BLOCK: tl.constexpr
):
    """summary (sequences, tiles, SUMMARY): what lets a pair of tiles be skipped, or taken whole."""
    program = tl.program_id(0)
    tile, document = program % tiles, program // tiles
    entry = document
    start = length * 0
    count = length
    if offsets is not None:
        entry = document * 0
        start = tl.load(offsets + document)
        count = tl.load(offsets + document + 1) - start
    rows, inside = tokens_of_tile(order, entry, order_b, start, tile * BLOCK, count, BLOCK, True)
    at = signatures + offset(entry, signatures_b) + start + offset(rows, 1)
    union, common = union_and_common(tl.load(at, mask=inside, other=0))
    row = summary + offset(program, _SUMMARY)
    tl.store(row, union)
    tl.store(row + 1, common)
    tl.store(row + 2, tl.min(tl.where(inside, rows, _FAR), 0).to(tl.int64))
    tl.store(row + 3, tl.max(tl.where(inside, rows, -1), 0).to(tl.int64))


@triton.jit
def next_live(summary_row, at, tiles, union, bound, EARLIER: tl.constexpr):
    """The first tile from `at` on with a group of `union` and a token before (EARLIER), or at or after, position `bound`;
    `tiles` where there is none."""
    found = at * 0 + tiles
    while at < tiles:
        ahead = at + tl.arange(0, _CHUNK)
        row = summary_row + offset(ahead, _SUMMARY)
        live = (tl.load(row, mask=ahead < tiles, other=0) & union) != 0
        if EARLIER:
            live = live & (tl.load(row + 2, mask=ahead < tiles, other=0) < bound)
        else:
            live = live & (tl.load(row + 3, mask=ahead < tiles, other=-1) >= bound)
        found = tl.min(tl.where(live, ahead, tiles), 0)
        at = tl.where(found < tiles, tiles, at + _CHUNK)
    return found


@triton.jit
def pairs(rows, inside, begin, end, signature, keys, key_signature, near, lk, lq, SORTED: tl.constexpr):
    """Which pairs a pass counts: SORTED those that share a group, else the near ones that share none.

    All arguments of tokens are broadcast: those of queries along one dim of the result, those of keys along the other.
    """
    allowed = inside & (keys >= begin) & (keys < end)
    shared = signature & key_signature
    if SORTED:
        return allowed & (shared != 0)
    return allowed & (shared == 0) & (rows + (lk - lq) - keys <= near)
