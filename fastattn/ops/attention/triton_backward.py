"""Backward of tiled attention in Triton. One kernel computes dK and dV of a tile of keys, another dQ of a tile of queries. There are no
atomics, so results are repeatable."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import Line, dot, offset, pairs, rows
from .checks import WANTS_BIAS, WANTS_SINK
from .triton_bias import bias_gradient
from .triton_gradients import (  # noqa: F401  other ops import some of these from here
    add_captured_gradients,
    along_columns,
    along_rows,
    score_gradient,
    share_of_kept,
    statistics_of,
    user_gradients,
    weights_and_gradients,
)
from .triton_options import Drawn, cap_slope, drawn_rows, kept_pairs
from .triton_placed import Placed, placed
from .triton_problem import Problem, turned
from .triton_problem import refusal as forward_refusal
from .triton_tiles import (
    Factors,
    Tiles,
    address,
    allowed_pairs,
    column_elements,
    key_passes,
    key_tile,
    load_keys,
    load_queries,
    over_tiles,
    place,
    query_interval,
    query_intervals,
    query_tile,
    row_elements,
    store_rows,
    two_products,
    with_shift,
)


@triton.jit
def _attention_delta_kernel(
    g, out, residual, grad_lse, delta, heads, length_q, count, V_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """delta_i = dO_i.O_i - dlse_i for rows of (B, H, Lq). O includes the residual of its rounding if there is one."""
    rows = offset(tl.program_id(0), ROWS) + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_DV)
    inside = rows < count
    batch, head, row = rows // length_q // heads, (rows // length_q) % heads, rows % length_q
    keep = inside[:, None] & (columns < V_DIM)[None, :]
    g_rows = address(g, batch, head, row)
    out_rows = address(out, batch, head, row)
    g_tile = tl.load(g_rows[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    out_tile = tl.load(out_rows[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    if residual is not None:
        lost = address(residual, batch, head, row)
        out_tile += tl.load(lost[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    value = tl.sum(g_tile * out_tile, 1)
    if grad_lse is not None:
        value -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    tl.store(delta + rows, value, mask=inside)


class _QueryGradient(NamedTuple):
    """The operands of a query tile's gradient."""

    q_tile: tl.tensor  # (M, D)
    g_tile: tl.tensor  # (M, Dv)
    statistics: tl.tuple
    k: Line
    v: Line
    bias: Line  # one line a row (M,), or None
    dense: Line  # likewise
    begin: tl.tensor  # (M,) interval of keys
    end: tl.tensor
    count: tl.tensor  # number of keys
    factors: Factors
    drawn: Drawn  # or None
    placed: Placed  # a user's function, or None


