"""Grouped attention's backward in Triton: the forward's two passes over queries for dQ, and over keys for dK and dV."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import dot, gather_tile, offset, scatter_tile
from ..attention.triton_backward import row_products, score_gradient
from ..attention.triton_tiles import (
    key_tile,
    load_statistics,
    place,
    place_two,
    query_interval,
    query_tile,
    two_products,
)
from .triton import problem, sorted_values
from .triton import refusal as forward_refusal
from .triton_tiles import load_keys, next_run, pairs, query_tokens, tokens_of_tile, union_and_common


@triton.jit
def _query_tile_gradient(
    dq, q_tile, g_tile, row_top, row_sum, row_delta, side, at, extent, near, queries, scale2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SORTED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to a query tile's gradient (M, D)."""
    k_tile, v_tile, allowed = load_keys(
        side, at, extent, near, queries, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, SORTED, MASKED
    )
    s, dp = two_products(q_tile, k_tile, g_tile, v_tile, PRECISION)
    _, ds = score_gradient(
        s, dp, row_top[:, None], row_sum[:, None], row_delta[:, None], allowed, scale2, WEIGHT, DERIVATIVE, True, True,
        MASKED,
    )  # fmt: skip
    return dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _grouped_backward_q_kernel(
    q, k, v, g, groups, key_groups, order_q, order_k, summary, state, delta, part, dq,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, part_b, part_h, part_l, dq_b, dq_h, dq_l,
    groups_b, key_groups_b, order_q_b, order_k_b, summary_b,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    SORTED: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
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
    q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    part_base = place(part, entry, part_b, head, part_h, start_q, part_l)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    q_tile = gather_tile(q_base, rows, q_l, inside, HEAD_DIM, BLOCK_D)
    g_tile = gather_tile(g_base, rows, g_l, inside, V_DIM, BLOCK_DV)
    row_top, row_sum, row_delta = load_statistics(state, delta, statistics, inside)
    side = (k_base, k_l, v_base, v_l, key_signatures, order_k, entry, order_k_b, start_k)
    highest_end = tl.max(end, 0)
    if SORTED:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
                acc = _query_tile_gradient(
                    acc, q_tile, g_tile, row_top, row_sum, row_delta, side, at, extent, near, queries, scale2,
                    WEIGHT, DERIVATIVE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, PRECISION,
                )  # fmt: skip
            for at in range(full, past):
                acc = _query_tile_gradient(
                    acc, q_tile, g_tile, row_top, row_sum, row_delta, side, at, extent, near, queries, scale2,
                    WEIGHT, DERIVATIVE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, PRECISION,
                )  # fmt: skip
            here, full, past = next_run(
                summary_row, past, stop, union, common, highest_end, latest, lowest, True
            )
    else:
        acc = gather_tile(part_base, rows, part_l, inside, HEAD_DIM, BLOCK_D)
        begin = tl.maximum(begin, rows + extent[6] - near)
        queries = (rows, begin, end, signature)
        for at in range(tl.min(begin, 0) // BLOCK_N, tl.cdiv(highest_end, BLOCK_N)):
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_top, row_sum, row_delta, side, at, extent, near, queries, scale2,
                WEIGHT, DERIVATIVE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, True, PRECISION,
            )  # fmt: skip
    if SORTED:
        scatter_tile(part_base, rows, part_l, inside, acc, HEAD_DIM, BLOCK_D)
    else:
        dq_base = place(dq, entry, dq_b, head, dq_h, start_q, dq_l)
        scatter_tile(dq_base, rows, dq_l, inside, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_tile_gradient(
    dk, dv, k_tile, v_tile, side, at, extent, near, of_keys, scale2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SORTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to a key tile's gradients (N, D) and (N, Dv).

    side: where queries, dO, statistics, signatures and their order lie; of_keys: (positions, there, signatures) (N,).
    """
    q_base, q_l, g_base, g_l, state, delta, groups, groups_b, order, entry, order_b, start = side
    rows, inside, begin, end, signature = query_tokens(
        order, order_b, groups, groups_b, entry, start, at * BLOCK_M, extent, CAUSAL, BLOCK_M, SORTED
    )
    q_tile = gather_tile(q_base, rows, q_l, inside, HEAD_DIM, BLOCK_D)
    g_tile = gather_tile(g_base, rows, g_l, inside, V_DIM, BLOCK_DV)
    row_top, row_sum, row_delta = load_statistics(state, delta, offset(rows, 1), inside)
    allowed = None
    if MASKED:
        keys, there, key_signature = of_keys
        allowed = pairs(
            rows[None, :], there[:, None], begin[None, :], end[None, :], signature[None, :], keys[:, None],
            key_signature[:, None], near, extent[6], SORTED,
        )  # fmt: skip
    s, dp = two_products(k_tile, q_tile, v_tile, g_tile, PRECISION)  # (N, M)
    weight, ds = score_gradient(
        s, dp, row_top[None, :], row_sum[None, :], row_delta[None, :], allowed, scale2, WEIGHT, DERIVATIVE, True, True,
        MASKED,
    )  # fmt: skip
    dv = dot(weight.to(g_tile.dtype), g_tile, dv, PRECISION)
    return dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION), dv


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _grouped_backward_kv_kernel(
    q, k, v, g, groups, key_groups, order_q, order_k, summary, state, delta, part_k, part_v, dk, dv,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    part_k_b, part_k_h, part_k_l, part_v_b, part_v_h, part_v_l,
    groups_b, key_groups_b, order_q_b, order_k_b, summary_b,
    kv_heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    SORTED: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, entry, start_q, start_k, lq, lk, extent = key_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left,
        window_right,
    )  # fmt: skip
    first = tile * BLOCK_N
    if first >= lk:
        return
    keys, there = tokens_of_tile(order_k, entry, order_k_b, start_k, first, lk, BLOCK_N, SORTED)
    low, high = query_interval(keys, extent, CAUSAL)
    high = tl.where(there, high, 0)
    key_signature = tl.load(
        key_groups + offset(entry, key_groups_b) + start_k + offset(keys, 1), mask=there, other=0
    )
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, kv_head, start_k)
    part_k_base, part_v_base = place_two(
        part_k, part_k_b, part_k_h, part_k_l, part_v, part_v_b, part_v_h, part_v_l, entry, kv_head, start_k
    )
    real = there & (keys < extent[3])
    k_tile = gather_tile(k_base, keys, k_l, real, HEAD_DIM, BLOCK_D)
    v_tile = gather_tile(v_base, keys, v_l, real, V_DIM, BLOCK_DV)
    of_keys = (keys, there, key_signature)
    earliest = tl.min(tl.where(high > 0, low, lq), 0)
    if SORTED:
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        union, common = union_and_common(key_signature)
        latest, lowest = tl.max(low, 0), tl.min(high, 0)
        summary_row = summary + offset(tl.program_id(0) // tiles // kv_heads, summary_b)
        stop = tl.cdiv(lq, BLOCK_M)
        start, start_full, start_past = next_run(
            summary_row, lq * 0, stop, union, common, earliest, latest, lowest, False
        )
    else:
        dk_acc = gather_tile(part_k_base, keys, part_k_l, there, HEAD_DIM, BLOCK_D)
        dv_acc = gather_tile(part_v_base, keys, part_v_l, there, V_DIM, BLOCK_DV)
        high = tl.minimum(high, keys - extent[6] + near + 1)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
        statistics = offset(entry * kv_heads * GROUP + head, length_q) + start_q
        side = (
            q_base, q_l, g_base, g_l, state + 2 * statistics, delta + statistics, groups, groups_b, order_q, entry, order_q_b, start_q,
        )  # fmt: skip
        if SORTED:
            here, full, past = start, start_full, start_past
            while here < stop:
                for at in range(here, full):
                    dk_acc, dv_acc = _key_tile_gradient(
                        dk_acc, dv_acc, k_tile, v_tile, side, at, extent, near, of_keys, scale2,
                        WEIGHT, DERIVATIVE, CAUSAL, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, False, PRECISION,
                    )  # fmt: skip
                for at in range(full, past):
                    dk_acc, dv_acc = _key_tile_gradient(
                        dk_acc, dv_acc, k_tile, v_tile, side, at, extent, near, of_keys, scale2,
                        WEIGHT, DERIVATIVE, CAUSAL, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, True, PRECISION,
                    )  # fmt: skip
                here, full, past = next_run(
                    summary_row, past, stop, union, common, earliest, latest, lowest, False
                )
        else:
            for at in range(earliest // BLOCK_M, tl.cdiv(tl.max(high, 0), BLOCK_M)):
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, side, at, extent, near, of_keys, scale2,
                    WEIGHT, DERIVATIVE, CAUSAL, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, False, True, PRECISION,
                )  # fmt: skip
    if SORTED:
        scatter_tile(part_k_base, keys, part_k_l, there, dk_acc, HEAD_DIM, BLOCK_D)
        scatter_tile(part_v_base, keys, part_v_l, there, dv_acc, V_DIM, BLOCK_DV)
    else:
        dk_base, dv_base = place_two(dk, dk_b, dk_h, dk_l, dv, dv_b, dv_h, dv_l, entry, kv_head, start_k)
        scatter_tile(dk_base, keys, dk_l, there, dk_acc * scale, HEAD_DIM, BLOCK_D)
        scatter_tile(dv_base, keys, dv_l, there, dv_acc, V_DIM, BLOCK_DV)


def refusal(grad_out, q, k, v, out, state, *options) -> str | None:
    return forward_refusal(q, k, v, *options) or _triton.refusal(grad_out)


def configure(grad_out, q, k, v, out, state, groups, key_groups, window, scale, *mask):
    return problem(q, k, v, scale, mask).choose("grouped_attention_backward")


def grouped_attention_backward(grad_out, q, k, v, out, state, groups, key_groups, window, scale, *mask):
    p = problem(q, k, v, scale, mask)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    if not dq.numel() or not dk.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    config = p.choose("grouped_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    more = {
        "g": grad_out,
        "state": state.contiguous(),
        "delta": row_products(p, grad_out, out),
        "dq": dq,
        "dk": dk,
        "dv": dv,
    }
    part, part_k, part_v = (torch.empty_like(t, dtype=torch.float32) for t in (dq, dk, dv))
    for over, kernel, parts in (
        ("queries", _grouped_backward_q_kernel, {"part": part}),
        ("keys", _grouped_backward_kv_kernel, {"part_k": part_k, "part_v": part_v}),
    ):
        values = more | parts | sorted_values(p, groups, key_groups, window, config, over=over)
        for by_signature in (True, False):
            p.launch(kernel, config, over=over, SORTED=by_signature, **values)
    return dq, dk, dv
