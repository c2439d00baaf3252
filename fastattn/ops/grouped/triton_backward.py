"""Grouped attention's backward in Triton: the forward's two passes, over queries for dQ and over keys for dK and dV."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import Line, dot, gather_tile, offset, rows, scatter_tile
from ..attention.triton_backward import along_columns, along_rows, row_products, score_gradient
from ..attention.triton_tiles import (
    Extent,
    key_tile,
    load_statistics,
    place,
    query_interval,
    query_tile,
    two_products,
)
from .triton import problem, sorted_values
from .triton import refusal as forward_refusal
from .triton_tiles import (
    Keys,
    Queries,
    counted,
    keys_of,
    load_keys,
    near_tiles,
    nearby,
    next_run,
    over_runs,
    query_tokens,
    run_of,
    sequence_tokens,
    tokens_of_tile,
)


class _QueryGradient(NamedTuple):
    """The operands of a query tile's gradient."""

    q_tile: tl.tensor  # (M, D)
    g_tile: tl.tensor  # (M, Dv)
    statistics: tl.tuple
    keys: Keys
    queries: Queries
    extent: Extent
    scale2: tl.tensor


@triton.jit
def _query_tile_gradient(dq, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to a query tile's gradient (M, D)."""
    k_tile, v_tile, allowed = load_keys(operands.keys, operands.queries, operands.extent, tile, META, MASKED)
    s, dp = two_products(operands.q_tile, k_tile, operands.g_tile, v_tile, META.precision)
    _, ds = score_gradient(s, dp, along_rows(operands.statistics), allowed, operands.scale2, SCORE, MASKED)
    return dot(ds.to(k_tile.dtype), k_tile, dq, META.precision)


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _grouped_backward_q_kernel(
    q, k, v, g, groups, state, delta, part, dq, mask, heads, tiles, length_q, length_k, near, factors, SCORE: tl.constexpr,
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
    q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
    part_rows = place(part, entry, head, work.start_q)
    row_offset = offset(entry * heads + head, length_q) + work.start_q + row
    q_tile = gather_tile(q_rows.base, row, q_rows.stride, inside, META.head_dim, META.block_d)
    g_tile = gather_tile(g_rows.base, row, g_rows.stride, inside, META.v_dim, META.block_dv)
    statistics = load_statistics(state, delta, row_offset, inside)
    if META.sorted:
        acc = tl.zeros([META.block_m, META.block_d], tl.float32)
        operands = _QueryGradient(q_tile, g_tile, statistics, keys, queries, extent, factors.scale2)
        document = tl.program_id(0) // tiles // heads
        last_end, stop = tl.max(queries.end, 0), tl.cdiv(extent.keys, META.block_n)
        run = run_of(groups, document, queries.signature, queries.begin, queries.end, last_end, stop)
        run_first = next_run(run, extent.keys * 0, True)
        acc = over_runs(acc, _query_tile_gradient, operands, run, run_first, SCORE, META, True)
        scatter_tile(part_rows.base, row, part_rows.stride, inside, acc, META.head_dim, META.block_d)
    else:
        acc = gather_tile(part_rows.base, row, part_rows.stride, inside, META.head_dim, META.block_d)
        near_queries = nearby(queries, extent, near)
        operands = _QueryGradient(q_tile, g_tile, statistics, keys, near_queries, extent, factors.scale2)
        first_tile, stop = near_tiles(near_queries, META.block_n)
        for tile in range(first_tile, stop):
            acc = _query_tile_gradient(acc, operands, tile, SCORE, META, True)
        dq_rows = place(dq, entry, head, work.start_q)
        scatter_tile(
            dq_rows.base, row, dq_rows.stride, inside, acc * factors.scale, META.head_dim, META.block_d
        )


class _TileKeys(NamedTuple):
    """A tile's keys (N,)."""

    position: tl.tensor  # in their document
    inside: tl.tensor  # False past the last key
    signature: tl.tensor


class _KeyGradients(NamedTuple):
    """The operands of a key tile's gradients, for one head of queries."""

    k_tile: tl.tensor  # (N, D)
    v_tile: tl.tensor  # (N, Dv)
    q: Line
    g: Line
    state: tl.tensor
    delta: tl.tensor
    signatures: tl.tensor
    order: tl.tensor
    keys: _TileKeys
    extent: Extent
    near: tl.tensor
    scale2: tl.tensor


@triton.jit
def _key_tile_gradients(
    gradients, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr
):
    """Add one tile of queries to a key tile's gradients (N, D) and (N, Dv)."""
    dk, dv = gradients
    q, g, extent = operands.q, operands.g, operands.extent
    queries = query_tokens(operands.order, operands.signatures, tile * META.block_m, extent, META)
    if not META.sorted:
        queries = nearby(queries, extent, operands.near)
    q_tile = gather_tile(q.base, queries.position, q.stride, queries.inside, META.head_dim, META.block_d)
    g_tile = gather_tile(g.base, queries.position, g.stride, queries.inside, META.v_dim, META.block_dv)
    statistics = load_statistics(operands.state, operands.delta, offset(queries.position, 1), queries.inside)
    allowed = None
    if MASKED:
        keys = operands.keys
        columns = queries.begin[None, :], queries.end[None, :], queries.signature[None, :]
        allowed = counted(
            columns, keys.position[:, None], keys.signature[:, None], keys.inside[:, None], META.sorted
        )
    s, dp = two_products(operands.k_tile, q_tile, operands.v_tile, g_tile, META.precision)  # (N, M)
    weight, ds = score_gradient(s, dp, along_columns(statistics), allowed, operands.scale2, SCORE, MASKED)
    dv = dot(weight.to(g_tile.dtype), g_tile, dv, META.precision)
    return dot(ds.to(q_tile.dtype), q_tile, dk, META.precision), dv


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _grouped_backward_kv_kernel(
    q, k, v, g, groups, state, delta, part_k, part_v, dk, dv, mask, kv_heads, tiles, length_q, length_k, near, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = key_tile(tiles, kv_heads, mask, length_q, length_k)
    kv_head, entry, extent = work.head, work.entry, work.extent
    first = work.tile * META.block_n
    if first >= extent.keys:
        return
    side = keys_of(k, v, groups, work, kv_head)
    keys, inside = tokens_of_tile(side.order, first, extent.keys, META.block_n, META.sorted)
    low, high = query_interval(keys, extent, META.causal)
    if not META.sorted:  # only the queries whose window contains the key
        low = tl.maximum(low, keys - extent.shift - near)
        high = tl.minimum(high, keys - extent.shift + near + 1)
    high = tl.where(inside, high, 0)
    tile_keys = _TileKeys(keys, inside, tl.load(side.signatures + offset(keys, 1), mask=inside, other=0))
    part_k_rows, part_v_rows = (
        place(part_k, entry, kv_head, work.start_k),
        place(part_v, entry, kv_head, work.start_k),
    )
    valid = inside & (keys < extent.key_length)
    k_tile = gather_tile(side.k.base, keys, side.k.stride, valid, META.head_dim, META.block_d)
    v_tile = gather_tile(side.v.base, keys, side.v.stride, valid, META.v_dim, META.block_dv)
    earliest = tl.min(tl.where(high > 0, low, extent.queries), 0)
    if META.sorted:
        dk_acc = tl.zeros([META.block_n, META.block_d], tl.float32)
        dv_acc = tl.zeros([META.block_n, META.block_dv], tl.float32)
        document = tl.program_id(0) // tiles // kv_heads
        stop = tl.cdiv(extent.queries, META.block_m)
        run = run_of(groups, document, tile_keys.signature, low, high, earliest, stop)
        run_first = next_run(run, extent.queries * 0, False)
    else:
        dk_acc = gather_tile(part_k_rows.base, keys, part_k_rows.stride, inside, META.head_dim, META.block_d)
        dv_acc = gather_tile(part_v_rows.base, keys, part_v_rows.stride, inside, META.v_dim, META.block_dv)
    order = sequence_tokens(groups.order_q, entry, work.start_q)
    signatures = sequence_tokens(groups.signatures_q, entry, work.start_q)
    for member in range(0, META.group):
        head = kv_head * META.group + member
        statistics = offset(entry * kv_heads * META.group + head, length_q) + work.start_q
        operands = _KeyGradients(
            k_tile, v_tile, place(q, entry, head, work.start_q), place(g, entry, head, work.start_q), state + 2 * statistics,
            delta + statistics, signatures, order, tile_keys, extent, near, factors.scale2,
        )  # fmt: skip
        if META.sorted:
            dk_acc, dv_acc = over_runs(
                (dk_acc, dv_acc), _key_tile_gradients, operands, run, run_first, SCORE, META, False
            )
        else:
            for tile in range(earliest // META.block_m, tl.cdiv(tl.max(high, 0), META.block_m)):
                dk_acc, dv_acc = _key_tile_gradients((dk_acc, dv_acc), operands, tile, SCORE, META, True)
    if META.sorted:
        scatter_tile(part_k_rows.base, keys, part_k_rows.stride, inside, dk_acc, META.head_dim, META.block_d)
        scatter_tile(part_v_rows.base, keys, part_v_rows.stride, inside, dv_acc, META.v_dim, META.block_dv)
    else:
        dk_rows, dv_rows = place(dk, entry, kv_head, work.start_k), place(dv, entry, kv_head, work.start_k)
        scatter_tile(
            dk_rows.base, keys, dk_rows.stride, inside, dk_acc * factors.scale, META.head_dim, META.block_d
        )
        scatter_tile(dv_rows.base, keys, dv_rows.stride, inside, dv_acc, META.v_dim, META.block_dv)


def refusal(grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask) -> str | None:
    return forward_refusal(q, k, v, groups, key_groups, window, scale, mask) or _triton.refusal(grad_out)


def configure(grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask):
    return problem(q, k, v, scale, mask).choose("grouped_attention_backward")


def grouped_attention_backward(
    grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask
):
    p = problem(q, k, v, scale, mask)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    if not dq.numel() or not dk.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    config = p.choose("grouped_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    more = {
        "g": rows(grad_out),
        "state": state.contiguous(),
        "delta": row_products(p, grad_out, out, grad_lse),
        "dq": rows(dq),
        "dk": rows(dk),
        "dv": rows(dv),
    }
    part, part_k, part_v = (rows(torch.empty_like(t, dtype=torch.float32)) for t in (dq, dk, dv))
    for over, kernel, parts in (
        ("queries", _grouped_backward_q_kernel, {"part": part}),
        ("keys", _grouped_backward_kv_kernel, {"part_k": part_k, "part_v": part_v}),
    ):
        values = more | parts | sorted_values(p, groups, key_groups, window, config, over=over)
        for by_signature in (True, False):
            p.launch(kernel, config, over=over, meta={"sorted": by_signature}, **values)
    return dq, dk, dv