@triton.jit
def _query_tile_gradient(dq, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to a query tile's gradient (M, D)."""
    begin, end, count = operands.begin, operands.end, operands.count
    first = tile * META.block_n
    keys = first + tl.arange(0, META.block_n)
    k_tile, v_tile = load_keys(operands.k, operands.v, first, count, META, MASKED)
    products, dp = two_products(operands.q_tile, k_tile, operands.g_tile, v_tile, META.precision)  # (M, N)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(keys, begin, end, operands.dense)
    kept = None
    if operands.drawn is not None:
        kept = kept_pairs(operands.drawn, first, META.block_n, META.aligned)
    at = operands.placed
    if at is not None:
        columns = (at.key + keys)[None, :]
        _, ds, of_scores = user_gradients(
            products,
            dp,
            along_rows(operands.statistics),
            allowed,
            at,
            at.row,
            columns,
            operands.factors,
            SCORE,
            MASKED,
        )
        add_captured_gradients(products, of_scores, end > 0, at, at.row, columns, operands.factors, SCORE)
    else:
        _, ds = weights_and_gradients(
            products, dp, along_rows(operands.statistics), allowed, operands.bias, keys, end, count, operands.factors,
            share_of_kept(operands.drawn), kept, SCORE, MASKED,
        )  # fmt: skip
    if operands.factors.cap is not None:
        ds = ds * cap_slope(products, operands.factors.cap)
    return dot(ds.to(k_tile.dtype), k_tile, dq, META.precision)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _attention_backward_q_kernel(
    q, k, v, bias, dense, classes, drop, captured, g, state, delta, dq, mask, heads, tiles, length_q, length_k, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    tile, head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_m
    count = extent.queries
    if first >= count:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    kv_head = head // META.group
    q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    at = offset(entry * heads + head, length_q) + work.start_q + row
    bias_rows = row_elements(bias, entry, head, work.start_q + row, work.start_k)
    dense_rows = row_elements(dense, entry, head, work.start_q + row, work.start_k)
    class_row = row_elements(classes, entry, head, tile, tile * 0)

    q_tile, g_tile = load_queries(q_rows, g_rows, first, count, META, True)
    statistics = statistics_of(state, delta, at, row < count, SCORE, META)
    shifted = with_shift(factors, extent.key_length, SCORE.log_n)
    operands = _QueryGradient(
        q_tile, g_tile, statistics, k_rows, v_rows, bias_rows, dense_rows, begin, end, extent.key_length, shifted,
        drawn_rows(drop, entry * heads + head, work.start_q + row, work.start_k),
        placed(captured, entry, head, (work.start_q + row)[:, None], work.start_k),
    )  # fmt: skip
    acc = tl.zeros([META.block_m, META.block_d], tl.float32)
    passes = key_passes(edges, dense, META.block_n)
    acc = over_tiles(acc, _query_tile_gradient, operands, passes, class_row, SCORE, META)
    dq_rows = place(dq, entry, head, work.start_q + first)
    store_rows(dq_rows, count - first, acc * factors.scale, META.head_dim, META.block_m, META.block_d)


class _KeyGradients(NamedTuple):
    """The operands of a key tile's gradients, for one head of queries."""

    k_tile: tl.tensor  # (N, D)
    v_tile: tl.tensor  # (N, Dv)
    q: Line
    g: Line
    state: tl.tensor
    delta: tl.tensor
    bias: Line  # one line a key (N,), or None
    dense: Line  # likewise
    begin: tl.tensor  # (N,) interval of queries
    end: tl.tensor
    count: tl.tensor  # number of queries
    factors: Factors
    drawn: Drawn  # for the queries, counted from the tile's first one; or None
    placed: Placed  # or None


@triton.jit
def _key_tile_gradients(
    gradients, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr
):
    """Add one tile of queries to a key tile's gradients (N, D) and (N, Dv)."""
    dk, dv = gradients
    end, count = operands.end, operands.count
    first = tile * META.block_m
    row = first + tl.arange(0, META.block_m)
    q_tile, g_tile = load_queries(operands.q, operands.g, first, count, META, MASKED)
    statistics = statistics_of(operands.state, operands.delta, row, row < count, SCORE, META)
    products, dp = two_products(operands.k_tile, q_tile, operands.v_tile, g_tile, META.precision)  # (N, M)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(row, operands.begin, end, operands.dense)
    kept = None
    if operands.drawn is not None:
        of = operands.drawn
        rows = Drawn(of.seed, of.offset, of.dropped, of.scale, of.plane, of.row + row, of.key)
        kept = tl.trans(kept_pairs(rows, 0, META.block_n, META.aligned))
    at = operands.placed
    if at is not None:
        keys = at.key + tl.arange(0, META.block_n)
        weight, ds, _ = user_gradients(
            products, dp, along_columns(statistics), allowed, at, (at.row + row)[None, :], keys[:, None], operands.factors,
            SCORE, MASKED,
        )  # fmt: skip
    else:
        weight, ds = weights_and_gradients(
            products, dp, along_columns(statistics), allowed, operands.bias, row, end, count, operands.factors,
            share_of_kept(operands.drawn), kept, SCORE, MASKED,
        )  # fmt: skip
    if operands.factors.cap is not None:
        ds = ds * cap_slope(products, operands.factors.cap)
    dv = dot(weight.to(g_tile.dtype), g_tile, dv, META.precision)
    dk = dot(ds.to(q_tile.dtype), q_tile, dk, META.precision)
    return dk, dv


@triton.jit
def _query_passes(first, extent, dense, META: tl.constexpr):
    """The tiles of queries that attend a tile of keys. Under a dense mask no tile counts as full."""
    last = tl.minimum(first + META.block_n, extent.keys) - 1
    first_begin, first_end = query_interval(first, extent, META.causal)
    last_begin, last_end = query_interval(last, extent, META.causal)
    # Padding keys are attended by no query, so take the end of the last key that is not padding.
    _, valid_end = query_interval(tl.minimum(last, extent.key_length - 1), extent, META.causal)
    begin = first_begin // META.block_m
    end = tl.where(first < extent.key_length, tl.maximum(tl.cdiv(valid_end, META.block_m), begin), begin)
    full = end
    full_end = end
    if dense is None:
        full = tl.minimum(tl.cdiv(last_begin, META.block_m), end)
        full_end = tl.minimum(tl.minimum(first_end, last_end) // META.block_m, end)
        full_end = tl.maximum(full_end, full)
    return Tiles(begin, full, full_end, end)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _attention_backward_kv_kernel(
    q, k, v, bias, dense, classes, drop, captured, g, state, delta, dk, dv, mask, kv_heads, tiles, length_q, length_k, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = key_tile(tiles, kv_heads, mask, length_q, length_k)
    tile, kv_head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_n
    if first >= extent.keys:
        return
    keys = first + tl.arange(0, META.block_n)
    begin, end = query_interval(keys, extent, META.causal)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    k_tile, v_tile = load_keys(k_rows, v_rows, first, extent.key_length, META, True)
    shifted = with_shift(factors, extent.key_length, SCORE.log_n)
    dk_acc = tl.zeros([META.block_n, META.block_d], tl.float32)
    dv_acc = tl.zeros([META.block_n, META.block_dv], tl.float32)
    passes = _query_passes(first, extent, dense, META)
    for member in range(0, META.group):
        head = kv_head * META.group + member
        q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
        statistics = offset(entry * kv_heads * META.group + head, length_q) + work.start_q
        head_state = state
        if SCORE.normalised:
            head_state = state + 2 * statistics
        bias_keys = column_elements(bias, entry, head, work.start_q, work.start_k + keys)
        dense_keys = column_elements(dense, entry, head, work.start_q, work.start_k + keys)
        class_column = column_elements(classes, entry, head, tile * 0, tile)
        drawn = drawn_rows(
            drop, entry * kv_heads * META.group + head, tl.arange(0, META.block_m) * 0 + work.start_q, work.start_k + first
        )  # fmt: skip
        operands = _KeyGradients(
            k_tile, v_tile, q_rows, g_rows, head_state, delta + statistics, bias_keys, dense_keys, begin, end, extent.queries,
            shifted, drawn, placed(captured, entry, head, work.start_q, work.start_k + first),
        )  # fmt: skip
        dk_acc, dv_acc = over_tiles(
            (dk_acc, dv_acc), _key_tile_gradients, operands, passes, class_column, SCORE, META
        )
    count = extent.keys - first
    dk_rows, dv_rows = (
        place(dk, entry, kv_head, work.start_k + first),
        place(dv, entry, kv_head, work.start_k + first),
    )
    store_rows(dk_rows, count, dk_acc * factors.scale, META.head_dim, META.block_n, META.block_d)
    store_rows(dv_rows, count, dv_acc, META.v_dim, META.block_n, META.block_dv)


def row_products(p: Problem, grad_out, out, grad_lse=None, residual=None) -> torch.Tensor:
    """delta (B, H, Lq) float32: dO_i.O_i - dlse_i."""
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    values = {
        "g": rows(grad_out),
        "out": rows(_triton.last_dim_contiguous(out)),
        "residual": None if residual is None else rows(_triton.last_dim_contiguous(residual)),
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "delta": delta,
        "heads": p.heads,
        "length_q": p.length_q,
        "count": delta.numel(),
        "V_DIM": p.v_dim,
        "ROWS": 16,
        "BLOCK_DV": _triton.block(p.v_dim),
    }
    _triton.start(_attention_delta_kernel, (triton.cdiv(delta.numel(), 16),), values, num_warps=4)
    return delta


def refusal(grad_out, grad_lse, q, k, v, bias, *rest) -> str | None:
    return forward_refusal(q, k, v, bias, *rest[:-1]) or _triton.refusal(grad_out)


def configure(grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, *rest):
    return Problem.of(q, k, v, bias, sink, *rest[:-1]).choose("attention_backward")


def attention_backward(grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, *rest):
    *options, wanted = rest
    p = Problem.of(q, k, v, bias, sink, *options)
    return backward(p, grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, wanted)


def backward(p: Problem, grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, wanted: int):
    """Gradients of q, k, v, bias and sink of a call."""
    wants_bias, wants_sink = wanted & WANTS_BIAS, wanted & WANTS_SINK
    grad_out = _triton.last_dim_contiguous(grad_out)
    delta = state
    if p.score.normalised:
        delta = row_products(p, grad_out, out, grad_lse, residual if residual.numel() else None)
    dsink = q.new_empty(0)
    if wants_sink:  # the sink's value is 0, so its dO.v is 0
        dsink = (torch.exp(p.sink[None, :, None] - lse) * -delta).sum((0, 2)).to(sink.dtype)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    if dk.numel() == 0 or dq.numel() == 0:
        dq, dk, dv = (t.zero_() for t in (dq, dk, dv))
        return dq, dk, dv, torch.zeros_like(bias) if wants_bias else q.new_empty(0), dsink
    config = p.choose("attention_backward").values
    over_queries = turned(config)
    query_classes = p.tile_classes(over_queries["block_m"], over_queries["block_n"])
    more = {"g": rows(grad_out), "state": state.contiguous(), "delta": delta}
    classes = pairs(p.tile_classes(config["block_m"], config["block_n"]))
    gradients = {"dk": rows(dk), "dv": rows(dv)}
    p.launch(_attention_backward_kv_kernel, config, over="keys", classes=classes, **gradients, **more)
    query_classes = pairs(query_classes)
    p.launch(
        _attention_backward_q_kernel, over_queries, over="queries", classes=query_classes, dq=rows(dq), **more
    )
    dbias = q.new_empty(0)
    if wants_bias:
        dbias = bias_gradient(p, bias, config, grad_lse, **more)
    return dq, dk, dv, dbias, dsink
