"""Backward of tiled attention in Triton: dK and dV with keys outside, dQ with queries outside. No atomics, so repeatable."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import LOG2E, dot, offset, store_tile
from .scores_triton import softmax_derivative, softmax_weight
from .triton_classes import tile_classes
from .triton_problem import Problem, turned
from .triton_problem import refusal as forward_refusal
from .triton_tiles import (
    allowed_pairs,
    exponent_of,
    key_tile,
    key_tiles,
    load_statistics,
    load_two,
    next_attended,
    place,
    place_two,
    query_interval,
    query_intervals,
    query_tile,
    row_pointers,
    score_shift,
    store_two,
    tile_scores,
    two_products,
    whole_tiles,
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
    s, dp, top, log_sum, delta, allowed, scale2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(weights P, dS) of scores as `tile_scores` gives them; top, log_sum and delta broadcast along the rows' dim."""
    if SHIFTED:
        # products may be rounded another way than the forward's, and of 1e9 the last bit is 64
        s = tl.minimum(s - top, 0.0, propagate_nan=tl.PropagateNan.ALL) * scale2 - log_sum * _LOG2E
    weight = WEIGHT(s)
    slope = DERIVATIVE(s, weight)
    if NORMALISED and not SHIFTED:
        inverse = tl.where(log_sum == float("-inf"), 0.0, tl.exp2(-log_sum * _LOG2E))
        weight = weight * inverse
        slope = slope * inverse
    if MASKED:
        weight = tl.where(allowed, weight, 0.0)
        slope = tl.where(allowed, slope, 0.0)
    if NORMALISED:
        dp = dp - delta
    return weight, slope * dp


