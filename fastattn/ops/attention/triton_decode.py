"""Attention of few queries to many keys: programs take parts of the keys, and their results are merged in a fixed order."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import offset
from .triton_options import drawn_rows
from .triton_placed import placed
from .triton_tiles import (
    Attended,
    Edges,
    address,
    attend,
    finish,
    key_interval,
    place,
    row_elements,
    sequence,
    store_state,
    with_shift,
)

_MOST_ROWS = 64  # rows of the one tile: queries times query heads of a key head


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _attention_decode_kernel(
    q, k, v, bias, dense, drop, captured, parts, tops, totals, mask, kv_heads, splits, span, length_q, length_k, factors, SCORE: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    kv_head = (program // splits) % kv_heads
    entry = program // splits // kv_heads
    _, _, extent = sequence(entry, mask, length_q, length_k)
    count = extent.queries
    rows = tl.arange(0, META.block_m)  # (query head of the group, query)
    head = kv_head * META.group + rows // count
    row = rows % count
    inside = rows < META.group * count

    begin, end = key_interval(row, extent, META.causal)
    first_begin, first_end = key_interval(count * 0, extent, META.causal)
    last_begin, last_end = key_interval(count - 1, extent, META.causal)
    low, high = split * span, split * span + span  # this program's keys
    begin, end = tl.maximum(begin, low), tl.where(inside, tl.minimum(end, high), 0)
    first_begin, first_end = tl.maximum(first_begin, low), tl.minimum(first_end, high)
    last_begin, last_end = tl.maximum(last_begin, low), tl.minimum(last_end, high)

    columns = tl.arange(0, META.block_d)
    q_rows = address(q, entry, head, row)
    keep = inside[:, None] & (columns < META.head_dim)[None, :]
    q_tile = tl.load(q_rows[:, None] + columns[None, :], mask=keep, other=0.0)
    operands = Attended(
        q_tile, place(k, entry, kv_head, count * 0), place(v, entry, kv_head, count * 0),
        row_elements(bias, entry, head, row, count * 0), row_elements(dense, entry, head, row, count * 0), begin, end,
        extent.key_length, with_shift(factors, extent.key_length, SCORE.log_n),
        drawn_rows(drop, (entry * kv_heads * META.group) + head, row, count * 0),
        placed(captured, entry, head[:, None], row[:, None], count * 0),
    )  # fmt: skip
    edges = Edges(first_begin, first_end, last_begin, last_end)
    acc, top, total = attend(operands, edges, None, SCORE, META)

    # parts (splits, B * Hkv, GROUP * Lq, Dv), tops and totals without the last dim
    group = split * (tl.num_programs(0) // splits) + entry * kv_heads + kv_head
    part_rows = offset(group, META.group * count) + rows
    columns_v = tl.arange(0, META.block_dv)
    keep = inside[:, None] & (columns_v < META.v_dim)[None, :]
    tl.store(parts + offset(part_rows, META.v_dim)[:, None] + columns_v[None, :], acc, mask=keep)
    if SCORE.normalised:
        tl.store(totals + part_rows, total, mask=inside)
        tl.store(tops + part_rows, top, mask=inside)


@triton.jit
def _attention_merge_kernel(
    parts, tops, totals, sink, drop, out, residual, lse, state, heads, length_q, splits, count, exponent, bias2, SCORE: tl.constexpr, V_DIM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # rows of out (B, H, Lq, Dv); parts have them in the same order
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (columns < V_DIM)[None, :]
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.int32)  # whether the weights of a part had no maximum subtracted
    for split in range(0, splits):
        at = offset(rows * 0 + split, count) + rows
        part = tl.load(parts + offset(at, V_DIM)[:, None] + columns[None, :], mask=keep, other=0.0)
        factor = tl.full([ROWS], 1.0, tl.float32)
        if SCORE.normalised:
            part_top = tl.load(tops + at, mask=inside, other=float("-inf"))
            part_total = tl.load(totals + at, mask=inside, other=0.0)
            if not SCORE.shifted:
                # use the score whose exponential is 1 as that part's maximum
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
    if not SCORE.shifted:
        top = tl.where(plain != 0, float("-inf"), top)
    own_sink = sink
    if sink is not None:
        own_sink = tl.load(sink + rows // length_q % heads, mask=inside, other=0.0)
    acc, row_lse, top, log_sum = finish(acc, top, total, exponent, bias2, SCORE.normalised, own_sink, drop)
    at = out + offset(rows, V_DIM)[:, None] + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=keep)
    if residual is not None:
        lost = acc - acc.to(out.dtype.element_ty).to(tl.float32)
        at = residual + offset(rows, V_DIM)[:, None] + columns[None, :]
        tl.store(at, tl.where(lost - lost == 0.0, lost, 0.0).to(out.dtype.element_ty), mask=keep)
    if SCORE.normalised:
        tl.store(lse + rows, row_lse, mask=inside)
        store_state(state, rows, top, log_sum, inside)


def fits(problem) -> bool:
    """Whether a key head's rows fit in one tile and there are enough keys to split."""
    rows = problem.group * problem.length_q
    return not problem.packed and 0 < rows <= _MOST_ROWS and problem.length_k >= 4 * rows


def attention(p) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, log-sum-exp, state and residual of a problem that `fits`."""
    out, (lse, state), residual = p.output(*p.q.shape[:3], p.v_dim), p.statistics(), p.residual()
    if out.numel() == 0:
        return out, lse, state, residual
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
        "residual": residual if residual.numel() else None,
        "lse": lse,
        "state": state,
        "splits": splits,
        "span": span,
        "count": count,
        "exponent": p.scale2 if p.bias is None else _triton.LOG2E,
        "bias2": p.bias2,
        "META": p.constants(_triton.block(p.group * p.length_q), config["block_n"]),
        "V_DIM": p.v_dim,
        "ROWS": 4,
        "BLOCK_DV": _triton.block(p.v_dim),
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    _triton.start(_attention_decode_kernel, (splits * groups,), values, **options)
    _triton.start(_attention_merge_kernel, (triton.cdiv(count, 4),), values, num_warps=4)
    return out, lse, state, residual
