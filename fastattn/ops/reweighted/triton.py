"""LSSA and LSSAR forward in Triton: one pass for the row's sum and extremes, one for the weighted values."""

import math

import torch
import triton
import triton.language as tl

from ... import _config, _triton
from ..._triton import LOG2E, dot, load_tile, offset, store_tile
from ..._triton_scores import softplus_weight
from ..attention.triton import Problem
from ..attention.triton import refusal as attention_refusal
from ..attention.triton_tiles import key_interval, sequence

_LOG2E = tl.constexpr(LOG2E)
_EQUAL = tl.constexpr(8.0 * 2.0**-23)  # scores of a row within this times 1 + c are all equal
_SHORTEST = 1e-12
_SOFTPLUS = 2  # the score whose tile sizes are used


@triton.jit
def _scores(
    q_tile, k_base, k_l, factor, begin, end, tile, lk,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(softplus(c * q.k) (M, N), which of them are allowed)."""
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_base + offset(first, k_l), k_l, lk - first, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    zero = tl.zeros([begin.shape[0], BLOCK_N], tl.float32)
    s = softplus_weight(dot(q_tile, tl.trans(k_tile), zero, PRECISION) * factor[:, None])
    return s, (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _softplus_attention_forward_kernel(
    q, k, v, out, statistics, prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    heads, tiles, length_q, length_k, window_left, window_right, log_dim, power,
    REWEIGH: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads
    start_q, start_k, lq, lk, prefix, key_length = sequence(
        batch, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_M
    if first >= lq:
        return
    entry = batch
    if offsets_q is not None:
        entry = batch * 0
    rows = first + tl.arange(0, BLOCK_M)
    begin, end = key_interval(rows, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    end = tl.where(rows < lq, end, 0)
    last = tl.minimum(first + BLOCK_M, lq) - 1
    first_begin, _first_end = key_interval(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL
    )
    _last_begin, last_end = key_interval(last, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    tile_begin = first_begin // BLOCK_N
    tile_end = tl.maximum(tl.cdiv(last_end, BLOCK_N), tile_begin)
    q_base = q + offset(entry, q_b) + offset(head, q_h) + offset(start_q + first, q_l)
    k_base = k + offset(entry, k_b) + offset(head // GROUP, k_h) + offset(start_k, k_l)
    v_base = v + offset(entry, v_b) + offset(head // GROUP, v_h) + offset(start_k, v_l)
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)

    count = tl.maximum(end - begin, 0).to(tl.float32)  # n_i
    c = log_dim * tl.log(tl.maximum(count, 1.0))
    factor = c * _LOG2E
    threshold = tl.zeros([BLOCK_M], tl.float32)
    reciprocal = threshold + 1.0
    if REWEIGH:
        total = threshold
        highest = threshold
        lowest = tl.full([BLOCK_M], float("inf"), tl.float32)
        for at in range(tile_begin, tile_end):
            s, allowed = _scores(
                q_tile, k_base, k_l, factor, begin, end, at, lk, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION
            )
            total += tl.sum(tl.where(allowed, s, 0.0), 1)
            highest = tl.maximum(highest, tl.max(tl.where(allowed, s, 0.0), 1))
            lowest = tl.minimum(lowest, tl.min(tl.where(allowed, s, float("inf")), 1))
        threshold = tl.where(count > 3.0, total / tl.maximum(count, 1.0), 0.0)
        equal = (count > 3.0) & (highest - lowest <= _EQUAL * (1.0 + c))
        height = tl.where(equal | (count == 0.0), 0.0, highest - threshold)
        reciprocal = tl.where(height == 0.0, 0.0, 1.0 / tl.where(height == 0.0, 1.0, height))
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    for at in range(tile_begin, tile_end):
        s, allowed = _scores(
            q_tile, k_base, k_l, factor, begin, end, at, lk, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION
        )
        if REWEIGH:
            # 2^(p log2 x), 0 at x = 0: each weight is at most 1, so no power overflows
            s = tl.exp2(power * tl.log2(tl.maximum(s - threshold[:, None], 0.0) * reciprocal[:, None]))
        weight = tl.where(allowed, s, 0.0)
        weights += tl.sum(weight, 1)
        key = at * BLOCK_N
        v_tile = load_tile(v_base + offset(key, v_l), v_l, lk - key, V_DIM, BLOCK_N, BLOCK_DV, True)
        acc = dot(weight.to(v_tile.dtype), v_tile, acc, PRECISION)
    acc = acc / tl.where(weights == 0.0, 1.0, weights)[:, None]
    out_base = out + offset(entry, out_b) + offset(head, out_h) + offset(start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    kept = statistics + offset(offset(entry * heads + head, length_q) + start_q + rows, 3)
    tl.store(kept, threshold, mask=rows < lq)
    tl.store(kept + 1, reciprocal, mask=rows < lq)
    tl.store(kept + 2, weights, mask=rows < lq)


def _problem(q, k, v, mask) -> Problem:
    return Problem(q, k, v, None, _SOFTPLUS, 1.0, 0.0, *mask)


def refusal(q, k, v, power, *mask) -> str | None:
    if mask[-1] is not None:
        return "it does not serve a dense mask"
    return attention_refusal(q, k, v, None)


def configure(q, k, v, power, *mask) -> _config.Choice:
    return _problem(q, k, v, mask).choose("attention")


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x|, rounded to x's dtype; a vector shorter than _SHORTEST becomes 0."""
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return torch.where(norm > _SHORTEST, x.float() / norm.clamp(min=_SHORTEST), 0.0).to(x.dtype)


def softplus_attention(q, k, v, power, *mask):
    p = _problem(_unit(q), _unit(k), v, mask)
    out = p.output(*q.shape[:3], p.v_dim)
    statistics = p.output(*q.shape[:3], 3, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    config = p.choose("attention").values
    tiles = triton.cdiv(p.longest_q, config["block_m"])
    constants = p.constants()
    names = ("CAUSAL", "GROUP", "HEAD_DIM", "V_DIM", "BLOCK_D", "BLOCK_DV", "PRECISION")
    _triton.launch(
        _softplus_attention_forward_kernel, (tiles * p.heads * p.sequences,),
        p.q, p.k, p.v, out, statistics, *p.indices,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *out.stride()[:3],
        p.heads, tiles, p.length_q, p.length_k, *p.window, math.log(p.head_dim), 1.0 if power is None else float(power),
        REWEIGH=power is not None, **{name: constants[name] for name in names},
        BLOCK_M=config["block_m"], BLOCK_N=config["block_n"],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return out, statistics
