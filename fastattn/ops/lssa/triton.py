"""LSSA and LSSAR forward in Triton: one pass for the row's sum and extremes, one for the weighted values."""

import math

import torch
import triton
import triton.language as tl

from ...runtime import tuning
from ...runtime.triton import LOG2E, dot, load_rows, load_tile, offset, rows
from ..attention.scores import SCORES
from ..attention.scores_triton import softplus_weight
from ..attention.triton_problem import Problem
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import allowed_pairs, key_tiles, place, query_intervals, query_tile, store_rows
from . import tuning_triton  # noqa: F401  declares what is looked up
from .cpu import row_lse

_LOG2E = tl.constexpr(LOG2E)
_EQUAL = tl.constexpr(8.0 * 2.0**-23)  # scores of a row within this times 1 + c are all equal
_FEW = tl.constexpr(3.0)  # rows with at most this many keys have no threshold
_SHORTEST = 1e-12


@triton.jit
def row_scale(begin, end, log_dim):
    """(n_i, c_i = log D log n_i) of rows."""
    count = tl.maximum(end - begin, 0).to(tl.float32)
    return count, log_dim * tl.log(tl.maximum(count, 1.0))


@triton.jit
def above_threshold(s, top, reciprocal):
    """(s - threshold) / (top - threshold), at least 0, for threshold = top - 1 / reciprocal."""
    return tl.maximum(1.0 - (top - s) * reciprocal, 0.0)


@triton.jit
def _scores(q_tile, k, factor, begin, end, tile, count, META: tl.constexpr):
    """(softplus(c * q.k) (M, N), which pairs are allowed)."""
    first = tile * META.block_n
    keys = first + tl.arange(0, META.block_n)
    k_tile = load_rows(k, first, count, META.head_dim, META.block_n, META.block_d, True)
    zero = tl.zeros([META.block_m, META.block_n], tl.float32)
    s = softplus_weight(dot(q_tile, tl.trans(k_tile), zero, META.precision) * factor[:, None])
    return s, allowed_pairs(keys, begin, end, None)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _softplus_attention_forward_kernel(
    q, k, v, out, statistics, mask, heads, tiles, length_q, length_k, log_dim, power, REWEIGH: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    tile, head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_m
    lq = extent.queries
    if first >= lq:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    tile_begin, tile_end = key_tiles(edges, META.block_n)
    q_rows = place(q, entry, head, work.start_q + first)
    kv_head = head // META.group
    k_rows, v_rows = place(k, entry, kv_head, work.start_k), place(v, entry, kv_head, work.start_k)
    q_tile = load_tile(
        q_rows.base, q_rows.stride, lq - first, META.head_dim, META.block_m, META.block_d, True
    )

    count, c = row_scale(begin, end, log_dim)
    factor = c * _LOG2E
    top = tl.zeros([META.block_m], tl.float32)
    reciprocal = top + 1.0
    if REWEIGH:
        total = top
        lowest = tl.full([META.block_m], float("inf"), tl.float32)
        for key_tile in range(tile_begin, tile_end):
            s, allowed = _scores(q_tile, k_rows, factor, begin, end, key_tile, extent.key_length, META)
            total += tl.sum(tl.where(allowed, s, 0.0), 1)
            top = tl.maximum(top, tl.max(tl.where(allowed, s, 0.0), 1))
            lowest = tl.minimum(lowest, tl.min(tl.where(allowed, s, float("inf")), 1))
        threshold = tl.where(count > _FEW, total / tl.maximum(count, 1.0), 0.0)
        equal = (count > _FEW) & (top - lowest <= (1.0 + c) * _EQUAL)
        height = tl.where(equal | (count == 0.0), 0.0, top - threshold)
        reciprocal = tl.where(height == 0.0, 0.0, 1.0 / tl.where(height == 0.0, 1.0, height))
    acc = tl.zeros([META.block_m, META.block_dv], tl.float32)
    weights = tl.zeros([META.block_m], tl.float32)
    for key_tile in range(tile_begin, tile_end):
        s, allowed = _scores(q_tile, k_rows, factor, begin, end, key_tile, extent.key_length, META)
        if REWEIGH:
            # 2^(p log2 x), 0 at x = 0: each weight is at most 1, so no power overflows
            s = tl.exp2(power * tl.log2(above_threshold(s, top[:, None], reciprocal[:, None])))
            allowed = allowed & (reciprocal > 0.0)[:, None]
        weight = tl.where(allowed, s, 0.0)
        weights += tl.sum(weight, 1)
        key = key_tile * META.block_n
        v_tile = load_rows(v_rows, key, extent.key_length, META.v_dim, META.block_n, META.block_dv, True)
        acc = dot(weight.to(v_tile.dtype), v_tile, acc, META.precision)
    if REWEIGH:  # maxima ignore NaN, so take it from the sum
        weights = tl.where(total == total, weights, total)
    acc = acc / tl.where(weights == 0.0, 1.0, weights)[:, None]
    out_rows = place(out, entry, head, work.start_q + first)
    store_rows(out_rows, lq - first, acc, META.v_dim, META.block_m, META.block_dv)
    row_statistics = statistics + offset(offset(entry * heads + head, length_q) + work.start_q + row, 3)
    tl.store(row_statistics, top, mask=row < lq)
    tl.store(row_statistics + 1, reciprocal, mask=row < lq)
    tl.store(row_statistics + 2, weights, mask=row < lq)


def problem(q, k, v, mask) -> Problem:
    return Problem(q, k, v, None, SCORES["softplus"].code, 1.0, 0.0, mask)


def power_values(p: Problem, power: float | None) -> dict:
    """The values of the kernels besides those of an attention call."""
    return {
        "log_dim": math.log(p.head_dim),
        "power": 1.0 if power is None else float(power),
        "REWEIGH": power is not None,
    }


def refusal(q, k, v, power, mask) -> str | None:
    if mask.dense is not None:
        return "it does not serve a dense mask"
    return attention_refusal(q, k, v, None, mask)


def configure(q, k, v, power, mask) -> tuning.Choice:
    return problem(q, k, v, mask).choose("softplus_attention")


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x|, rounded to x's dtype; a vector shorter than _SHORTEST becomes 0."""
    return direction(x)[0].to(x.dtype)


def direction(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / |x|, 1 / |x|) in float32; 0 and 0 for a vector shorter than _SHORTEST."""
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    divisor = norm.masked_fill(norm <= _SHORTEST, torch.inf)
    return x.float() / divisor, 1.0 / divisor


def softplus_attention(q, k, v, power, mask):
    p = problem(unit(q), unit(k), v, mask)
    out = p.output(*q.shape[:3], p.v_dim)
    statistics = p.output(*q.shape[:3], 3, dtype=torch.float32)
    if out.numel():
        config = p.choose("softplus_attention").values
        more = {"out": rows(out), "statistics": statistics} | power_values(p, power)
        p.launch(_softplus_attention_forward_kernel, config, over="queries", **more)
    return out, row_lse(statistics, power), statistics
