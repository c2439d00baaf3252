"""Grouped attention in Triton, exact for any number of groups of a token, without sorted copies.

There are two passes. The first goes over tokens in the order of their signatures and takes the pairs that share a group; it skips
pairs of tiles without such a pair. The second goes over tokens in their own order, continues from the first pass's state, and takes
the pairs within the window that share no group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning
from ...runtime.triton import LOG2E, dot, gather_tile, offset, rows, scatter_tile
from ..attention.triton_problem import Problem
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import Extent, finish, fold, load_state, place, query_tile, store_state
from . import tuning_triton  # noqa: F401  declares what is looked up
from .triton_tiles import (
    SUMMARY,
    Groups,
    Keys,
    Queries,
    _tile_summary_kernel,
    keys_of,
    load_keys,
    near_tiles,
    nearby,
    next_run,
    over_runs,
    query_tokens,
    run_of,
    sequence_tokens,
    tokens,
)

_LOG2E = tl.constexpr(LOG2E)


class _Attended(NamedTuple):
    """The operands of a query tile's loop over its keys."""

    q_tile: tl.tensor  # (M, D)
    keys: Keys
    queries: Queries
    extent: Extent
    scale2: tl.tensor


@triton.jit
def _fold_tile(state, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to a query tile's running state."""
    k_tile, v_tile, allowed = load_keys(operands.keys, operands.queries, operands.extent, tile, META, MASKED)
    s = tl.zeros([META.block_m, META.block_n], tl.float32)
    s = dot(operands.q_tile, tl.trans(k_tile), s, META.precision)
    return fold(state, s, allowed, v_tile, operands.scale2, SCORE, MASKED, META.precision)


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _grouped_forward_kernel(
    q, k, v, groups, part, out, lse, state, mask, heads, tiles, length_q, length_k, near, factors, SCORE: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    head, entry, extent = work.head, work.entry, work.extent
    first = work.tile * META.block_m
    if first >= extent.queries:
        return
    order = sequence_tokens(groups.order_q, entry, work.start_q)
    signatures = sequence_tokens(groups.signatures_q, entry, work.start_q)
    queries = query_tokens(order, signatures, first, extent, META)
    row, inside = queries.position, queries.inside
    keys = keys_of(k, v, groups, work, head // META.group)
    q_rows, part_rows = place(q, entry, head, work.start_q), place(part, entry, head, work.start_q)
    statistics = offset(entry * heads + head, length_q) + work.start_q + row
    q_tile = gather_tile(q_rows.base, row, q_rows.stride, inside, META.head_dim, META.block_d)
    if META.sorted:
        acc = tl.zeros([META.block_m, META.block_dv], tl.float32)
        top = tl.full([META.block_m], float("-inf"), tl.float32)
        total = tl.zeros([META.block_m], tl.float32)
        operands = _Attended(q_tile, keys, queries, extent, factors.scale2)
        document = tl.program_id(0) // tiles // heads
        last_end, stop = tl.max(queries.end, 0), tl.cdiv(extent.keys, META.block_n)
        run = run_of(groups, document, queries.signature, queries.begin, queries.end, last_end, stop)
        run_first = next_run(run, extent.keys * 0, True)
        acc, top, total = over_runs(
            (acc, top, total), _fold_tile, operands, run, run_first, SCORE, META, True
        )
    else:
        top, log_sum = load_state(state, statistics, inside)
        has_keys = inside & (log_sum != float("inf"))
        top = tl.where(has_keys, top, float("-inf"))
        total = tl.where(has_keys, tl.exp2(log_sum * _LOG2E), 0.0)
        acc = (
            gather_tile(part_rows.base, row, part_rows.stride, inside, META.v_dim, META.block_dv)
            * total[:, None]
        )
        near_queries = nearby(queries, extent, near)
        operands = _Attended(q_tile, keys, near_queries, extent, factors.scale2)
        first_tile, stop = near_tiles(near_queries, META.block_n)
        for tile in range(first_tile, stop):
            acc, top, total = _fold_tile((acc, top, total), operands, tile, SCORE, META, True)
    acc, log_sum_exp, top, log_sum = finish(acc, top, total, factors.scale2, 0.0, True)
    store_state(state, statistics, top, log_sum, inside)
    if META.sorted:
        scatter_tile(part_rows.base, row, part_rows.stride, inside, acc, META.v_dim, META.block_dv)
    else:
        tl.store(lse + statistics, log_sum_exp, mask=inside)
        out_rows = place(out, entry, head, work.start_q)
        scatter_tile(out_rows.base, row, out_rows.stride, inside, acc, META.v_dim, META.block_dv)


def problem(q, k, v, scale, mask) -> Problem:
    return Problem(q, k, v, None, 0, scale, 0.0, mask)


def _order(signatures: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """(B, L) int32: the positions of each document's tokens, sorted by signature; among equals earlier tokens come first."""
    order = signatures.argsort(dim=1, stable=True)
    if offsets is None:
        return order.int()
    tokens = torch.arange(signatures.shape[1], device=signatures.device)
    document = torch.bucketize(tokens, offsets.long(), right=True) - 1
    order = order[0]
    order = order[document[order].argsort(stable=True)]
    return (order - offsets[document[order]])[None].int()


def _summaries(p: Problem, signatures, order, offsets, tiles: int, length: int, block: int) -> torch.Tensor:
    summary = signatures.new_empty(p.sequences, tiles, SUMMARY)
    values = {
        "signatures": tokens(signatures),
        "order": tokens(order),
        "offsets": offsets,
        "summary": summary,
        "tiles": tiles,
    }
    values |= {"length": length, "BLOCK": block}
    _triton.start(_tile_summary_kernel, (p.sequences * tiles,), values, num_warps=1)
    return summary


def sorted_values(p: Problem, groups, key_groups, near: int, config, *, over: str) -> dict:
    """The values of both passes over tiles of `over`, besides those of an attention call. The summary describes the other side's tiles."""
    groups, key_groups = groups.contiguous(), key_groups.contiguous()
    offsets_q, offsets_k = p.offsets
    order_q = _order(groups, offsets_q)
    same = (
        key_groups.data_ptr() == groups.data_ptr()
        and key_groups.dtype is groups.dtype
        and offsets_q is offsets_k
    )
    order_k = order_q if same and p.length_q == p.length_k else _order(key_groups, offsets_k)
    if over == "queries":
        block, longest = config["block_n"], p.longest_k
        args = (key_groups, order_k, offsets_k, triton.cdiv(longest, block), p.length_k, block)
    else:
        block, longest = config["block_m"], p.longest_q
        args = (groups, order_q, offsets_q, triton.cdiv(longest, block), p.length_q, block)
    members = (groups, key_groups, order_q, order_k, _summaries(p, *args))
    return {"groups": Groups(*map(tokens, members)), "near": min(near, _triton.LONGEST)}


def refusal(q, k, v, groups, key_groups, window, scale, mask) -> str | None:
    if mask.dense is not None:
        return "it does not serve a dense mask"
    return attention_refusal(q, k, v, None, mask)


def configure(q, k, v, groups, key_groups, window, scale, mask) -> tuning.Choice:
    return problem(q, k, v, scale, mask).choose("grouped_attention")


def grouped_attention(q, k, v, groups, key_groups, window, scale, mask):
    p = problem(q, k, v, scale, mask)
    out, (lse, state) = p.output(*q.shape[:3], p.v_dim), p.statistics()
    if out.numel() == 0 or p.length_k == 0:
        return out.zero_(), lse.fill_(-torch.inf), state.copy_(state.new_tensor((0.0, torch.inf)))
    config = p.choose("grouped_attention").values
    more = sorted_values(p, groups, key_groups, window, config, over="queries")
    part = torch.empty_like(out, dtype=torch.float32)
    more |= {"part": rows(part), "out": rows(out), "lse": lse, "state": state}
    for by_signature in (True, False):
        p.launch(_grouped_forward_kernel, config, over="queries", meta={"sorted": by_signature}, **more)
    return out, lse, state
