"""LSSA and LSSAR backward in Triton, by the closed form and without atomics.

With P the normalised weights, x = above_threshold(s) and z = c q.k of unit vectors:
    r = power P (dP - delta) / (s - threshold),  ds = r - (sum r) / n where there is a threshold,  dz = sigmoid(z) ds
"""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import LOG2E, dot, offset, store_tile
from ..attention.scores_triton import softplus_derivative, softplus_weight
from ..attention.triton_backward import row_products
from ..attention.triton_problem import turned
from ..attention.triton_tiles import (
    allowed_pairs,
    key_interval,
    key_tile,
    key_tiles,
    load_two,
    place,
    place_two,
    query_intervals,
    query_tile,
    query_tiles,
    store_two,
    two_products,
)
from .triton import _FEW, above_threshold, direction, power_values, problem, row_scale, unit
from .triton import refusal as forward_refusal

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _row_statistics(statistics, at, inside):
    """(top, reciprocal, 1 / total or 0) of rows."""
    top = tl.load(statistics + offset(at, 3), mask=inside, other=0.0)
    reciprocal = tl.load(statistics + offset(at, 3) + 1, mask=inside, other=0.0)
    total = tl.load(statistics + offset(at, 3) + 2, mask=inside, other=0.0)
    return top, reciprocal, tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _gradients(s2, dp, top, reciprocal, inverse, delta, allowed, power, REWEIGH: tl.constexpr):
    """(P, r, sigmoid(z)) of base-2 scores; what belongs to a row is broadcast along it."""
    s = softplus_weight(s2)
    slope = softplus_derivative(s2, s)
    r = (dp - delta) * inverse
    if REWEIGH:
        above = above_threshold(s, top, reciprocal)
        allowed = allowed & (above > 0.0)
        lower = tl.exp2((power - 1.0) * tl.log2(tl.where(allowed, above, 1.0)))
        weight = lower * above * inverse
        r = r * power * reciprocal * lower
    else:
        weight = s * inverse
    return tl.where(allowed, weight, 0.0), tl.where(allowed, r, 0.0), slope


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _softplus_attention_backward_q_kernel(
    q, k, v, g, statistics, delta, shift, dq, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dq_b, dq_h, dq_l,
    heads, tiles, length_q, length_k, window_left, window_right, log_dim, power,
    REWEIGH: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of the unit vectors, and each row's mean of r over its keys (`shift`), which its keys' pass takes."""
    tile, head, entry, start_q, start_k, lq, _lk, extent = query_tile(
        tiles, heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= lq:
        return
    rows, begin, end, edges = query_intervals(first, extent, CAUSAL, BLOCK_M)
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    at = offset(entry * heads + head, length_q) + start_q + rows
    q_tile, g_tile = load_two(
        q_base, q_l, g_base, g_l, first, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True
    )
    top, reciprocal, inverse = _row_statistics(statistics, at, rows < lq)
    row_delta = tl.load(delta + at, mask=rows < lq, other=0.0)
    count, c = row_scale(begin, end, log_dim)
    row_shift = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles_here = tile_end - tile_begin
    # With a threshold the keys are gone over twice: first for the mean of r, then for the gradient.
    for step in range(0, tiles_here * (2 if REWEIGH else 1)):
        key = (tile_begin + step % tiles_here) * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_tile, v_tile = load_two(
            k_base, k_l, v_base, v_l, key, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
        )
        allowed = allowed_pairs(keys, begin, end, None, 0)
        s, dp = two_products(q_tile, k_tile, g_tile, v_tile, PRECISION)
        _, r, slope = _gradients(
            s * (c * _LOG2E)[:, None], dp, top[:, None], reciprocal[:, None], inverse[:, None], row_delta[:, None], allowed, power, REWEIGH
        )  # fmt: skip
        if REWEIGH and step < tiles_here:
            row_shift += tl.sum(r, 1) / tl.maximum(count, 1.0)
        else:
            shifted = tl.where(allowed, r - tl.where(count > _FEW, row_shift, 0.0)[:, None], 0.0)
            y = slope * shifted * c[:, None]
            acc = dot(y.to(k_tile.dtype), k_tile, acc, PRECISION)
    if REWEIGH:
        tl.store(shift + at, tl.where(count > _FEW, row_shift, 0.0), mask=rows < lq)
    dq_base = place(dq, entry, dq_b, head, dq_h, start_q + first, dq_l)
    store_tile(dq_base, dq_l, lq - first, acc, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _softplus_attention_backward_kv_kernel(
    q, k, v, g, statistics, delta, shift, dk, dv, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    kv_heads, tiles, length_q, length_k, window_left, window_right, log_dim, power,
    REWEIGH: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
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
    _keys, low, high, tile_begin, tile_end = query_tiles(first, extent, CAUSAL, BLOCK_M, BLOCK_N)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, kv_head, start_k)
    k_tile, v_tile = load_two(
        k_base, k_l, v_base, v_l, first, extent[3], HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True
    )
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base, g_base = place_two(q, q_b, q_h, q_l, g, g_b, g_h, g_l, entry, head, start_q)
        for step in range(tile_begin, tile_end):
            row = step * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            at = offset(entry * kv_heads * GROUP + head, length_q) + start_q + rows
            q_tile, g_tile = load_two(
                q_base, q_l, g_base, g_l, row, lq, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, True
            )
            begin, end = key_interval(rows, extent, CAUSAL)
            top, reciprocal, inverse = _row_statistics(statistics, at, rows < lq)
            row_delta = tl.load(delta + at, mask=rows < lq, other=0.0)
            _count, c = row_scale(begin, end, log_dim)
            allowed = allowed_pairs(rows, low, high, None, 0)
            s, dp = two_products(k_tile, q_tile, v_tile, g_tile, PRECISION)  # (N, M)
            weight, r, slope = _gradients(
                s * (c * _LOG2E)[None, :], dp, top[None, :], reciprocal[None, :], inverse[None, :], row_delta[None, :], allowed, power,
                REWEIGH,
            )  # fmt: skip
            if REWEIGH:
                r = tl.where(allowed, r - tl.load(shift + at, mask=rows < lq, other=0.0)[None, :], 0.0)
            y = slope * r * c[None, :]
            dv_acc = dot(weight.to(g_tile.dtype), g_tile, dv_acc, PRECISION)
            dk_acc = dot(y.to(q_tile.dtype), q_tile, dk_acc, PRECISION)
    store_two(
        dk, dk_b, dk_h, dk_l, dk_acc, dv, dv_b, dv_h, dv_l, dv_acc, entry, kv_head, start_k + first, lk - first,
        HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip


def refusal(grad_out, q, k, v, out, statistics, power, *mask) -> str | None:
    return forward_refusal(q, k, v, power, *mask) or _triton.refusal(grad_out)


def configure(grad_out, q, k, v, out, statistics, power, *mask):
    return problem(q, k, v, mask).choose("softplus_attention_backward")


def _through_norm(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x from that of x / |x|: what lies along x is taken away."""
    ahead, reciprocal = direction(x)
    along = (gradient * ahead).sum(-1, keepdim=True)
    return ((gradient - along * ahead) * reciprocal).to(x.dtype)


def softplus_attention_backward(grad_out, q, k, v, out, statistics, power, *mask):
    p = problem(unit(q), unit(k), v, mask)
    dq, dk = (p.output(*x.shape, dtype=torch.float32) for x in (q, k))
    dv = p.output(*v.shape)
    if not q.numel() or not k.numel() or not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    config = p.choose("softplus_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    rows = statistics[..., 0]
    more = power_values(p, power) | {
        "g": grad_out,
        "statistics": statistics.contiguous(),
        "delta": row_products(p, grad_out, out),
        "shift": torch.empty_like(rows, memory_format=torch.contiguous_format),
    }
    p.launch(_softplus_attention_backward_q_kernel, turned(config), over="queries", dq=dq, **more)
    p.launch(_softplus_attention_backward_kv_kernel, config, over="keys", dk=dk, dv=dv, **more)
    return _through_norm(dq, q), _through_norm(dk, k), dv
