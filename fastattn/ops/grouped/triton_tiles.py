"""Device functions of grouped attention: tiles of tokens ordered by signature, which of them meet, which pairs count."""

import triton
import triton.language as tl

from ...runtime.triton import gather_tile, offset
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
def next_run(summary_row, at, tiles, union, common, bound, latest, lowest, EARLIER: tl.constexpr):
    """The next tiles side by side, from `at` on, that share a group with `union` and have a token before (EARLIER), or at or
    after, position `bound`: [begin, full_end) are of one group of `common` and wholly within [latest, lowest), so that all
    their pairs count; [full_end, end) are not, and one of the two is empty. begin is `tiles` where there are none.

    Loops over such a range are pipelined by the compiler, as one over tiles to be tested one by one is not.
    """
    begin = at * 0 + tiles
    end = begin
    full_end = begin
    while at < tiles:
        ahead = at + tl.arange(0, _CHUNK)
        row = summary_row + offset(ahead, _SUMMARY)
        there = ahead < tiles
        earliest = tl.load(row + 2, mask=there, other=_FAR)
        last = tl.load(row + 3, mask=there, other=-1)
        live = (tl.load(row, mask=there, other=0) & union) != 0
        if EARLIER:
            live = live & (earliest < bound)
        else:
            live = live & (last >= bound)
        begin = tl.min(tl.where(live, ahead, tiles), 0)
        full = (tl.load(row + 1, mask=there, other=0) & common) != 0
        full = live & full & (earliest >= latest) & (last < lowest)
        full_end = tl.min(tl.where((ahead >= begin) & (full == 0), ahead, at + _CHUNK), 0)
        end = full_end
        if full_end <= begin:
            end = tl.min(tl.where((ahead > begin) & ((live == 0) | full), ahead, at + _CHUNK), 0)
        at = tl.where(begin < tiles, tiles, at + _CHUNK)
    return begin, full_end, end


@triton.jit
def pairs(rows, inside, begin, end, signature, keys, key_signature, near, shift, SORTED: tl.constexpr):
    """Which pairs a pass counts: SORTED those that share a group, else the near ones that share none.

    All arguments of tokens are broadcast: those of queries along one dim of the result, those of keys along the other.
    """
    allowed = inside & (keys >= begin) & (keys < end)
    shared = signature & key_signature
    if SORTED:
        return allowed & (shared != 0)
    return allowed & (shared == 0) & (rows + shift - keys <= near)


@triton.jit
def load_keys(
    side, at, extent, near, queries, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SORTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile `at` of the keys: (keys (N, D), values (N, Dv), which pairs (M, N) count when MASKED).

    side: where keys, values, signatures and their order lie; queries: (positions, begin, end, signatures) (M,).
    """
    k_base, k_l, v_base, v_l, key_signatures, order, entry, order_b, start = side
    keys, there = tokens_of_tile(order, entry, order_b, start, at * BLOCK_N, extent[1], BLOCK_N, SORTED)
    there = there & (keys < extent[3])  # padding, which may hold anything, is not read
    k_tile = gather_tile(k_base, keys, k_l, there, HEAD_DIM, BLOCK_D)
    v_tile = gather_tile(v_base, keys, v_l, there, V_DIM, BLOCK_DV)
    allowed = there
    if MASKED:
        rows, begin, end, signature = queries
        key_signature = tl.load(key_signatures + offset(keys, 1), mask=there, other=0)
        allowed = pairs(
            rows[:, None], there[None, :], begin[:, None], end[:, None], signature[:, None], keys[None, :],
            key_signature[None, :], near, extent[6], SORTED,
        )  # fmt: skip
    return k_tile, v_tile, allowed
