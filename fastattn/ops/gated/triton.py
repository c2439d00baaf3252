"""Gated attention in Triton: softmax attention whose distant scores are gated by sigmoid(sharpness * a_i.a_j)."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning
from ...runtime.triton import LOG2E, Line, dot, load_tile, offset, rows
from ..attention.scores_triton import sigmoid_derivative, sigmoid_weight, softplus_weight
from ..attention.triton_backward import along_columns, along_rows, row_products, score_gradient
from ..attention.triton_problem import Problem, turned
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import (
    allowed_pairs,
    column_elements,
    finish,
    fold,
    key_tile,
    key_tiles,
    load_keys,
    load_queries,
    load_statistics,
    place,
    query_intervals,
    query_tile,
    query_tiles,
    row_elements,
    store_rows,
    store_state,
    two_products,
)
from . import tuning_triton  # noqa: F401  declares what is looked up

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _load_assignments(line, start, first, count, BLOCK: tl.constexpr, META: tl.constexpr):
    """(BLOCK, G): the assignments, shared by all heads, from token `first` on of a sequence of `count` tokens that begins at `start`."""
    base = line.base + offset(start + first, line.stride)
    return load_tile(base, line.stride, count - first, META.groups, BLOCK, META.block_g, True)


@triton.jit
def _far(row, keys, extent, near, prefix_lengths):
    """Which pairs are gated. Without a prefix no key after the query is attended, so the signed distance suffices."""
    distance = row + extent.shift - keys
    if prefix_lengths is not None:
        distance = tl.abs(distance)
    return distance > near


@triton.jit
def _gated_scores(s2, agreement, sharpness, far, LOG_GATE: tl.constexpr):
    """(gated scores in base 2; their derivative with respect to the product, and to sharpness * agreement)."""
    x2 = agreement * sharpness * _LOG2E
    gate = sigmoid_weight(x2)
    if LOG_GATE:
        # d log g / dx = 1 - g, and log g = -softplus(-x)
        gated = tl.where(far, s2 - softplus_weight(-x2) * _LOG2E, s2)
        return gated, tl.where(far, 1.0, 1.0), tl.where(far, sigmoid_weight(-x2), 0.0)
    slope = tl.where(far, s2 / _LOG2E * sigmoid_derivative(x2, gate), 0.0)
    return tl.where(far, s2 * gate, s2), tl.where(far, gate, 1.0), slope


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _gated_forward_kernel(
    q, k, v, a, sharpness, dense, out, lse, state, mask, heads, tiles, length_q, length_k, near, factors, SCORE: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    head, entry, extent = work.head, work.entry, work.extent
    first = work.tile * META.block_m
    count = extent.queries
    if first >= count:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    kv_head = head // META.group
    q_rows = place(q, entry, head, work.start_q + first)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    a_rows = Line(a.base + offset(entry, a.batch), a.row)
    dense_rows = row_elements(dense, entry, head, work.start_q + row, work.start_k)
    q_tile = load_tile(
        q_rows.base, q_rows.stride, count - first, META.head_dim, META.block_m, META.block_d, True
    )
    a_tile = _load_assignments(a_rows, work.start_q, first, count, META.block_m, META)
    sharp = tl.load(sharpness)
    zero = tl.zeros([META.block_m, META.block_n], tl.float32)
    acc = tl.zeros([META.block_m, META.block_dv], tl.float32)
    top = tl.full([META.block_m], float("-inf"), tl.float32)
    total = tl.zeros([META.block_m], tl.float32)
    tile_begin, tile_end = key_tiles(edges, META.block_n)
    for tile in range(tile_begin, tile_end):
        key = tile * META.block_n
        keys = key + tl.arange(0, META.block_n)
        k_tile, v_tile = load_keys(k_rows, v_rows, key, extent.key_length, META, True)
        b_tile = _load_assignments(a_rows, work.start_k, key, extent.key_length, META.block_n, META)
        s = dot(q_tile, tl.trans(k_tile), zero, META.precision)
        agreement = dot(a_tile, tl.trans(b_tile), zero, META.gate_precision)
        far = _far(row[:, None], keys[None, :], extent, near, mask.prefix_lengths)
        s2, _, _ = _gated_scores(s * factors.scale2, agreement, sharp, far, META.log_gate)
        allowed = allowed_pairs(keys, begin, end, dense_rows)
        acc, top, total = fold((acc, top, total), s2, allowed, v_tile, 1.0, SCORE, True, META.precision)
    acc, log_sum_exp, top, log_sum = finish(acc, top, total, 1.0, 0.0, True)
    out_rows = place(out, entry, head, work.start_q + first)
    store_rows(out_rows, count - first, acc, META.v_dim, META.block_m, META.block_dv)
    statistics = offset(entry * heads + head, length_q) + work.start_q + row
    store_state(state, statistics, top, log_sum, row < count)
    tl.store(lse + statistics, log_sum_exp, mask=row < count)


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _gated_backward_q_kernel(
    q, k, v, g, a, sharpness, dense, state, delta, dq, da, dsharp, mask, heads, tiles, length_q, length_k, near, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    head, entry, extent = work.head, work.entry, work.extent
    first = work.tile * META.block_m
    count = extent.queries
    if first >= count:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    kv_head = head // META.group
    q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    a_rows = Line(a.base + offset(entry, a.batch), a.row)
    dense_rows = row_elements(dense, entry, head, work.start_q + row, work.start_k)
    row_offset = offset(entry * heads + head, length_q) + work.start_q + row
    q_tile, g_tile = load_queries(q_rows, g_rows, first, count, META, True)
    a_tile = _load_assignments(a_rows, work.start_q, first, count, META.block_m, META)
    statistics = load_statistics(state, delta, row_offset, row < count)
    sharp = tl.load(sharpness)
    zero = tl.zeros([META.block_m, META.block_n], tl.float32)
    acc = tl.zeros([META.block_m, META.block_d], tl.float32)
    acc_a = tl.zeros([META.block_m, META.block_g], tl.float32)
    acc_sharp = tl.zeros([META.block_m], tl.float32)
    tile_begin, tile_end = key_tiles(edges, META.block_n)
    for tile in range(tile_begin, tile_end):
        key = tile * META.block_n
        keys = key + tl.arange(0, META.block_n)
        k_tile, v_tile = load_keys(k_rows, v_rows, key, extent.key_length, META, True)
        b_tile = _load_assignments(a_rows, work.start_k, key, extent.key_length, META.block_n, META)
        s, dp = two_products(q_tile, k_tile, g_tile, v_tile, META.precision)
        agreement = dot(a_tile, tl.trans(b_tile), zero, META.gate_precision)
        far = _far(row[:, None], keys[None, :], extent, near, mask.prefix_lengths)
        s2, slope, slope_gate = _gated_scores(s * factors.scale2, agreement, sharp, far, META.log_gate)
        allowed = allowed_pairs(keys, begin, end, dense_rows)
        _, ds = score_gradient(s2, dp, along_rows(statistics), allowed, 1.0, SCORE, True)
        acc = dot((ds * slope).to(k_tile.dtype), k_tile, acc, META.precision)
        dx = ds * slope_gate
        acc_a = dot(dx, b_tile, acc_a, META.gate_precision)
        acc_sharp += tl.sum(dx * agreement, 1)
    dq_rows, da_rows = (
        place(dq, entry, head, work.start_q + first),
        place(da, entry, head, work.start_q + first),
    )
    store_rows(dq_rows, count - first, acc * factors.scale, META.head_dim, META.block_m, META.block_d)
    store_rows(da_rows, count - first, acc_a * sharp, META.groups, META.block_m, META.block_g)
    tl.store(dsharp + row_offset, acc_sharp, mask=row < count)


@triton.jit(do_not_specialize=["length_q", "length_k", "near"])
def _gated_backward_kv_kernel(
    q, k, v, g, a, sharpness, dense, state, delta, dk, dv, da, mask, kv_heads, tiles, length_q, length_k, near, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = key_tile(tiles, kv_heads, mask, length_q, length_k)
    kv_head, entry, extent = work.head, work.entry, work.extent
    first = work.tile * META.block_n
    if first >= extent.keys:
        return
    keys, low, high, tile_begin, tile_end = query_tiles(first, extent, META)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    a_rows = Line(a.base + offset(entry, a.batch), a.row)
    k_tile, v_tile = load_keys(k_rows, v_rows, first, extent.key_length, META, True)
    b_tile = _load_assignments(a_rows, work.start_k, first, extent.key_length, META.block_n, META)
    sharp = tl.load(sharpness)
    zero = tl.zeros([META.block_n, META.block_m], tl.float32)
    dk_acc = tl.zeros([META.block_n, META.block_d], tl.float32)
    dv_acc = tl.zeros([META.block_n, META.block_dv], tl.float32)
    da_acc = tl.zeros([META.block_n, META.block_g], tl.float32)
    for member in range(0, META.group):
        head = kv_head * META.group + member
        q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
        row_offset = offset(entry * kv_heads * META.group + head, length_q) + work.start_q
        dense_keys = column_elements(dense, entry, head, work.start_q, work.start_k + keys)
        for tile in range(tile_begin, tile_end):
            first_row = tile * META.block_m
            row = first_row + tl.arange(0, META.block_m)
            inside = row < extent.queries
            q_tile, g_tile = load_queries(q_rows, g_rows, first_row, extent.queries, META, True)
            a_tile = _load_assignments(a_rows, work.start_q, first_row, extent.queries, META.block_m, META)
            statistics = load_statistics(state, delta, row_offset + row, inside)
            allowed = allowed_pairs(row, low, high, dense_keys)
            s, dp = two_products(k_tile, q_tile, v_tile, g_tile, META.precision)  # (N, M)
            agreement = dot(b_tile, tl.trans(a_tile), zero, META.gate_precision)
            far = _far(row[None, :], keys[:, None], extent, near, mask.prefix_lengths)
            s2, slope, slope_gate = _gated_scores(s * factors.scale2, agreement, sharp, far, META.log_gate)
            weight, ds = score_gradient(s2, dp, along_columns(statistics), allowed, 1.0, SCORE, True)
            dv_acc = dot(weight.to(g_tile.dtype), g_tile, dv_acc, META.precision)
            dk_acc = dot((ds * slope).to(q_tile.dtype), q_tile, dk_acc, META.precision)
            da_acc = dot(ds * slope_gate, a_tile, da_acc, META.gate_precision)
    count = extent.keys - first
    dk_rows = place(dk, entry, kv_head, work.start_k + first)
    dv_rows = place(dv, entry, kv_head, work.start_k + first)
    da_rows = place(da, entry, kv_head, work.start_k + first)
    store_rows(dk_rows, count, dk_acc * factors.scale, META.head_dim, META.block_n, META.block_d)
    store_rows(dv_rows, count, dv_acc, META.v_dim, META.block_n, META.block_dv)
    store_rows(da_rows, count, da_acc * sharp, META.groups, META.block_n, META.block_g)


def _problem(q, k, v, scale, mask) -> Problem:
    return Problem(q, k, v, None, 0, scale, 0.0, mask)


def _gate_values(assignment, sharpness, window: int, gate: int) -> dict:
    """The values of a launch besides those of an attention call."""
    return {
        "a": rows(assignment.float().contiguous()[:, None]),
        "sharpness": sharpness.float(),
        "near": min(window, _triton.LONGEST),
        "meta": {
            "log_gate": gate == 1,
            "groups": assignment.shape[2],
            "block_g": _triton.block(assignment.shape[2]),
            "gate_precision": _triton.precision(torch.float32),
        },
    }


def refusal(q, k, v, assignment, sharpness, window, gate, scale, mask) -> str | None:
    if assignment.shape[2] > 64:
        return f"it serves at most 64 groups, not {assignment.shape[2]}"
    return attention_refusal(q, k, v, None, mask) or _triton.refusal(assignment, sharpness)


def refusal_backward(
    grad_out, grad_lse, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
) -> str | None:
    return refusal(q, k, v, assignment, sharpness, window, gate, scale, mask) or _triton.refusal(grad_out)


def configure(q, k, v, assignment, sharpness, window, gate, scale, mask) -> tuning.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention")


def configure_backward(
    grad_out, grad_lse, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
) -> tuning.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention_backward")


def gated_attention(q, k, v, assignment, sharpness, window, gate, scale, mask):
    p = _problem(q, k, v, scale, mask)
    out, (lse, state) = p.output(*q.shape[:3], p.v_dim), p.statistics()
    if out.numel():
        config = p.choose("gated_attention").values
        more = {"out": rows(out), "lse": lse, "state": state} | _gate_values(
            assignment, sharpness, window, gate
        )
        p.launch(_gated_forward_kernel, config, over="queries", **more)
    return out, lse, state


def gated_attention_backward(
    grad_out, grad_lse, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
):
    p = _problem(q, k, v, scale, mask)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    if not dq.numel() or not dk.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), torch.zeros_like(assignment), torch.zeros_like(sharpness)
    config = p.choose("gated_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    groups = assignment.shape[2]
    by_query, by_key = (p.output(*t.shape[:3], groups, dtype=torch.float32) for t in (q, k))
    dsharp = p.output(*q.shape[:3], dtype=torch.float32)
    more = _gate_values(assignment, sharpness, window, gate)
    more |= {
        "g": rows(grad_out),
        "state": state.contiguous(),
        "delta": row_products(p, grad_out, out, grad_lse),
    }
    by_row = {"dq": rows(dq), "da": rows(by_query), "dsharp": dsharp}
    p.launch(_gated_backward_q_kernel, turned(config), over="queries", **by_row, **more)
    by_column = {"dk": rows(dk), "dv": rows(dv), "da": rows(by_key)}
    p.launch(_gated_backward_kv_kernel, config, over="keys", **by_column, **more)
    grad_assignment = (by_query.sum(1) + by_key.sum(1)).to(assignment.dtype)
    return dq, dk, dv, grad_assignment, dsharp.sum(dtype=torch.float64).to(sharpness.dtype)
