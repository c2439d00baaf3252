"""Attention of few queries against many keys: the keys are split over programs and the parts merged in a fixed order."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import offset
from .triton_tiles import (
    attend,
    exponent_of,
    finish,
    key_interval,
    or_limit,
    place,
    place_two,
    row_pointers,
    score_shift,
    sequence,
    store_state,
)

_MOST_ROWS = 64  # query heads of one key head times queries: one tile of rows


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_decode_kernel(
    q, k, v, bias, dense, parts, tops, totals,
    prefix_lengths, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k,
    kv_heads, splits, span, length_q, length_k, window_left, window_right, size, scale2, bias2,
    WEIGHT: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr, LOG_N: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    kv_head = (program // splits) % kv_heads
    batch = program // splits // kv_heads
    _, _, extent = sequence(
        batch, prefix_lengths, None, None, key_lengths, length_q, length_k, window_left, window_right
    )
    lq, key_length = extent[0], extent[3]
    rows = tl.arange(0, BLOCK_M)  # (query head of the group, query)
    head = kv_head * GROUP + rows // lq
    row = rows % lq
    inside = rows < GROUP * lq
    shift2 = score_shift(bias2, key_length, LOG_N)

    begin, end = key_interval(row, extent, CAUSAL)
    first_begin, first_end = key_interval(lq * 0, extent, CAUSAL)
    last_begin, last_end = key_interval(lq - 1, extent, CAUSAL)
    low, high = split * span, split * span + span  # this program's keys
    begin, end = tl.maximum(begin, low), tl.where(inside, tl.minimum(end, high), 0)
    first_begin, first_end = tl.maximum(first_begin, low), tl.minimum(first_end, high)
    last_begin, last_end = tl.maximum(last_begin, low), tl.minimum(last_end, high)
    edges = (first_begin, first_end, last_begin, last_end)

    columns = tl.arange(0, BLOCK_D)
    q_rows = place(q, batch, q_b, head, q_h, row, q_l)
    q_tile = tl.load(
        q_rows[:, None] + columns[None, :], mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0
    )
    k_base, v_base = place_two(k, k_b, k_h, k_l, v, v_b, v_h, v_l, batch, kv_head, lq * 0)
    bias_rows = row_pointers(bias, batch, bias_b, head, bias_h, row, bias_q, lq * 0, 0)
    dense_rows = row_pointers(dense, batch, dense_b, head, dense_h, row, dense_q, lq * 0, 0)
    acc, top, total = attend(
        q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, None, begin, end,
        edges, key_length, size, scale2, shift2,
        WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    acc, top, total = or_limit(
        acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, None, begin, end,
        edges, key_length, size, scale2, shift2,
        NORMALISED, SHIFTED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip

    # parts (splits, B * Hkv, GROUP * Lq, Dv), tops and totals without the last
    group = split * (tl.num_programs(0) // splits) + batch * kv_heads + kv_head
    part_rows = offset(group, GROUP * lq) + rows
    columns_v = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (columns_v < V_DIM)[None, :]
    tl.store(parts + offset(part_rows, V_DIM)[:, None] + columns_v[None, :], acc, mask=keep)
    if NORMALISED:
        tl.store(totals + part_rows, total, mask=inside)
        tl.store(tops + part_rows, top, mask=inside)


@triton.jit
def _attention_merge_kernel(
    parts, tops, totals, bias, out, lse, state, splits, count, scale2, bias2,
    SHIFTED: tl.constexpr, NORMALISED: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of out (B, H, Lq, Dv), whose order parts keep
    inside = rows < count
    columns = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (columns < V_DIM)[None, :]
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    exponent = exponent_of(bias, scale2)
    plain = tl.zeros([ROWS], tl.int32)  # whether weights of a part had no maximum taken off
    for split in range(0, splits):
        at = offset(rows * 0 + split, count) + rows
        part = tl.load(parts + offset(at, V_DIM)[:, None] + columns[None, :], mask=keep, other=0.0)
        factor = tl.full([ROWS], 1.0, tl.float32)
        if NORMALISED:
            part_top = tl.load(tops + at, mask=inside, other=float("-inf"))
            part_total = tl.load(totals + at, mask=inside, other=0.0)
            if not SHIFTED:
                # as if the score of weight 1 had been taken off
                without = (part_top == float("-inf")) & (part_total != 0.0)
                plain = tl.where(without, 1, plain)
                part_top = tl.where(without, -bias2 / exponent, part_top)
                part_top = tl.where(part_total == 0.0, float("-inf"), part_top)
            new_top = tl.maximum(top, part_top)
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            rescale = tl.exp2((top - finite) * exponent)
            factor = tl.exp2((part_top - finite) * exponent)
            acc = acc * rescale[:, None]
            total = total * rescale + part_total * factor
            top = new_top
        acc += part * factor[:, None]
    if not SHIFTED:
        top = tl.where(plain != 0, float("-inf"), top)
    acc, row_lse, top, log_sum = finish(acc, top, total, exponent, bias2, NORMALISED)
    at = out + offset(rows, V_DIM)[:, None] + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=keep)
    if NORMALISED:
        tl.store(lse + rows, row_lse, mask=inside)
        store_state(state, rows, top, log_sum, inside)


def fits(problem) -> bool:
    """Few enough rows for one tile a key head, and enough keys to be worth splitting."""
    rows = problem.group * problem.length_q
    return not problem.packed and 0 < rows <= _MOST_ROWS and problem.length_k >= 4 * rows


def attention(p) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, log-sum-exp and state of a problem that `fits`."""
    out, (lse, state) = p.output(*p.q.shape[:3], p.v_dim), p.statistics()
    if out.numel() == 0:
        return out, lse, state
    config = p.choose("attention_decode").values
    groups = p.batch * p.kv_heads
    wanted = triton.cdiv(config["waves"] * _triton.target(p.q.device).units, groups)
    splits = max(1, min(wanted, triton.cdiv(p.length_k, config["keys_per_split"])))
    span = triton.cdiv(triton.cdiv(p.length_k, splits), config["block_n"]) * config["block_n"]
    splits = triton.cdiv(p.length_k, span)
    count = groups * p.group * p.length_q
    parts = p.q.new_empty(splits, count, p.v_dim, dtype=torch.float32)
    tops, totals = p.q.new_empty(2, splits, count, dtype=torch.float32)
    values = p.values() | {
        "parts": parts,
        "tops": tops,
        "totals": totals,
        "out": out,
        "lse": lse,
        "state": state,
        "splits": splits,
        "span": span,
        "count": count,
        "BLOCK_M": _triton.block(p.group * p.length_q),
        "BLOCK_N": config["block_n"],
        "ROWS": 4,
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    _triton.start(_attention_decode_kernel, (splits * groups,), values, **options)
    _triton.start(_attention_merge_kernel, (triton.cdiv(count, 4),), values, num_warps=4)
    return out, lse, state
