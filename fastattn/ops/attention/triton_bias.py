"""The gradient of a tensor bias in Triton: a program computes one tile of it, summed over the batch entries and heads that share it."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import offset, rows
from .triton_gradients import along_rows, share_of_kept, statistics_of, weights_and_gradients
from .triton_options import drawn_rows, kept_pairs
from .triton_problem import Problem
from .triton_tiles import (
    address,
    allowed_pairs,
    load_keys,
    load_queries,
    place,
    query_intervals,
    row_elements,
    sequence,
    two_products,
    with_shift,
)


@triton.jit(do_not_specialize=["length_q", "length_k"])
def _attention_backward_bias_kernel(
    q, k, v, bias, dense, drop, g, state, delta, dbias, mask, heads, plane_heads, sharing, sharing_heads, tiles, key_tiles,
    length_q, length_k, factors, SCORE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """dS summed over the batch entries and heads that share a tile of the bias, and over the tile's rows (META.sum_rows) or keys
    (META.sum_keys); the host adds these tile sums up."""
    program = tl.program_id(0)
    key_tile, tile = program % key_tiles, (program // key_tiles) % tiles
    plane = program // key_tiles // tiles
    plane_head, plane_document = plane % plane_heads, plane // plane_heads
    first, first_key = tile * META.block_m, key_tile * META.block_n
    keys = first_key + tl.arange(0, META.block_n)
    acc = tl.zeros([META.block_m, META.block_n], tl.float32)
    for member in range(0, sharing):
        document, head = plane_document + member // sharing_heads, plane_head + member % sharing_heads
        entry = document
        if mask.cu_seqlens_q is not None:
            entry = document * 0
        start_q, start_k, extent = sequence(document, mask, length_q, length_k)
        row, begin, end, edges = query_intervals(first, extent, META)
        count = extent.key_length
        # the ends of the intervals do not decrease from row to row
        met = (edges.last_end > first_key) & (edges.first_begin < first_key + META.block_n)
        if (first < extent.queries) & met:
            kv_head = head // META.group
            q_rows, g_rows = place(q, entry, head, start_q), place(g, entry, head, start_q)
            k_rows, v_rows = place(k, entry, kv_head, start_k), place(v, entry, kv_head, start_k)
            at = offset(entry * heads + head, length_q) + start_q + row
            bias_rows = row_elements(bias, entry, head, start_q + row, start_k)
            dense_rows = row_elements(dense, entry, head, start_q + row, start_k)
            drawn = drawn_rows(drop, entry * heads + head, start_q + row, start_k)
            q_tile, g_tile = load_queries(q_rows, g_rows, first, extent.queries, META, True)
            k_tile, v_tile = load_keys(k_rows, v_rows, first_key, count, META, True)
            products, dp = two_products(q_tile, k_tile, g_tile, v_tile, META.precision)  # (M, N)
            allowed = allowed_pairs(keys, begin, end, dense_rows)
            kept = None
            if drawn is not None:
                kept = kept_pairs(drawn, first_key, META.block_n, META.aligned)
            statistics = along_rows(statistics_of(state, delta, at, row < extent.queries, SCORE, META))
            _, ds = weights_and_gradients(
                products, dp, statistics, allowed, bias_rows, keys, end, count, with_shift(factors, count, SCORE.log_n),
                share_of_kept(drawn), kept, SCORE, True,
            )  # fmt: skip
            acc += ds
    start_q, start_k, extent = sequence(plane_document, mask, length_q, length_k)
    slot = plane_document
    if META.one_slot:
        slot = plane_document * 0
    row = first + tl.arange(0, META.block_m)
    own_rows, own_keys = row < extent.queries, keys < extent.keys
    if META.sum_rows:
        line = address(dbias, slot, plane_head, tile)
        if META.sum_keys:
            tl.store(line + key_tile, tl.sum(tl.sum(acc, 1), 0))
        else:
            tl.store(line + start_k + keys, tl.sum(acc, 0), mask=own_keys)
    else:
        lines = address(dbias, slot, plane_head, start_q + row)
        if META.sum_keys:
            tl.store(lines + key_tile, tl.sum(acc, 1), mask=own_rows)
        else:
            at_pairs = lines[:, None] + (start_k + keys)[None, :]
            tl.store(
                at_pairs, acc.to(dbias.base.dtype.element_ty), mask=own_rows[:, None] & own_keys[None, :]
            )


def bias_gradient(p: Problem, bias: torch.Tensor, config, grad_lse, **more) -> torch.Tensor:
    """The gradient of `bias` (B or 1, Hq or 1, Lq or 1, Lk or 1), rounded once. more: values that the other backward kernels take too."""
    sum_rows, sum_keys = bias.shape[2] == 1 and p.length_q > 1, bias.shape[3] == 1
    if sum_keys and p.score.shifted and p.sink is None:
        # the weights of a row sum to 1, so its dS sums to dlse
        if grad_lse is None:
            return torch.zeros_like(bias, memory_format=torch.contiguous_format)
        return grad_lse.double()[..., None].sum_to_size(bias.shape).to(bias.dtype)
    block_m, block_n = config["block_m"], config["block_n"]
    tiles, key_tiles = triton.cdiv(p.longest_q, block_m), triton.cdiv(p.longest_k, block_n)
    shared_batch, shared_heads = bias.shape[0] == 1 and not p.packed, bias.shape[1] == 1
    planes = 1 if shared_batch else p.sequences
    plane_heads = 1 if shared_heads else p.heads
    sharing_heads = p.heads if shared_heads else 1
    # documents have disjoint rows and keys: only sums over both need a slot for each document
    one_slot = p.packed and not (sum_rows and sum_keys)
    slots = planes if p.packed and not one_slot else bias.shape[0]
    shape = (slots, plane_heads, tiles if sum_rows else p.length_q, key_tiles if sum_keys else p.length_k)
    whole = not (sum_rows or sum_keys)
    sums = bias.new_zeros(shape, dtype=bias.dtype if whole else torch.float32)
    _triton.start(
        _attention_backward_bias_kernel,
        (planes * plane_heads * tiles * key_tiles,),
        p.values()
        | {
            "dbias": rows(sums),
            "plane_heads": plane_heads,
            "sharing": (p.batch if shared_batch else 1) * sharing_heads,
            "sharing_heads": sharing_heads,
            "tiles": tiles,
            "key_tiles": key_tiles,
            "META": p.constants(block_m, block_n, sum_rows=sum_rows, sum_keys=sum_keys, one_slot=one_slot),
        }
        | more,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if whole:
        return sums
    return sums.double().sum_to_size(bias.shape).to(bias.dtype)
