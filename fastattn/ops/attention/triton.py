"""Tiled attention in Triton: the forward kernel and its launch. One kernel serves every mask, also packed PrefixLM."""

import torch
import triton
import triton.language as tl

from ...runtime import tuning
from ...runtime.triton import load_tile, offset, pairs, rows
from . import triton_decode
from .triton_options import drawn_rows
from .triton_placed import placed
from .triton_problem import Problem, refusal  # noqa: F401  schema.py takes refusal from here
from .triton_tiles import (
    Attended,
    attend,
    exponent_of,
    finish,
    place,
    query_intervals,
    query_tile,
    rounding_of,
    row_elements,
    store_rows,
    store_state,
    with_shift,
)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _attention_forward_kernel(
    q, k, v, bias, dense, classes, sink, drop, captured, out, residual, lse, state, mask, heads, tiles, length_q, length_k, factors,
    SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    work = query_tile(tiles, heads, mask, length_q, length_k)
    tile, head, entry, extent = work.tile, work.head, work.entry, work.extent
    first = tile * META.block_m
    count = extent.queries
    if first >= count:
        return
    row, begin, end, edges = query_intervals(first, extent, META)
    kv_head = head // META.group
    k_rows = place(k, entry, kv_head, work.start_k)
    v_rows = place(v, entry, kv_head, work.start_k)
    bias_rows = row_elements(bias, entry, head, work.start_q + row, work.start_k)
    dense_rows = row_elements(dense, entry, head, work.start_q + row, work.start_k)
    class_row = row_elements(classes, entry, head, tile, tile * 0)
    q_rows = place(q, entry, head, work.start_q + first)
    q_tile = load_tile(
        q_rows.base, q_rows.stride, count - first, META.head_dim, META.block_m, META.block_d, True
    )
    shifted = with_shift(factors, extent.key_length, SCORE.log_n)
    drawn = drawn_rows(drop, entry * heads + head, work.start_q + row, work.start_k)
    operands = Attended(
        q_tile, k_rows, v_rows, bias_rows, dense_rows, begin, end, extent.key_length, shifted, drawn,
        placed(captured, entry, head, (work.start_q + row)[:, None], work.start_k),
    )  # fmt: skip
    acc, top, total = attend(operands, edges, class_row, SCORE, META)
    exponent = exponent_of(bias, factors.scale2)
    own_sink = sink
    if sink is not None:
        own_sink = tl.load(sink + head)
    acc, row_lse, top, log_sum = finish(
        acc, top, total, exponent, factors.bias2, SCORE.normalised, own_sink, drop
    )
    out_rows = place(out, entry, head, work.start_q + first)
    store_rows(out_rows, count - first, acc, META.v_dim, META.block_m, META.block_dv)
    if residual is not None:
        lost = place(residual, entry, head, work.start_q + first)
        store_rows(lost, count - first, rounding_of(acc, out), META.v_dim, META.block_m, META.block_dv)
    statistics = offset(entry * heads + head, length_q) + work.start_q + row
    if SCORE.normalised:
        tl.store(lse + statistics, row_lse, mask=row < count)
        store_state(state, statistics, top, log_sum, row < count)


def configure(*members) -> tuning.Choice:
    problem = Problem.of(*members)
    return problem.choose("attention_decode" if triton_decode.fits(problem) else "attention")


def attention(*members) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return forward(Problem.of(*members))


def forward(p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, state, residual) of a call."""
    if triton_decode.fits(p):
        return triton_decode.attention(p)
    out, (lse, state), residual = p.output(*p.q.shape[:3], p.v_dim), p.statistics(), p.residual()
    if out.numel() == 0:
        return out, lse, state, residual
    config = p.choose("attention").values
    classes = p.tile_classes(config["block_m"], config["block_n"])
    more = {"classes": pairs(classes), "out": rows(out), "lse": lse, "state": state}
    more["residual"] = rows(residual) if residual.numel() else None
    p.launch(_attention_forward_kernel, config, over="queries", **more)
    return out, lse, state, residual
