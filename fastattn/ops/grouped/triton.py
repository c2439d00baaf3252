"""Grouped attention in Triton, exact for any number of groups a token, without sorted copies.

Two passes: over tokens ordered by signature for the pairs that share a group (pairs of tiles without one are skipped), then over
tokens as they lie for the near pairs that share none, which carries on from the first pass's state.
"""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning as _config
from ...runtime.triton import LOG2E, dot, gather_tile, offset, scatter_tile
from ..attention.triton_problem import Problem
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import finish, fold, load_state, place, place_two, query_tile, store_state
from . import tuning_triton  # noqa: F401  declares what is looked up
from .triton_tiles import (
    SUMMARY,
    _tile_summary_kernel,
    load_keys,
    next_run,
    query_tokens,
    union_and_common,
)

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _fold_tile(
    acc, top, total, q_tile, side, at, extent, near, queries, scale2,
    WEIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SORTED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to a query tile's running state."""
    k_tile, v_tile, allowed = load_keys(
        side, at, extent, near, queries, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, SORTED, MASKED
    )
    s = tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32)
    s = dot(q_tile, tl.trans(k_tile), s, PRECISION)
    return fold(acc, top, total, s, allowed, v_tile, scale2, WEIGHT, True, True, MASKED, PRECISION)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _grouped_forward_kernel(
    q, k, v, groups, key_groups, order_q, order_k, summary, part, out, state,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, part_b, part_h, part_l, out_b, out_h, out_l, groups_b, key_groups_b,
    order_q_b, order_k_b, summary_b,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale2,
    SORTED: tl.constexpr, WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, lk, extent = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, inside, begin, end, signature = query_tokens(
        order_q, order_q_b, groups, groups_b, entry, start_q, first, extent, CAUSAL, BLOCK_M, SORTED
    )
    key_signatures = key_groups + offset(entry, key_groups_b) + start_k
    q_base = place(q, entry, q_b, head, q_h, start_q, q_l)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    part_base = place(part, entry, part_b, head, part_h, start_q, part_l)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    q_tile = gather_tile(q_base, rows, q_l, inside, HEAD_DIM, BLOCK_D)
    side = (k_base, k_l, v_base, v_l, key_signatures, order_k, entry, order_k_b, start_k)
    highest_end = tl.max(end, 0)
    if SORTED:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        queries = (rows, begin, end, signature)
        union, common = union_and_common(signature)
        latest, lowest = tl.max(begin, 0), tl.min(end, 0)
        summary_row = summary + offset(tl.program_id(0) // tiles // heads, summary_b)
        stop = tl.cdiv(lk, BLOCK_N)
        here, full, past = next_run(
            summary_row, lk * 0, stop, union, common, highest_end, latest, lowest, True
        )
        while here < stop:
            for at in range(here, full):
                acc, top, total = _fold_tile(
                    acc, top, total, q_tile, side, at, extent, near, queries, scale2,
                    WEIGHT, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, PRECISION,
                )  # fmt: skip
            for at in range(full, past):
                acc, top, total = _fold_tile(
                    acc, top, total, q_tile, side, at, extent, near, queries, scale2,
                    WEIGHT, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, PRECISION,
                )  # fmt: skip
            here, full, past = next_run(
                summary_row, past, stop, union, common, highest_end, latest, lowest, True
            )
    else:
        top, log_sum = load_state(state, statistics, inside)
        something = inside & (log_sum != float("inf"))
        top = tl.where(something, top, float("-inf"))
        total = tl.where(something, tl.exp2(log_sum * _LOG2E), 0.0)
        acc = gather_tile(part_base, rows, part_l, inside, V_DIM, BLOCK_DV) * total[:, None]
        begin = tl.maximum(begin, rows + extent[6] - near)
        queries = (rows, begin, end, signature)
        for at in range(tl.min(begin, 0) // BLOCK_N, tl.cdiv(highest_end, BLOCK_N)):
            acc, top, total = _fold_tile(
                acc, top, total, q_tile, side, at, extent, near, queries, scale2,
                WEIGHT, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, True, PRECISION,
            )  # fmt: skip
    acc, _, top, log_sum = finish(acc, top, total, scale2, 0.0, True)
    store_state(state, statistics, top, log_sum, inside)
    if SORTED:
        scatter_tile(part_base, rows, part_l, inside, acc, V_DIM, BLOCK_DV)
    else:
        out_base = place(out, entry, out_b, head, out_h, start_q, out_l)
        scatter_tile(out_base, rows, out_l, inside, acc, V_DIM, BLOCK_DV)


def problem(q, k, v, scale, mask) -> Problem:
    return Problem(q, k, v, None, 0, scale, 0.0, *mask)


def _order(signatures: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """(B, L) int32: the tokens of each document by signature, earlier ones first among equals, by position in it."""
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
        "signatures": signatures,
        "order": order,
        "offsets": offsets,
        "summary": summary,
        "tiles": tiles,
    }
    values |= {"length": length, "BLOCK": block}
    _triton.start(_tile_summary_kernel, (p.sequences * tiles,), values, num_warps=1)
    return summary


def sorted_values(p: Problem, groups, key_groups, near: int, config, *, over: str) -> dict:
    """What both passes over tiles of `over` take beside an attention call's values; `summary` is of the other side's tiles."""
    groups, key_groups = groups.contiguous(), key_groups.contiguous()
    _, offsets_q, offsets_k, _ = p.indices
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
    return {
        "groups": groups,
        "key_groups": key_groups,
        "order_q": order_q,
        "order_k": order_k,
        "summary": _summaries(p, *args),
        "near": min(near, _triton.LONGEST),
    }


def refusal(q, k, v, groups, key_groups, window, scale, *mask) -> str | None:
    if mask[-1] is not None:
        return "it does not serve a dense mask"
    return attention_refusal(q, k, v, None)


def configure(q, k, v, groups, key_groups, window, scale, *mask) -> _config.Choice:
    return problem(q, k, v, scale, mask).choose("grouped_attention")


def grouped_attention(q, k, v, groups, key_groups, window, scale, *mask):
    p = problem(q, k, v, scale, mask)
    out, (_, state) = p.output(*q.shape[:3], p.v_dim), p.statistics()
    if out.numel() == 0 or p.length_k == 0:
        return out.zero_(), state.copy_(state.new_tensor((0.0, torch.inf)))
    config = p.choose("grouped_attention").values
    more = sorted_values(p, groups, key_groups, window, config, over="queries")
    more |= {"part": torch.empty_like(out, dtype=torch.float32), "out": out, "state": state}
    for by_signature in (True, False):
        p.launch(_grouped_forward_kernel, config, over="queries", SORTED=by_signature, **more)
    return out, state
