"""Gated attention in Triton: softmax attention whose distant scores are gated by sigmoid(sharpness * a_i.a_j)."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning as _config
from ...runtime.triton import LOG2E, dot, load_tile, offset, store_tile
from ..attention.scores_triton import sigmoid_derivative, sigmoid_weight, softplus_weight
from ..attention.triton_backward import row_products, score_gradient
from ..attention.triton_problem import Problem, turned
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import (
    allowed_pairs,
    finish,
    fold,
    key_tile,
    key_tiles,
    load_statistics,
    load_two,
    place,
    place_two,
    query_intervals,
    query_tile,
    query_tiles,
    row_pointers,
    store_state,
    store_two,
    two_products,
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
    q, k, v, a, sharpness, dense, out, state, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, a_b, a_l, out_b, out_h, out_l, dense_b, dense_h, dense_q, dense_k,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, entry, start_q, start_k, lq, _lk, extent = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, edges = query_intervals(first, extent, CAUSAL, BLOCK_M)
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    a_base = a + offset(entry, a_b)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    a_tile = load_tile(a_base + offset(start_q + first, a_l), a_l, lq - first, GROUPS, BLOCK_M, BLOCK_G, True)
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    for at in range(tile_begin, tile_end):
        key = at * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_tile, v_tile = load_two(
            k_base, k_l, v_base, v_l, key, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
        )
        b_tile = load_tile(
            a_base + offset(start_k + key, a_l), a_l, extent[3] - key, GROUPS, BLOCK_N, BLOCK_G, True
        )
        s, agreement = (
            dot(q_tile, tl.trans(k_tile), zero, PRECISION),
            dot(a_tile, tl.trans(b_tile), zero, GATE_PRECISION),
        )
        far = rows[:, None] + extent[6] - keys[None, :] > near
        s2, _, _ = _gated_scores(s * scale2, agreement, sharp, far, LOG_GATE)
        allowed = allowed_pairs(keys, begin, end, dense_rows, dense_k)
        acc, top, total = fold(acc, top, total, s2, allowed, v_tile, 1.0, WEIGHT, True, True, True, PRECISION)
    acc, _, top, log_sum = finish(acc, top, total, 1.0, 0.0, True)
    out_base = place(out, entry, out_b, head, out_h, start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    store_state(state, offset(entry * heads + head, length_q) + start_q + rows, top, log_sum, rows < lq)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right", "near"])
def _gated_backward_q_kernel(
    q, k, v, g, a, sharpness, dense, state, delta, dq, da, dsharp,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, a_b, a_l, dq_b, dq_h, dq_l, da_b, da_h, da_l,
    dense_b, dense_h, dense_q, dense_k,
    heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
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
    a_base = a + offset(entry, a_b)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    q_tile, g_tile = load_two(
        q_base, q_l, g_base, g_l, first, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True
    )
    a_tile = load_tile(a_base + offset(start_q + first, a_l), a_l, lq - first, GROUPS, BLOCK_M, BLOCK_G, True)
    row_top, row_sum, row_delta = load_statistics(state, delta, statistics, rows < lq)
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_a = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    acc_sharp = tl.zeros([BLOCK_M], tl.float32)
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    for at in range(tile_begin, tile_end):
        key = at * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_tile, v_tile = load_two(
            k_base, k_l, v_base, v_l, key, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
        )
        b_tile = load_tile(
            a_base + offset(start_k + key, a_l), a_l, extent[3] - key, GROUPS, BLOCK_N, BLOCK_G, True
        )
        s, dp = two_products(q_tile, k_tile, g_tile, v_tile, PRECISION)
        agreement = dot(a_tile, tl.trans(b_tile), zero, GATE_PRECISION)
        far = rows[:, None] + extent[6] - keys[None, :] > near
        s2, slope, slope_gate = _gated_scores(s * scale2, agreement, sharp, far, LOG_GATE)
        allowed = allowed_pairs(keys, begin, end, dense_rows, dense_k)
        _, ds = score_gradient(
            s2, dp, row_top[:, None], row_sum[:, None], row_delta[:, None], allowed, 1.0, WEIGHT, DERIVATIVE, True, True,
            True,
        )  # fmt: skip
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
    q, k, v, g, a, sharpness, dense, state, delta, dk, dv, da,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, a_b, a_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    da_b, da_h, da_l, dense_b, dense_h, dense_q, dense_k,
    kv_heads, tiles, length_q, length_k, window_left, window_right, near, scale, scale2,
    LOG_GATE: tl.constexpr, WEIGHT: tl.constexpr, DERIVATIVE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, entry, start_q, start_k, lq, lk, extent = key_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left,
        window_right,
    )  # fmt: skip
    first = tile * BLOCK_N
    if first >= lk:
        return
    keys, low, high, tile_begin, tile_end = query_tiles(first, extent, CAUSAL, BLOCK_M, BLOCK_N)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, kv_head, start_k)
    a_base = a + offset(entry, a_b)
    k_tile, v_tile = load_two(
        k_base, k_l, v_base, v_l, first, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
    )
    b_tile = load_tile(
        a_base + offset(start_k + first, a_l), a_l, extent[3] - first, GROUPS, BLOCK_N, BLOCK_G, True
    )
    sharp = tl.load(sharpness)
    zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    da_acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
        statistics = offset(entry * kv_heads * GROUP + head, length_q) + start_q
        dense_keys = row_pointers(
            dense, entry, dense_b, head, dense_h, start_q, dense_q, start_k + keys, dense_k
        )
        for at in range(tile_begin, tile_end):
            row = at * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            q_tile, g_tile = load_two(
                q_base, q_l, g_base, g_l, row, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True
            )
            a_tile = load_tile(
                a_base + offset(start_q + row, a_l), a_l, lq - row, GROUPS, BLOCK_M, BLOCK_G, True
            )
            row_top, row_sum, row_delta = load_statistics(state, delta, statistics + rows, rows < lq)
            allowed = allowed_pairs(rows, low, high, dense_keys, dense_q)
            s, dp = two_products(k_tile, q_tile, v_tile, g_tile, PRECISION)  # (N, M)
            agreement = dot(b_tile, tl.trans(a_tile), zero, GATE_PRECISION)
            far = rows[None, :] + extent[6] - keys[:, None] > near
            s2, slope, slope_gate = _gated_scores(s * scale2, agreement, sharp, far, LOG_GATE)
            weight, ds = score_gradient(
                s2, dp, row_top[None, :], row_sum[None, :], row_delta[None, :], allowed, 1.0, WEIGHT, DERIVATIVE, True,
                True, True,
            )  # fmt: skip
            dv_acc = dot(weight.to(g_tile.dtype), g_tile, dv_acc, PRECISION)
            dk_acc = dot((ds * slope).to(q_tile.dtype), q_tile, dk_acc, PRECISION)
            da_acc = dot(ds * slope_gate, a_tile, da_acc, GATE_PRECISION)
    da_base = place(da, entry, da_b, kv_head, da_h, start_k + first, da_l)
    store_two(
        dk, dk_b, dk_h, dk_l, dk_acc * scale, dv, dv_b, dv_h, dv_l, dv_acc, entry, kv_head, start_k + first, lk - first,
        HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
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


def refusal_backward(grad_out, q, k, v, assignment, sharpness, out, state, *options) -> str | None:
    return refusal(q, k, v, assignment, sharpness, *options) or _triton.refusal(grad_out)


def configure(q, k, v, assignment, sharpness, window, gate, scale, *mask) -> _config.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention")


def configure_backward(
    grad_out, q, k, v, assignment, sharpness, out, state, window, gate, scale, *mask
) -> _config.Choice:
    return _problem(q, k, v, scale, mask).choose("gated_attention_backward")


def gated_attention(q, k, v, assignment, sharpness, window, gate, scale, *mask):
    p = _problem(q, k, v, scale, mask)
    out, (_, state) = p.output(*q.shape[:3], p.v_dim), p.statistics()
    if out.numel():
        config = p.choose("gated_attention").values
        more = {"out": out, "state": state} | _gate_values(assignment, sharpness, window, gate)
        p.launch(_gated_forward_kernel, config, over="queries", **more)
    return out, state


def gated_attention_backward(
    grad_out, q, k, v, assignment, sharpness, out, state, window, gate, scale, *mask
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
    more |= {"g": grad_out, "state": state.contiguous(), "delta": row_products(p, grad_out, out)}
    p.launch(
        _gated_backward_q_kernel, turned(config), over="queries", dq=dq, da=by_query, dsharp=dsharp, **more
    )
    p.launch(_gated_backward_kv_kernel, config, over="keys", dk=dk, dv=dv, da=by_key, **more)
    grad_assignment = (by_query.sum(1) + by_key.sum(1)).to(assignment.dtype)
    return dq, dk, dv, grad_assignment, dsharp.sum(dtype=torch.float64).to(sharpness.dtype)
