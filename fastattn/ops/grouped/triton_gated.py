"""Gated attention in Triton: softmax attention whose distant scores are gated by sigmoid(sharpness * a_i.a_j)."""

import torch
import triton
import triton.language as tl

from ... import _config, _triton
from ..._triton import LOG2E, dot, load_tile, offset, store_tile
from ..._triton_scores import sigmoid_derivative, sigmoid_weight, softplus_weight
from ..attention.triton_backward import row_products, score_gradient
from ..attention.triton_problem import Problem
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import (
    finish,
    fold,
    key_interval,
    key_tile,
    place,
    query_interval,
    query_intervals,
    query_tile,
    row_pointers,
)
from . import tuning_triton  # noqa: F401  declares what is looked up

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _gated_scores(s2, agreement, sharpness, far, LOG_GATE: tl.constexpr):
    """(gated scores, their slope in the product, their slope in sharpness * agreement): all in base 2."""
    x2 = agreement * sharpness * _LOG2E
    gate = sigmoid_weight(x2)
    if LOG_GATE:
        # d log g / dx = 1 - g, and log g = -softplus(-x)
        gated = tl.where(far, s2 - softplus_weight(-x2) * _LOG2E, s2)
        return gated, tl.where(far, 1.0, 1.0), tl.where(far, sigmoid_weight(-x2), 0.0)
    slope = tl.where(far, s2 / _LOG2E * sigmoid_derivative(x2, gate), 0.0)
    return tl.where(far, s2 * gate, s2), tl.where(far, gate, 1.0), slope


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _gated_forward_kernel(
    q, k, v, a, sharpness, dense, out, lse, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, a_b, a_l, out_b, out_h, out_l, dense_b, dense_h, dense_q, dense_k,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, lk, prefix, key_length = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, first_begin, _first_end, _last_begin, last_end = query_intervals(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL, BLOCK_M
    )
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    k_base = place(k, entry, k_b, head // GROUP, k_h, start_k, k_l)
    v_base = place(v, entry, v_b, head // GROUP, v_h, start_k, v_l)
    a_base = a + offset(entry, a_b)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    a_tile = load_tile(a_base + offset(start_q + first, a_l), a_l, lq - first, GROUPS, BLOCK_M, BLOCK_G, True)
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(first_begin // BLOCK_N, tl.cdiv(tl.maximum(last_end, 0), BLOCK_N)):
        key = at * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_base + offset(key, k_l), k_l, lk - key, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v_tile = load_tile(v_base + offset(key, v_l), v_l, lk - key, V_DIM, BLOCK_N, BLOCK_DV, True)
        b_tile = load_tile(a_base + offset(start_k + key, a_l), a_l, lk - key, GROUPS, BLOCK_N, BLOCK_G, True)
        s2 = dot(q_tile, tl.trans(k_tile), zero, PRECISION) * scale2
        agreement = dot(a_tile, tl.trans(b_tile), zero, GATE_PRECISION)
        far = rows[:, None] + (lk - lq) - keys[None, :] > near
        s2, _, _ = _gated_scores(s2, agreement, sharp, far, LOG_GATE)
        allowed = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        if dense_rows is not None:
            at_dense = dense_rows[:, None] + offset(keys, dense_k)[None, :]
            allowed = allowed & (tl.load(at_dense, mask=allowed, other=0) != 0)
        acc, top, total = fold(acc, top, total, s2, allowed, v_tile, WEIGHT, True, True, True, PRECISION)
    acc, row_lse = finish(acc, top, total, True, True)
    out_base = place(out, entry, out_b, head, out_h, start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    tl.store(lse + (offset(entry * heads + head, length_q) + start_q + rows), row_lse, mask=rows < lq)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _gated_backward_q_kernel(
    q, k, v, g, a, sharpness, dense, lse, delta, dq, da, dsharp,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, a_b, a_l, dq_b, dq_h, dq_l, da_b, da_h, da_l,
    dense_b, dense_h, dense_q, dense_k,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, lk, prefix, key_length = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, first_begin, _first_end, _last_begin, last_end = query_intervals(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL, BLOCK_M
    )
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    g_base = place(g, entry, g_b, head, g_h, start_q + first, g_l)
    k_base = place(k, entry, k_b, head // GROUP, k_h, start_k, k_l)
    v_base = place(v, entry, v_b, head // GROUP, v_h, start_k, v_l)
    a_base = a + offset(entry, a_b)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    g_tile = load_tile(g_base, g_l, lq - first, V_DIM, BLOCK_M, BLOCK_DV, True)
    a_tile = load_tile(a_base + offset(start_q + first, a_l), a_l, lq - first, GROUPS, BLOCK_M, BLOCK_G, True)
    row_lse = tl.load(lse + statistics, mask=rows < lq, other=0.0)
    row_delta = tl.load(delta + statistics, mask=rows < lq, other=0.0)
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_a = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    acc_sharp = tl.zeros([BLOCK_M], tl.float32)
    for at in range(first_begin // BLOCK_N, tl.cdiv(tl.maximum(last_end, 0), BLOCK_N)):
        key = at * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_base + offset(key, k_l), k_l, lk - key, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v_tile = load_tile(v_base + offset(key, v_l), v_l, lk - key, V_DIM, BLOCK_N, BLOCK_DV, True)
        b_tile = load_tile(a_base + offset(start_k + key, a_l), a_l, lk - key, GROUPS, BLOCK_N, BLOCK_G, True)
        s2 = dot(q_tile, tl.trans(k_tile), zero, PRECISION) * scale2
        agreement = dot(a_tile, tl.trans(b_tile), zero, GATE_PRECISION)
        far = rows[:, None] + (lk - lq) - keys[None, :] > near
        s2, slope, slope_gate = _gated_scores(s2, agreement, sharp, far, LOG_GATE)
        allowed = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        if dense_rows is not None:
            at_dense = dense_rows[:, None] + offset(keys, dense_k)[None, :]
            allowed = allowed & (tl.load(at_dense, mask=allowed, other=0) != 0)
        dp = dot(g_tile, tl.trans(v_tile), zero, PRECISION)
        _, ds = score_gradient(
            s2, dp, row_lse[:, None], row_delta[:, None], allowed, WEIGHT, DERIVATIVE, True, True, True
        )
        acc = dot((ds * slope).to(k_tile.dtype), k_tile, acc, PRECISION)
        dx = ds * slope_gate
        acc_a = dot(dx, b_tile, acc_a, GATE_PRECISION)
        acc_sharp += tl.sum(dx * agreement, 1)
    dq_base = place(dq, entry, dq_b, head, dq_h, start_q + first, dq_l)
    store_tile(dq_base, dq_l, lq - first, acc * scale, HEAD_DIM, BLOCK_M, BLOCK_D)
    da_base = place(da, entry, da_b, head, da_h, start_q + first, da_l)
    store_tile(da_base, da_l, lq - first, acc_a * sharp, GROUPS, BLOCK_M, BLOCK_G)
    tl.store(dsharp + statistics, acc_sharp, mask=rows < lq)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _gated_backward_kv_kernel(
    q, k, v, g, a, sharpness, dense, lse, delta, dk, dv, da,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, a_b, a_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    da_b, da_h, da_l, dense_b, dense_h, dense_q, dense_k,
    kv_heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, entry, start_q, start_k, lq, lk, prefix, key_length = key_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_N
    if first >= lk:
        return
    keys = first + tl.arange(0, BLOCK_N)
    low, high = query_interval(keys, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    high = tl.where(keys < lk, high, 0)
    tile_begin = tl.min(tl.where(high > 0, low, lq), 0) // BLOCK_M
    tile_end = tl.cdiv(tl.max(high, 0), BLOCK_M)
    k_base = place(k, entry, k_b, kv_head, k_h, start_k + first, k_l)
    v_base = place(v, entry, v_b, kv_head, v_h, start_k + first, v_l)
    a_base = a + offset(entry, a_b)
    k_tile = load_tile(k_base, k_l, lk - first, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v_base, v_l, lk - first, V_DIM, BLOCK_N, BLOCK_DV, True)
    b_tile = load_tile(a_base + offset(start_k + first, a_l), a_l, lk - first, GROUPS, BLOCK_N, BLOCK_G, True)
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    da_acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = place(q, entry, q_b, head, q_h, start_q, q_l)
        g_base = place(g, entry, g_b, head, g_h, start_q, g_l)
        statistics = offset(entry * kv_heads * GROUP + head, length_q) + start_q
        dense_keys = row_pointers(
            dense, entry, dense_b, head, dense_h, start_q, dense_q, start_k + keys, dense_k
        )
        for at in range(tile_begin, tile_end):
            row = at * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q_base + offset(row, q_l), q_l, lq - row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            g_tile = load_tile(g_base + offset(row, g_l), g_l, lq - row, V_DIM, BLOCK_M, BLOCK_DV, True)
            a_tile = load_tile(
                a_base + offset(start_q + row, a_l), a_l, lq - row, GROUPS, BLOCK_M, BLOCK_G, True
            )
            row_lse = tl.load(lse + (statistics + rows), mask=rows < lq, other=0.0)
            row_delta = tl.load(delta + (statistics + rows), mask=rows < lq, other=0.0)
            begin, end = key_interval(rows, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
            end = tl.where(rows < lq, end, 0)
            allowed = (keys[:, None] >= begin[None, :]) & (keys[:, None] < end[None, :])
            if dense_keys is not None:
                at_dense = dense_keys[:, None] + offset(rows, dense_q)[None, :]
                allowed = allowed & (tl.load(at_dense, mask=allowed, other=0) != 0)
            s2 = dot(k_tile, tl.trans(q_tile), zero, PRECISION) * scale2  # (N, M)
            agreement = dot(b_tile, tl.trans(a_tile), zero, GATE_PRECISION)
            far = rows[None, :] + (lk - lq) - keys[:, None] > near
            s2, slope, slope_gate = _gated_scores(s2, agreement, sharp, far, LOG_GATE)
            dp = dot(v_tile, tl.trans(g_tile), zero, PRECISION)
            weight, ds = score_gradient(
                s2, dp, row_lse[None, :], row_delta[None, :], allowed, WEIGHT, DERIVATIVE, True, True, True
            )
            dv_acc = dot(weight.to(g_tile.dtype), g_tile, dv_acc, PRECISION)
            dk_acc = dot((ds * slope).to(q_tile.dtype), q_tile, dk_acc, PRECISION)
            da_acc = dot(ds * slope_gate, a_tile, da_acc, GATE_PRECISION)
    dk_base = place(dk, entry, dk_b, kv_head, dk_h, start_k + first, dk_l)
    dv_base = place(dv, entry, dv_b, kv_head, dv_h, start_k + first, dv_l)
    da_base = place(da, entry, da_b, kv_head, da_h, start_k + first, da_l)
    store_tile(dk_base, dk_l, lk - first, dk_acc * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_base, dv_l, lk - first, dv_acc, V_DIM, BLOCK_N, BLOCK_DV)
    store_tile(da_base, da_l, lk - first, da_acc * sharp, GROUPS, BLOCK_N, BLOCK_G)


def _problem(q, k, v, scale, mask) -> Problem:
    return Problem(q, k, v, None, 0, scale, 0.0, *mask)


def _gate_values(assignment, sharpness, window: int, gate: int) -> dict:
    """What the kernels take beside an attention call's values."""
    return {
        "a": assignment.float().contiguous(),
        "sharpness": sharpness.float(),
        "near": min(window, _triton.LONGEST),
        "LOG_GATE": gate == 1,
        "GROUPS": assignment.shape[2],
        "BLOCK_G": _triton.block(assignment.shape[2]),
        "GATE_PRECISION": _triton.precision(torch.float32),
    }


def refusal(q, k, v, assignment, sharpness, window, gate, scale, *mask) -> str | None:
    if assignment.shape[2] > 64:
        return f"it serves at most 64 groups, not {assignment.shape[2]}"
    return attention_refusal(q, k, v, None) or _triton.refusal(assignment, sharpness)


def refusal_backward(grad_out, q, k, v, assignment, sharpness, out, lse, *options) -> str | None:
    return refusal(q, k, v, assignment, sharpness, *options) or _triton.refusal(grad_out)


def configure(q, k, v, assignment, sharpness, window, gate, scale, *mask) -> _config.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention")


def configure_backward(
    grad_out, q, k, v, assignment, sharpness, out, lse, window, gate, scale, *mask
) -> _config.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention_backward")


def gated_attention(q, k, v, assignment, sharpness, window, gate, scale, *mask):
    p = _problem(q, k, v, scale, mask)
    out, lse = p.output(*q.shape[:3], p.v_dim), p.statistics()
    if out.numel():
        config = p.choose("gated_attention").values
        more = {"out": out, "lse": lse} | _gate_values(assignment, sharpness, window, gate)
        p.launch(_gated_forward_kernel, config, over="queries", **more)
    return out, lse


def gated_attention_backward(grad_out, q, k, v, assignment, sharpness, out, lse, window, gate, scale, *mask):
    p = _problem(q, k, v, scale, mask)
    dq, dk, dv = (p.output(*t.shape) for t in (q, k, v))
    if not dq.numel() or not dk.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), torch.zeros_like(assignment), torch.zeros_like(sharpness)
    config = p.choose("gated_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    lse = lse.contiguous()
    groups = assignment.shape[2]
    by_query, by_key = (p.output(*t.shape[:3], groups, dtype=torch.float32) for t in (q, k))
    dsharp = p.output(*q.shape[:3], dtype=torch.float32)
    more = _gate_values(assignment, sharpness, window, gate)
    more |= {"g": grad_out, "lse": lse, "delta": row_products(p, grad_out, out, lse)}
    p.launch(_gated_backward_q_kernel, config, over="queries", dq=dq, da=by_query, dsharp=dsharp, **more)
    p.launch(_gated_backward_kv_kernel, config, over="keys", dk=dk, dv=dv, da=by_key, **more)
    grad_assignment = (by_query.sum(1) + by_key.sum(1)).to(assignment.dtype)
    return dq, dk, dv, grad_assignment, dsharp.sum(dtype=torch.float64).to(sharpness.dtype)
