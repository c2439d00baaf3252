"""LSSA and LSSAR forward in Triton: one pass for the row's sum and extremes, one for the weighted values."""

import math

import torch
import triton
import triton.language as tl

from ...runtime import tuning as _config
from ...runtime.triton import LOG2E, dot, load_tile, offset, store_tile
from ..attention.scores import SCORES
from ..attention.scores_triton import softplus_weight
from ..attention.triton_problem import Problem
from ..attention.triton_problem import refusal as attention_refusal
from ..attention.triton_tiles import allowed_pairs, key_tiles, place, place_two, query_intervals, query_tile
from . import tuning_triton  # noqa: F401  declares what is looked up

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
def _scores(
    q_tile, k_base, k_l, factor, begin, end, tile, count,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(softplus(c * q.k) (M, N), which of them are allowed)."""
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_base + offset(first, k_l), k_l, count - first, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    zero = tl.zeros([begin.shape[0], BLOCK_N], tl.float32)
    s = softplus_weight(dot(q_tile, tl.trans(k_tile), zero, PRECISION) * factor[:, None])
    return s, allowed_pairs(keys, begin, end, None, 0)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _softplus_attention_forward_kernel(
    q, k, v, out, statistics, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    heads, tiles, length_q, length_k, window_left, window_right, log_dim, power,
    REWEIGH: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
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
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)

    count, c = row_scale(begin, end, log_dim)
    factor = c * _LOG2E
    top = tl.zeros([BLOCK_M], tl.float32)
    reciprocal = top + 1.0
    if REWEIGH:
        total = top
        lowest = tl.full([BLOCK_M], float("inf"), tl.float32)
        for at in range(tile_begin, tile_end):
            s, allowed = _scores(
                q_tile, k_base, k_l, factor, begin, end, at, extent[3], HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION
            )
            total += tl.sum(tl.where(allowed, s, 0.0), 1)
            top = tl.maximum(top, tl.max(tl.where(allowed, s, 0.0), 1))
            lowest = tl.minimum(lowest, tl.min(tl.where(allowed, s, float("inf")), 1))
        threshold = tl.where(count > _FEW, total / tl.maximum(count, 1.0), 0.0)
        equal = (count > _FEW) & (top - lowest <= (1.0 + c) * _EQUAL)
        height = tl.where(equal | (count == 0.0), 0.0, top - threshold)
        reciprocal = tl.where(height == 0.0, 0.0, 1.0 / tl.where(height == 0.0, 1.0, height))
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    for at in range(tile_begin, tile_end):
        s, allowed = _scores(
            q_tile, k_base, k_l, factor, begin, end, at, extent[3], HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION
        )
        if REWEIGH:
            # 2^(p log2 x), 0 at x = 0: each weight is at most 1, so no power overflows
            s = tl.exp2(power * tl.log2(above_threshold(s, top[:, None], reciprocal[:, None])))
            allowed = allowed & (reciprocal > 0.0)[:, None]
        weight = tl.where(allowed, s, 0.0)
        weights += tl.sum(weight, 1)
        key = at * BLOCK_N
        v_tile = load_tile(v_base + offset(key, v_l), v_l, extent[3] - key, V_DIM, BLOCK_N, BLOCK_DV, True)
        acc = dot(weight.to(v_tile.dtype), v_tile, acc, PRECISION)
    if REWEIGH:  # maxima pass a NaN over
        weights = tl.where(total == total, weights, total)
    acc = acc / tl.where(weights == 0.0, 1.0, weights)[:, None]
    out_base = place(out, entry, out_b, head, out_h, start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    kept = statistics + offset(offset(entry * heads + head, length_q) + start_q + rows, 3)
    tl.store(kept, top, mask=rows < lq)
    tl.store(kept + 1, reciprocal, mask=rows < lq)
    tl.store(kept + 2, weights, mask=rows < lq)


def problem(q, k, v, mask) -> Problem:
    return Problem(q, k, v, None, SCORES["softplus"].code, 1.0, 0.0, *mask)


def power_values(p: Problem, power: float | None) -> dict:
    """What the kernels take beside an attention call's values."""
    return {
        "log_dim": math.log(p.head_dim),
        "power": 1.0 if power is None else float(power),
        "REWEIGH": power is not None,
    }


def refusal(q, k, v, power, *mask) -> str | None:
    if mask[-1] is not None:
        return "it does not serve a dense mask"
    return attention_refusal(q, k, v, None)


def configure(q, k, v, power, *mask) -> _config.Choice:
    return problem(q, k, v, mask).choose("softplus_attention")


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x|, rounded to x's dtype; a vector shorter than _SHORTEST becomes 0."""
    return direction(x)[0].to(x.dtype)


def direction(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / |x|, 1 / |x|) in float32; 0 and 0 for a vector shorter than _SHORTEST."""
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    divisor = norm.masked_fill(norm <= _SHORTEST, torch.inf)
    return x.float() / divisor, 1.0 / divisor


def softplus_attention(q, k, v, power, *mask):
    p = problem(unit(q), unit(k), v, mask)
    out = p.output(*q.shape[:3], p.v_dim)
    statistics = p.output(*q.shape[:3], 3, dtype=torch.float32)
    if out.numel():
        config = p.choose("softplus_attention").values
        more = {"out": out, "statistics": statistics} | power_values(p, power)
        p.launch(_softplus_attention_forward_kernel, config, over="queries", **more)
    return out, statistics