@triton.jit
def _weights_and_gradients(
    products, dp, top, log_sum, delta, allowed, bias_rows, bias_stride, columns, end, count, size, scale2, shift2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(weights P, dS) of products q.k."""
    s = tile_scores(products, bias_rows, bias_stride, columns, end, count, size, scale2, shift2, SHIFTED)
    weight, ds = score_gradient(
        s, dp, top, log_sum, delta, allowed, scale2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED, MASKED
    )
    if NORMALISED and not SHIFTED:
        limited = top > float("-inf")  # rows of `or_limit`
        if tl.max(tl.max(limited.to(tl.int32), 1), 0) > 0:
            s = tile_scores(products, bias_rows, bias_stride, columns, end, count, size, scale2, shift2, True)
            limit_weight, limit_ds = score_gradient(
                s, dp, tl.where(limited, top, 0.0), log_sum, delta, allowed, exponent_of(bias_rows, scale2),
                softmax_weight, softmax_derivative, True, True, MASKED,
            )  # fmt: skip
            weight = tl.where(limited, limit_weight, weight)
            ds = tl.where(limited, limit_ds, ds)
    return weight, ds


@triton.jit
def _query_tile_gradient(
    dq, q_tile, g_tile, top, log_sum, delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, ds_rows,
    begin, end, tile, count, size, scale2, shift2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, of `count`, added to a query tile's gradient (M, D)."""
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k_tile, v_tile = load_two(
        k_base, k_l, v_base, v_l, first, count, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, MASKED
    )
    products, dp = two_products(q_tile, k_tile, g_tile, v_tile, PRECISION)  # (M, N)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(keys, begin, end, dense_rows, dense_k)
    _, ds = _weights_and_gradients(
        products, dp, top[:, None], log_sum[:, None], delta[:, None], allowed, bias_rows, bias_k, keys, end, count,
        size, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED, MASKED,
    )  # fmt: skip
    if ds_rows is not None:
        inside = (end > 0)[:, None] & (keys < count)[None, :]
        tl.store(ds_rows[:, None] + keys[None, :], ds, mask=inside)
    return dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_backward_q_kernel(
    q, k, v, bias, dense, classes, g, state, delta, dq, ds,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dq_b, dq_h, dq_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    heads, tiles, length_q, length_k, window_left, window_right, scale, size, scale2, bias2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    LOG_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, _lk, extent = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, edges = query_intervals(first, extent, CAUSAL, BLOCK_M)
    q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    bias_rows = row_pointers(bias, entry, bias_b, head, bias_h, start_q + rows, bias_q, start_k, bias_k)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    class_row = row_pointers(classes, entry, classes_b, head, classes_h, tile, classes_q, tile * 0, 0)
    ds_rows = None
    if ds is not None:
        ds_rows = ds + offset(statistics, length_k) + start_k

    q_tile, g_tile = load_two(
        q_base, q_l, g_base, g_l, first, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True
    )
    row_top = tl.zeros([BLOCK_M], tl.float32)
    row_sum = row_top
    row_delta = row_top
    if NORMALISED:
        row_top, row_sum, row_delta = load_statistics(state, delta, statistics, rows < lq)
    shift2 = score_shift(bias2, extent[3], LOG_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    full = tile_end
    full_end = tile_end
    if dense is None:
        full, full_end = whole_tiles(edges, tile_begin, tile_end, BLOCK_N)
        for at in range(full, full_end):
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_top, row_sum, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                dense_k, ds_rows, begin, end, at, extent[3], size, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, PRECISION,
            )  # fmt: skip
    left = full - tile_begin
    if class_row is None:
        for step in range(0, left + (tile_end - full_end)):
            at = tl.where(step < left, tile_begin + step, full_end + step - left)
            acc = _query_tile_gradient(
                acc, q_tile, g_tile, row_top, row_sum, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                dense_k, ds_rows, begin, end, at, extent[3], size, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, PRECISION,
            )  # fmt: skip
    else:
        here, past = next_attended(class_row, 1, tile_begin, tile_end)
        while here < tile_end:
            for at in range(here, past):
                acc = _query_tile_gradient(
                    acc, q_tile, g_tile, row_top, row_sum, row_delta, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows,
                    dense_k, ds_rows, begin, end, at, extent[3], size, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED,
                    HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, PRECISION,
                )  # fmt: skip
            here, past = next_attended(class_row, 1, past, tile_end)
    dq_base = place(dq, entry, dq_b, head, dq_h, start_q + first, dq_l)
    store_tile(dq_base, dq_l, lq - first, acc * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _key_tile_gradient(
    dk, dv, k_tile, v_tile, q_base, g_base, q_l, g_l, state, delta, bias_keys, bias_q, dense_keys, dense_q,
    begin, end, tile, lq, size, scale2, shift2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to a key tile's gradients (N, D) and (N, Dv)."""
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_tile, g_tile = load_two(
        q_base, q_l, g_base, g_l, first, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, MASKED
    )
    row_top = tl.zeros([BLOCK_M], tl.float32)
    row_sum = row_top
    row_delta = row_top
    if NORMALISED:
        row_top, row_sum, row_delta = load_statistics(state, delta, rows, rows < lq)
    products, dp = two_products(k_tile, q_tile, v_tile, g_tile, PRECISION)  # (N, M)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(rows, begin, end, dense_keys, dense_q)
    weight, ds = _weights_and_gradients(
        products, dp, row_top[None, :], row_sum[None, :], row_delta[None, :], allowed, bias_keys, bias_q, rows, end,
        lq, size, scale2, shift2, WEIGHT, DERIVATIVE, SHIFTED, NORMALISED, MASKED,
    )  # fmt: skip
    dv = dot(weight.to(g_tile.dtype), g_tile, dv, PRECISION)
    dk = dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_backward_kv_kernel(
    q, k, v, bias, dense, classes, g, state, delta, dk, dv,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    kv_heads, tiles, length_q, length_k, window_left, window_right, scale, size, scale2, bias2,
    WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr,
    LOG_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, entry, start_q, start_k, lq, lk, extent = key_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left,
        window_right,
    )  # fmt: skip
    first = tile * BLOCK_N
    if first >= lk:
        return
    keys = first + tl.arange(0, BLOCK_N)
    begin, end = query_interval(keys, extent, CAUSAL)
    last = tl.minimum(first + BLOCK_N, lk) - 1
    first_begin, first_end = query_interval(first, extent, CAUSAL)
    last_begin, last_end = query_interval(last, extent, CAUSAL)
    # The last key attended ends its queries, which padding keys after it do not have.
    valid = tl.minimum(last, extent[3] - 1)
    _, valid_end = query_interval(valid, extent, CAUSAL)

    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, kv_head, start_k)
    k_tile, v_tile = load_two(
        k_base, k_l, v_base, v_l, first, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
    )
    shift2 = score_shift(bias2, extent[3], LOG_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Query tiles [full, full_end) need no test of their elements; those on either side do.
    tile_begin = first_begin // BLOCK_M
    tile_end = tl.where(first < extent[3], tl.maximum(tl.cdiv(valid_end, BLOCK_M), tile_begin), tile_begin)
    full = tile_end
    full_end = tile_end
    if dense is None:
        full = tl.minimum(tl.cdiv(last_begin, BLOCK_M), tile_end)
        full_end = tl.minimum(tl.minimum(first_end, last_end) // BLOCK_M, tile_end)
        full_end = tl.maximum(full_end, full)
    left = full - tile_begin
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
        statistics = offset(entry * kv_heads * GROUP + head, length_q) + start_q
        head_state = state
        if NORMALISED:
            head_state = state + 2 * statistics
        bias_keys = row_pointers(bias, entry, bias_b, head, bias_h, start_q, bias_q, start_k + keys, bias_k)
        dense_keys = row_pointers(
            dense, entry, dense_b, head, dense_h, start_q, dense_q, start_k + keys, dense_k
        )
        class_column = row_pointers(classes, entry, classes_b, head, classes_h, tile * 0, classes_q, tile, 1)
        if dense is None:
            for at in range(full, full_end):
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, head_state, delta + statistics,
                    bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, size, scale2, shift2, WEIGHT, DERIVATIVE,
                    SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, False, PRECISION,
                )  # fmt: skip
        if class_column is None:
            for step in range(0, left + (tile_end - full_end)):
                at = tl.where(step < left, tile_begin + step, full_end + step - left)
                dk_acc, dv_acc = _key_tile_gradient(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, head_state, delta + statistics,
                    bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, size, scale2, shift2, WEIGHT, DERIVATIVE,
                    SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, PRECISION,
                )  # fmt: skip
        else:
            here, past = next_attended(class_column, classes_q, tile_begin, tile_end)
            while here < tile_end:
                for at in range(here, past):
                    dk_acc, dv_acc = _key_tile_gradient(
                        dk_acc, dv_acc, k_tile, v_tile, q_base, g_base, q_l, g_l, head_state, delta + statistics,
                        bias_keys, bias_q, dense_keys, dense_q, begin, end, at, lq, size, scale2, shift2, WEIGHT, DERIVATIVE,
                        SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True, PRECISION,
                    )  # fmt: skip
                here, past = next_attended(class_column, classes_q, past, tile_end)
    store_two(
        dk, dk_b, dk_h, dk_l, dk_acc * scale, dv, dv_b, dv_h, dv_l, dv_acc, entry, kv_head, start_k + first, lk - first,
        HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip


def row_products(p: Problem, grad_out, out, grad_lse=None) -> torch.Tensor:
    """delta (B, H, Lq) float32: dO_i.O_i - dlse_i."""
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    values = p.values() | {
        "g": grad_out,
        "out": _triton.last_dim_contiguous(out),
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "delta": delta,
        "count": delta.numel(),
        "ROWS": 16,
    }
    _triton.start(_attention_delta_kernel, (triton.cdiv(delta.numel(), 16),), values, num_warps=4)
    return delta


def refusal(grad_out, grad_lse, q, k, v, bias, out, lse, state, bias_grad, *options) -> str | None:
    return forward_refusal(q, k, v, bias, *options) or _triton.refusal(grad_out)


def configure(grad_out, grad_lse, q, k, v, bias, out, lse, state, bias_grad, *options):
    return Problem(q, k, v, bias, *options).choose("attention_backward")


def attention_backward(grad_out, grad_lse, q, k, v, bias, out, lse, state, bias_grad, *options):
    p = Problem(q, k, v, bias, *options)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    scores = (p.batch, p.heads, p.length_q, p.length_k)
    ds = q.new_zeros(scores, dtype=torch.float32) if bias_grad else None
    if dk.numel() == 0 or dq.numel() == 0:
        dq, dk, dv = (t.zero_() for t in (dq, dk, dv))
        return dq, dk, dv, q.new_empty(0) if ds is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    config = p.choose("attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    over_queries = turned(config)
    query_classes = tile_classes(p, over_queries["block_m"], over_queries["block_n"])
    more = {"g": grad_out, "state": state.contiguous(), "delta": state}
    if p.score.normalised:
        more["delta"] = row_products(p, grad_out, out, grad_lse)
    classes = tile_classes(p, config["block_m"], config["block_n"])
    p.launch(_attention_backward_kv_kernel, config, over="keys", classes=classes, dk=dk, dv=dv, **more)
    p.launch(
        _attention_backward_q_kernel,
        over_queries,
        over="queries",
        classes=query_classes,
        dq=dq,
        ds=ds,
        **more,
    )
    dbias = q.new_empty(0) if ds is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias
