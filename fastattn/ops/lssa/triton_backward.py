"""LSSA and LSSAR backward in Triton, by the closed form and without atomics.

With P the normalised weights, x = above_threshold(s) and z = c q.k of unit vectors:
    r = power P (dP - delta) / (s - threshold),  ds = r - (sum r) / n in rows with a threshold, else r,  dz = sigmoid(z) ds
"""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import LOG2E, dot, offset, rows
from ..attention.scores_triton import softplus_derivative, softplus_weight
from ..attention.triton_backward import along_columns, along_rows, row_products
from ..attention.triton_problem import turned
from ..attention.triton_tiles import (
    allowed_pairs,
    key_interval,
    key_tile,
    key_tiles,
    load_keys,
    load_queries,
    place,
    query_intervals,
    query_tile,
    query_tiles,
    store_rows,
    two_products,
)
from .triton import _FEW, above_threshold, direction, power_values, problem, row_scale, unit
from .triton import refusal as forward_refusal

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _row_statistics(statistics, row_index, inside):
    """(top, reciprocal, 1 / total or 0) of rows."""
    top = tl.load(statistics + offset(row_index, 3), mask=inside, other=0.0)
    reciprocal = tl.load(statistics + offset(row_index, 3) + 1, mask=inside, other=0.0)
    total = tl.load(statistics + offset(row_index, 3) + 2, mask=inside, other=0.0)
    return top, reciprocal, tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _gradients(s2, dp, statistics, delta, allowed, power, REWEIGH: tl.constexpr):
    """(P, r, sigmoid(z)) of base-2 scores; values of a row are broadcast along it."""
    top, reciprocal, inverse = statistics
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


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _softplus_attention_backward_q_kernel(
    q, k, v, g, statistics, delta, shift, dq, mask, heads, tiles, length_q, length_k, log_dim, power, REWEIGH: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """dQ of the unit vectors, and each row's mean of r over its keys (`shift`), which the kernel of dK and dV reads."""
    work = query_tile(tiles, heads, mask, length_q, length_k)
    tile, head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_m
    lq = extent.queries
    if first >= lq:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    tile_begin, tile_end = key_tiles(edges, META.block_n)
    kv_head = head // META.group
    q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    row_index = offset(entry * heads + head, length_q) + work.start_q + row
    q_tile, g_tile = load_queries(q_rows, g_rows, first, lq, META, True)
    row_statistics = _row_statistics(statistics, row_index, row < lq)
    row_delta = tl.load(delta + row_index, mask=row < lq, other=0.0)
    count, c = row_scale(begin, end, log_dim)
    row_shift = tl.zeros([META.block_m], tl.float32)
    acc = tl.zeros([META.block_m, META.block_d], tl.float32)
    num_tiles = tile_end - tile_begin
    # With a threshold there are two passes over the keys: the first for the mean of r, the second for the gradient.
    for step in range(0, num_tiles * (2 if REWEIGH else 1)):
        key = (tile_begin + step % num_tiles) * META.block_n
        keys = key + tl.arange(0, META.block_n)
        k_tile, v_tile = load_keys(k_rows, v_rows, key, extent.key_length, META, True)
        allowed = allowed_pairs(keys, begin, end, None)
        s, dp = two_products(q_tile, k_tile, g_tile, v_tile, META.precision)
        s2 = s * (c * _LOG2E)[:, None]
        _, r, slope = _gradients(
            s2, dp, along_rows(row_statistics), row_delta[:, None], allowed, power, REWEIGH
        )
        if REWEIGH and step < num_tiles:
            row_shift += tl.sum(r, 1) / tl.maximum(count, 1.0)
        else:
            shifted = tl.where(allowed, r - tl.where(count > _FEW, row_shift, 0.0)[:, None], 0.0)
            y = slope * shifted * c[:, None]
            acc = dot(y.to(k_tile.dtype), k_tile, acc, META.precision)
    if REWEIGH:
        tl.store(shift + row_index, tl.where(count > _FEW, row_shift, 0.0), mask=row < lq)
    dq_rows = place(dq, entry, head, work.start_q + first)
    store_rows(dq_rows, lq - first, acc, META.head_dim, META.block_m, META.block_d)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _softplus_attention_backward_kv_kernel(
    q, k, v, g, statistics, delta, shift, dk, dv, mask, kv_heads, tiles, length_q, length_k, log_dim, power,
    REWEIGH: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = key_tile(tiles, kv_heads, mask, length_q, length_k)
    tile, kv_head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_n
    lq, lk = extent.queries, extent.keys
    if first >= lk:
        return
    _keys, low, high, tile_begin, tile_end = query_tiles(first, extent, META)
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    k_tile, v_tile = load_keys(k_rows, v_rows, first, extent.key_length, META, True)
    dk_acc = tl.zeros([META.block_n, META.block_d], tl.float32)
    dv_acc = tl.zeros([META.block_n, META.block_dv], tl.float32)
    for member in range(0, META.group):
        head = kv_head * META.group + member
        q_rows, g_rows = place(q, entry, head, work.start_q), place(g, entry, head, work.start_q)
        for step in range(tile_begin, tile_end):
            first_row = step * META.block_m
            row = first_row + tl.arange(0, META.block_m)
            row_index = offset(entry * kv_heads * META.group + head, length_q) + work.start_q + row
            q_tile, g_tile = load_queries(q_rows, g_rows, first_row, lq, META, True)
            begin, end = key_interval(row, extent, META.causal)
            row_statistics = _row_statistics(statistics, row_index, row < lq)
            row_delta = tl.load(delta + row_index, mask=row < lq, other=0.0)
            _count, c = row_scale(begin, end, log_dim)
            allowed = allowed_pairs(row, low, high, None)
            s, dp = two_products(k_tile, q_tile, v_tile, g_tile, META.precision)  # (N, M)
            s2 = s * (c * _LOG2E)[None, :]
            weight, r, slope = _gradients(
                s2, dp, along_columns(row_statistics), row_delta[None, :], allowed, power, REWEIGH
            )
            if REWEIGH:
                r = tl.where(allowed, r - tl.load(shift + row_index, mask=row < lq, other=0.0)[None, :], 0.0)
            y = slope * r * c[None, :]
            dv_acc = dot(weight.to(g_tile.dtype), g_tile, dv_acc, META.precision)
            dk_acc = dot(y.to(q_tile.dtype), q_tile, dk_acc, META.precision)
    dk_rows, dv_rows = (
        place(dk, entry, kv_head, work.start_k + first),
        place(dv, entry, kv_head, work.start_k + first),
    )
    store_rows(dk_rows, lk - first, dk_acc, META.head_dim, META.block_n, META.block_d)
    store_rows(dv_rows, lk - first, dv_acc, META.v_dim, META.block_n, META.block_dv)


def refusal(grad_out, grad_lse, q, k, v, out, statistics, power, mask) -> str | None:
    return forward_refusal(q, k, v, power, mask) or _triton.refusal(grad_out)


def configure(grad_out, grad_lse, q, k, v, out, statistics, power, mask):
    return problem(q, k, v, mask).choose("softplus_attention_backward")


def _through_norm(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x from the gradient of x / |x|: its component along x is removed."""
    ahead, reciprocal = direction(x)
    along = (gradient * ahead).sum(-1, keepdim=True)
    return ((gradient - along * ahead) * reciprocal).to(x.dtype)


def softplus_attention_backward(grad_out, grad_lse, q, k, v, out, statistics, power, mask):
    p = problem(unit(q), unit(k), v, mask)
    dq, dk = (p.output(*x.shape, dtype=torch.float32) for x in (q, k))
    dv = p.output(*v.shape)
    if not q.numel() or not k.numel() or not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    config = p.choose("softplus_attention_backward").values
    grad_out = _triton.last_dim_contiguous(grad_out)
    more = power_values(p, power) | {
        "g": rows(grad_out),
        "statistics": statistics.contiguous(),
        "delta": row_products(p, grad_out, out, grad_lse if power is None else None),
        "shift": torch.empty_like(statistics[..., 0], memory_format=torch.contiguous_format),
    }
    p.launch(_softplus_attention_backward_q_kernel, turned(config), over="queries", dq=rows(dq), **more)
    p.launch(_softplus_attention_backward_kv_kernel, config, over="keys", dk=rows(dk), dv=rows(dv), **more)
    return _through_norm(dq, q), _through_norm(dk, k), dv
