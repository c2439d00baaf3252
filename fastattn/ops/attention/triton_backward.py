"""Backward of tiled attention in Triton: dK and dV with keys outside, dQ with queries outside. No atomics, so repeatable."""

import torch
import triton
import triton.language as tl

from ... import _triton
from ..._triton import LOG2E, dot, load_tile, offset, store_tile
from .triton_classes import tile_classes
from .triton_problem import Problem
from .triton_problem import refusal as forward_refusal
from .triton_tiles import (
    key_tile,
    place,
    query_interval,
    query_intervals,
    query_tile,
    row_pointers,
    score_shift,
)

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _attention_delta_kernel(
    g, out, grad_lse, delta, g_b, g_h, g_l, out_b, out_h, out_l, heads, length_q, count,
    V_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta_i = dO_i.O_i - dlse_i over rows of (B, H, Lq)."""
    rows = offset(tl.program_id(0), ROWS) + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_DV)
    inside = rows < count
    batch, head, row = rows // length_q // heads, (rows // length_q) % heads, rows % length_q
    keep = inside[:, None] & (columns < V_DIM)[None, :]
    g_rows = place(g, batch, g_b, head, g_h, row, g_l)
    out_rows = place(out, batch, out_b, head, out_h, row, out_l)
    g_tile = tl.load(g_rows[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    out_tile = tl.load(out_rows[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    value = tl.sum(g_tile * out_tile, 1)
    if grad_lse is not None:
        value -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    tl.store(delta + rows, value, mask=inside)


@triton.jit
def score_gradient(
    s, dp, lse, delta, allowed,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(weights P, dS) of scores in base 2; lse in base e and delta broadcast along the rows' dim."""
    if SHIFTED:
        s = s - tl.where(lse == float("-inf"), 0.0, lse * _LOG2E)
    weight = WEIGHT(s)
    slope = DERIVATIVE(s, weight)
    if NORMALISED and not SHIFTED:
        inverse = tl.where(lse == float("-inf"), 0.0, tl.exp2(-lse * _LOG2E))
        weight = weight * inverse
        slope = slope * inverse
    if MASKED:
        weight = tl.where(allowed, weight, 0.0)
        slope = tl.where(allowed, slope, 0.0)
    if NORMALISED:
        dp = dp - delta
    return weight, slope * dp


@triton.jit
def _query_tile_gradient(
    dq, q_tile, g_tile, lse, delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, ds_rows,
    begin, end, tile, lk, scale2, shift2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to a query tile's gradient (M, D)."""
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_base + offset(first, k_l), k_l, lk - first, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    v_tile = load_tile(v_base + offset(first, v_l), v_l, lk - first, V_DIM, BLOCK_N, BLOCK_DV, MASKED)
    zero = tl.zeros([begin.shape[0], BLOCK_N], tl.float32)
    s = dot(q_tile, tl.trans(k_tile), zero, PRECISION) * scale2 + shift2  # (M, N)
    if bias_rows is not None:
        at = bias_rows[:, None] + offset(keys, bias_k)[None, :]
        inside = (end > 0)[:, None] & (keys < lk)[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    allowed = None
    if MASKED:
        allowed = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        if dense_rows is not None:
            at = dense_rows[:, None] + offset(keys, dense_k)[None, :]
            allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
    dp = dot(g_tile, tl.trans(v_tile), zero, PRECISION)
    _, ds = score_gradient(
        s, dp, lse[:, None], delta[:, None], allowed, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED, MASKED
    )
    if ds_rows is not None:
        inside = (end > 0)[:, None] & (keys < lk)[None, :]
        tl.store(ds_rows[:, None] + keys[None, :], ds, mask=inside)
    return dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_backward_q_kernel(
    q, k, v, bias, dense, classes, g, lse, delta, dq, ds,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dq_b, dq_h, dq_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    heads, tiles, length_q, length_k, window_left, window_right, scale, scale2, bias2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    LOG_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, lk, prefix, key_length = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, first_begin, first_end, last_begin, last_end = query_intervals(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL, BLOCK_M
    )
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    g_base = place(g, entry, g_b, head, g_h, start_q + first, g_l)
    k_base = place(k, entry, k_b, head // GROUP, k_h, start_k, k_l)
    v_base = place(v, entry, v_b, head // GROUP, v_h, start_k, v_l)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    bias_rows = row_pointers(bias, entry, bias_b, head, bias_h, start_q + rows, bias_q, start_k, bias_k)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    class_row = row_pointers(classes, entry, classes_b, head, classes_h, tile, classes_q, tile * 0, 0)
    ds_rows = None
    if ds is not None:
        ds_rows = ds + offset(statistics, length_k) + start_k

    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    g_tile = load_tile(g_base, g_l, lq - first, V_DIM, BLOCK_M, BLOCK_DV, True)
    row_lse = tl.zeros([BLOCK_M], tl.float32)
    row_delta = row_lse
    if NORMALISED:
        row_lse = tl.load(lse + statistics, mask=rows < lq, other=0.0)
        row_delta = tl.load(delta + statistics, mask=rows < lq, other=0.0)
    shift2 = score_shift(bias2, key_length, LOG_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Tiles [full, full_end) need no test of their elements; those on either side do.
    tile_begin = first_begin // BLOCK_N
    tile_end = tl.maximum(tl.cdiv(last_end, BLOCK_N), tile_begin)
    full = tile_end
    full_end = tile_end
    if dense is None:
        full = tl.minimum(tl.cdiv(last_begin, BLOCK_N), tile_end)
        full_end = tl.maximum(tl.minimum(tl.maximum(first_end, 0) // BLOCK_N, tile_end), full)
        for at in range(full, full_end):
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_lse, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                dense_k, ds_rows, begin, end, at, lk, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, PRECISION,
            )  # fmt: skip
    left = full - tile_begin
    for step in range(0, left + (tile_end - full_end)):
        at = tl.where(step < left, tile_begin + step, full_end + step - left)
        if class_row is None:
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_lse, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                dense_k, ds_rows, begin, end, at, lk, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, PRECISION,
            )  # fmt: skip
        elif tl.load(class_row + at) != 0:
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_lse, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                dense_k, ds_rows, begin, end, at, lk, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, PRECISION,
            )  # fmt: skip
    dq_base = place(dq, entry, dq_b, head, dq_h, start_q + first, dq_l)
    store_tile(dq_base, dq_l, lq - first, acc * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _key_tile_gradient(
    dk, dv, k_tile, v_tile, q_base, g_base, q_l, g_l, lse, delta, bias_keys, bias_q, dense_keys, dense_q,
    begin, end, tile, lq, scale2, shift2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to a key tile's gradients (N, D) and (N, Dv)."""
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_base + offset(first, q_l), q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, MASKED)
    g_tile = load_tile(g_base + offset(first, g_l), g_l, lq - first, V_DIM, BLOCK_M, BLOCK_DV, MASKED)
    row_lse = tl.zeros([BLOCK_M], tl.float32)
    row_delta = row_lse
    if NORMALISED:
        row_lse = tl.load(lse + rows, mask=rows < lq, other=0.0)
        row_delta = tl.load(delta + rows, mask=rows < lq, other=0.0)
    zero = tl.zeros([begin.shape[0], BLOCK_M], tl.float32)
    s = dot(k_tile, tl.trans(q_tile), zero, PRECISION) * scale2 + shift2  # (N, M)
    if bias_keys is not None:
        at = bias_keys[:, None] + offset(rows, bias_q)[None, :]
        inside = (end > 0)[:, None] & (rows < lq)[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    allowed = None
    if MASKED:
        allowed = (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])
        if dense_keys is not None:
            at = dense_keys[:, None] + offset(rows, dense_q)[None, :]
            allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
    dp = dot(v_tile, tl.trans(g_tile), zero, PRECISION)
    weight, ds = score_gradient(
        s, dp, row_lse[None, :], row_delta[None, :], allowed, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED, MASKED
    )
    dv = dot(weight.to(g_tile.dtype), g_tile, dv, PRECISION)
    dk = dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_backward_kv_kernel(
    q, k, v, bias, dense, classes, g, lse, delta, dk, dv,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    kv_heads, tiles, length_q, length_k, window_left, window_right, scale, scale2, bias2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    LOG_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, entry, start_q, start_k, lq, lk, prefix, key_length = key_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_N
    if first >= lk:
        return
    keys = first + tl.arange(0, BLOCK_N)
    begin, end = query_interval(keys, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    last = tl.minimum(first + BLOCK_N, lk) - 1
    first_begin, first_end = query_interval(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL
    )
    last_begin, last_end = query_interval(last, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    # The last key attended ends its queries, which padding keys after it do not have.
    valid = tl.minimum(last, key_length - 1)
    _, valid_end = query_interval(valid, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)

    k_base = place(k, entry, k_b, kv_head, k_h, start_k + first, k_l)
    v_base = place(v, entry, v_b, kv_head, v_h, start_k + first, v_l)
    k_tile = load_tile(k_base, k_l, lk - first, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v_base, v_l, lk - first, V_DIM, BLOCK_N, BLOCK_DV, True)
    shift2 = score_shift(bias2, key_length, LOG_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Query tiles [full, full_end) need no test of their elements; those on either side do.
    tile_begin = first_begin // BLOCK_M
    tile_end = tl.where(first < key_length, tl.maximum(tl.cdiv(valid_end, BLOCK_M), tile_begin), tile_begin)
    full = tile_end
    full_end = tile_end
    if dense is None:
        full = tl.minimum(tl.cdiv(last_begin, BLOCK_M), tile_end)
        full_end = tl.minimum(tl.minimum(first_end, last_end) // BLOCK_M, tile_end)
        full_end = tl.maximum(full_end, full)
    left = full - tile_begin
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = place(q, entry, q_b, head, q_h, start_q, q_l)
        g_base = place(g, entry, g_b, head, g_h, start_q, g_l)
        statistics = offset(entry * kv_heads * GROUP + head, length_q) + start_q
        bias_keys = row_pointers(bias, entry, bias_b, head, bias_h, start_q, bias_q, start_k + keys, bias_k)
        dense_keys = row_pointers(
            dense, entry, dense_b, head, dense_h, start_q, dense_q, start_k + keys, dense_k
        )
        class_column = row_pointers(classes, entry, classes_b, head, classes_h, tile * 0, classes_q, tile, 1)
        if dense is None:
            for at in range(full, full_end):
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, lse + statistics, delta + statistics,
                    bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, scale2, shift2, WEIGHT, DERIVATIVE,
                    SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, False, PRECISION,
                )  # fmt: skip
        for step in range(0, left + (tile_end - full_end)):
            at = tl.where(step < left, tile_begin + step, full_end + step - left)
            if classes is None:
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, lse + statistics, delta + statistics,
                    bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, scale2, shift2, WEIGHT, DERIVATIVE,
                    SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, PRECISION,
                )  # fmt: skip
            elif tl.load(class_column + offset(at, classes_q)) != 0:
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, lse + statistics, delta + statistics,
                    bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, scale2, shift2, WEIGHT, DERIVATIVE,
                    SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, PRECISION,
                )  # fmt: skip
    dk_base = place(dk, entry, dk_b, kv_head, dk_h, start_k + first, dk_l)
    dv_base = place(dv, entry, dv_b, kv_head, dv_h, start_k + first, dv_l)
    store_tile(dk_base, dk_l, lk - first, dk_acc * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_base, dv_l, lk - first, dv_acc, V_DIM, BLOCK_N, BLOCK_DV)


def row_products(p: Problem, grad_out, out, lse, grad_lse=None) -> torch.Tensor:
    """delta (B, H, Lq) float32: dO_i.O_i - dlse_i."""
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    values = p.values() | {
        "g": grad_out,
        "out": _triton.last_dim_contiguous(out),
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "delta": delta,
        "count": lse.numel(),
        "ROWS": 16,
    }
    _triton.start(_attention_delta_kernel, (triton.cdiv(lse.numel(), 16),), values, num_warps=4)
    return delta


def refusal(grad_out, grad_lse, q, k, v, bias, out, lse, bias_grad, *options) -> str | None:
    return forward_refusal(q, k, v, bias, *options) or _triton.refusal(grad_out)


def configure(grad_out, grad_lse, q, k, v, bias, out, lse, bias_grad, *options):
    return Problem(q, k, v, bias, *options).choose("attention_backward")


def attention_backward(grad_out, grad_lse, q, k, v, bias, out, lse, bias_grad, *options):
    p = Problem(q, k, v, bias, *options)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    scores = (p.batch, p.heads, p.length_q, p.length_k)
    ds = q.new_zeros(scores, dtype=torch.float32) if bias_grad else None
    if dk.numel() == 0 or dq.numel() == 0:
        dq, dk, dv = (t.zero_() for t in (dq, dk, dv))
        return dq, dk, dv, q.new_empty(0) if ds is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    config = p.choose("attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    more = {
        "g": grad_out,
        "lse": lse,
        "delta": row_products(p, grad_out, out, lse, grad_lse) if p.score.normalised else lse,
        "classes": tile_classes(p, config["block_m"], config["block_n"]),
    }
    p.launch(_attention_backward_kv_kernel, config, over="keys", dk=dk, dv=dv, **more)
    p.launch(_attention_backward_q_kernel, config, over="queries", dq=dq, ds=ds, **more)
    dbias = q.new_empty(0) if ds is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias
