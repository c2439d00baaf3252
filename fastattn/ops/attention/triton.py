"""Tiled attention in Triton: the forward kernel and its launch. One launch serves every mask, packed PrefixLM included."""

import torch
import triton
import triton.language as tl

from ...runtime import tuning as _config
from ...runtime.triton import load_tile, offset, store_tile
from . import triton_decode
from .triton_classes import tile_classes
from .triton_problem import Problem, refusal  # noqa: F401  the latter is what the schema asks
from .triton_tiles import (
    attend,
    exponent_of,
    finish,
    or_limit,
    place,
    place_two,
    query_intervals,
    query_tile,
    row_pointers,
    score_shift,
    store_state,
)


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_forward_kernel(
    q, k, v, bias, dense, classes, out, lse, state,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    heads, tiles, length_q, length_k, window_left, window_right, size, scale2, bias2,
    WEIGHT: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr, LOG_N: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
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
    q_base = place(q, entry, q_b, head, q_h, start_q + first, q_l)
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, entry, head // GROUP, start_k)
    bias_rows = row_pointers(bias, entry, bias_b, head, bias_h, start_q + rows, bias_q, start_k, bias_k)
    dense_rows = row_pointers(dense, entry, dense_b, head, dense_h, start_q + rows, dense_q, start_k, dense_k)
    class_row = row_pointers(classes, entry, classes_b, head, classes_h, tile, classes_q, tile * 0, 0)
    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc, top, total = attend(
        q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, class_row, begin, end,
        edges, extent[3], size, scale2, score_shift(bias2, extent[3], LOG_N),
        WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    acc, top, total = or_limit(
        acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, class_row, begin, end,
        edges, extent[3], size, scale2, bias2,
        NORMALISED, SHIFTED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    acc, row_lse, top, log_sum = finish(acc, top, total, exponent_of(bias, scale2), bias2, NORMALISED)
    out_base = place(out, entry, out_b, head, out_h, start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    statistics = offset(entry * heads + head, length_q) + start_q + rows
    if NORMALISED:
        tl.store(lse + statistics, row_lse, mask=rows < lq)
        store_state(state, statistics, top, log_sum, rows < lq)


def configure(*args) -> _config.Choice:
    problem = Problem(*args)
    return problem.choose("attention_decode" if triton_decode.fits(problem) else "attention")


def attention(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p = Problem(*args)
    if triton_decode.fits(p):
        return triton_decode.attention(p)
    out, (lse, state) = p.output(*p.q.shape[:3], p.v_dim), p.statistics()
    if out.numel() == 0:
        return out, lse, state
    config = p.choose("attention").values
    classes = tile_classes(p, config["block_m"], config["block_n"])
    p.launch(
        _attention_forward_kernel, config, over="queries", classes=classes, out=out, lse=lse, state=state
    )
    return out, lse, state
