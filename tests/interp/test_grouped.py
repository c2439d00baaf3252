"""Triton grouped attention in the interpreter, against the reference: outputs and gradients."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing
from fastattn.masks import Mask
from fastattn.ops.attention.triton_tiles import key_tile, query_interval, query_tile
from fastattn.ops.grouped.triton import problem, sorted_values
from fastattn.ops.grouped.triton_tiles import next_run, query_tokens, run_of, sequence_tokens, tokens_of_tile
from fastattn.runtime import tuning as _config


def signatures(length: int, groups: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """(1, length): top_k of the groups a token, one token in seven in none."""
    generator = torch.Generator().manual_seed(seed)
    found = fa.focus_groups(torch.rand(1, length, groups, generator=generator), top_k=top_k)
    return found.masked_fill(torch.arange(length) % 7 == 3, 0)


def check(inputs, groups, window, mask=None, key_groups=None, terms=64):
    def run(backend):
        return lambda q, k, v: fa.grouped_attention(
            q, k, v, groups, key_groups=key_groups, window=window, mask=mask, backend=backend
        )

    # a row of one key: dP and delta are two roundings of one sum, and the true gradients of q and k are 0
    q, k, v = (t.detach() for t in inputs)
    weights = testing.attention_weights(run("reference"), q, k, v)
    lone = testing.lone_key_magnitudes(weights, q, k, v, q.shape[-1] ** -0.5)
    testing.check_op(
        run("triton"), run("reference"), inputs, terms=terms, names=("q", "k", "v"), magnitudes=lone
    )


MASKS = {
    "none": lambda: None,
    "narrowed": lambda: Mask(window=(25, None), key_lengths=torch.tensor([37])),
    "packed": lambda: Mask(cu_seqlens_q=torch.tensor([0, 9, 9, 43])),  # the last tokens belong to no document
    "prefix": lambda: Mask(prefix_lengths=torch.tensor([29])),
    "narrowed_prefix": lambda: Mask(
        prefix_lengths=torch.tensor([40]), window=(25, 11), key_lengths=torch.tensor([37])
    ),
    "packed_prefixes": lambda: Mask(
        cu_seqlens_q=torch.tensor([0, 9, 9, 43]), prefix_lengths=torch.tensor([9, 0, 20])
    ),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("count", "top_k", "window"), [(4, 1, 3), (8, 2, 0), (60, 3, 50)])
def test_is_the_rule(kind, count, top_k, window, nan_outputs):
    inputs = testing.attention_inputs(1, 2, 1, 45, 45, 24, 12, layout="odd")
    check(inputs, signatures(45, count, top_k), window, MASKS[kind]())


def in_runs(length: int, run: int) -> torch.Tensor:
    """(1, length): the first group for `run` tokens, then the second, then the first again."""
    return (torch.arange(length) // run % 2 + 1)[None]


def test_whole_tiles_and_far_ones(nan_outputs):
    """Whole tiles, tiles of no common group, and more tiles than one look at their summaries."""
    inputs = testing.attention_inputs(1, 1, 1, 1100, 1100, 4, requires_grad=False)

    def run(backend):
        return lambda q, k, v: fa.grouped_attention(q, k, v, in_runs(1100, 300), window=2, backend=backend)

    with _config.override({("grouped_attention", "triton"): {"block_m": 128, "block_n": 16}}):
        out = run("triton")(*inputs)
    testing.assert_within_budget(out, run("reference"), inputs, terms=1100)


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32)])
@pytest.mark.parametrize("prefix", [None, 150])
def test_gradients_of_whole_tiles(block_m, block_n, prefix, nan_outputs):
    tiles = {"block_m": block_m, "block_n": block_n}
    mask = None if prefix is None else Mask(prefix_lengths=torch.tensor([prefix]))
    with _config.override({("grouped_attention_backward", "triton"): tiles}):
        inputs = testing.attention_inputs(1, 1, 1, 210, 210, 8)
        check(inputs, in_runs(210, 60), window=2, mask=mask, terms=210)


@triton.jit
def _visits_kernel(visits, groups, mask, heads, tiles, length_q, length_k, META: tl.constexpr):
    """visits (tiles, tiles of the other side) by the ordered pass: 0 skipped, 1 tested pair by pair, 2 taken whole."""
    if META.by_queries:
        work = query_tile(tiles, heads, mask, length_q, length_k)
        extent = work.extent
        order = sequence_tokens(groups.order_q, work.entry, work.start_q)
        signatures = sequence_tokens(groups.signatures_q, work.entry, work.start_q)
        side = query_tokens(order, signatures, work.tile * META.block_m, extent, META)
        bound, stop = tl.max(side.end, 0), tl.cdiv(extent.keys, META.block_n)
        run = run_of(groups, work.entry, side.signature, side.begin, side.end, bound, stop)
    else:
        work = key_tile(tiles, heads, mask, length_q, length_k)
        extent = work.extent
        order = sequence_tokens(groups.order_k, work.entry, work.start_k)
        keys, there = tokens_of_tile(order, work.tile * META.block_n, extent.keys, META.block_n, True)
        signatures = sequence_tokens(groups.signatures_k, work.entry, work.start_k)
        signature = tl.load(signatures + keys, mask=there, other=0)
        low, high = query_interval(keys, extent, META.causal)
        high = tl.where(there, high, 0)
        bound = tl.min(tl.where(high > 0, low, extent.queries), 0)
        stop = tl.cdiv(extent.queries, META.block_m)
        run = run_of(groups, work.entry, signature, low, high, bound, stop)
    begin, full_end, end = next_run(run, extent.keys * 0, META.by_queries)
    row = visits + work.tile * stop
    while begin < stop:
        for tile in range(begin, full_end):
            tl.store(row + tile, 2)
        for tile in range(full_end, end):
            tl.store(row + tile, 1)
        begin, full_end, end = next_run(run, end, META.by_queries)


def visits(args: masks.MaskArgs, groups: torch.Tensor, block: int, over: str) -> torch.Tensor:
    """(tiles of queries, tiles of keys) of the order by signature, as the passes over tiles of `over` take them."""
    length = groups.shape[1]
    q, k, v = testing.attention_inputs(1, 1, 1, length, length, 4, requires_grad=False)
    p, config = (
        problem(q, k, v, 1.0, args),
        {"block_m": block, "block_n": block, "num_warps": 1, "num_stages": 1},
    )
    tiles = -(-length // block)
    found = torch.zeros(tiles, tiles, dtype=torch.int32)
    values = sorted_values(p, groups, groups, 1, config, over=over)
    meta = {"sorted": True, "by_queries": over == "queries"}
    p.launch(_visits_kernel, config, over=over, meta=meta, visits=found, **values | {"heads": 1})
    return found if over == "queries" else found.T


@settings(max_examples=25)
@given(data=st.data())
def test_tiles_are_skipped_and_taken_whole_rightly(data):
    """Every pair of tiles against all its pairs of tokens: none that counts is skipped, and of a whole one all count."""
    length, block = data.draw(st.integers(1, 90)), 16
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    bits, second = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.0, 0.3]))
    one, other = (1 << torch.randint(bits, (1, length), generator=generator) for _ in range(2))
    groups = torch.where(torch.rand(1, length, generator=generator) < second, one | other, one)
    groups = groups if data.draw(st.booleans()) else groups.sort(1).values
    options = {"prefix_lengths": torch.tensor([data.draw(st.integers(0, length))])}
    if data.draw(st.booleans()):
        options["window"] = (data.draw(st.integers(0, length)), data.draw(st.none() | st.integers(0, length)))
    if data.draw(st.booleans()):
        options["key_lengths"] = torch.tensor([data.draw(st.integers(0, length))])
    args = Mask(**options).args("test", *(torch.empty(1, 1, length, 4),) * 2)
    seen = masks.dense_allowed(length, length, groups.device, args)[0, 0]
    order = groups[0].argsort(stable=True)
    counts = (seen & ((groups[0, :, None] & groups[0]) != 0))[order][:, order]
    for over in ("queries", "keys"):
        found = visits(args, groups, block, over)
        for a, b in itertools.product(range(found.shape[0]), repeat=2):
            pairs = counts[a * block : (a + 1) * block, b * block : (b + 1) * block]
            assert found[a, b] or not pairs.any(), (over, a, b)
            assert found[a, b] < 2 or (pairs.all() and pairs.shape == (block, block)), (over, a, b)


def test_a_prefix_meets_whole_tiles_after_the_query():
    """One group and a prefix of three tiles: all pairs of its tiles are taken whole, of what follows the earlier ones."""
    groups = torch.ones(1, 64, dtype=torch.int64)
    args = Mask(prefix_lengths=torch.tensor([48])).args("test", *(torch.empty(1, 1, 64, 4),) * 2)
    expected = torch.tensor([[2, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 1]], dtype=torch.int32)
    for over in ("queries", "keys"):
        assert torch.equal(visits(args, groups, 16, over), expected)


def test_float16(nan_outputs):
    inputs = testing.attention_inputs(1, 2, 2, 40, 40, 16, dtype=torch.float16)
    check(inputs, signatures(40, 8, 2), 5)


def test_decoding(nan_outputs):
    """Few queries against a longer key side."""
    groups, key_groups = signatures(3, 8, 2), signatures(50, 8, 2, seed=1)
    check(testing.attention_inputs(1, 2, 1, 3, 50, 16), groups, 4, key_groups=key_groups)


@settings(max_examples=3)
@given(
    length=st.integers(1, 40), count=st.integers(1, 63), top_k=st.integers(1, 3), window=st.integers(0, 45)
)
@example(length=1, count=1, top_k=1, window=0)
def test_any_signatures(length, count, top_k, window):
    groups = signatures(length, count, min(top_k, count), seed=length)
    with testing.nan_filled_outputs():
        check(testing.attention_inputs(1, 1, 1, length, length, 8), groups, window)


@pytest.mark.parametrize("kind", ("none", "narrowed_prefix", "packed_prefixes"))
def test_lse_and_its_gradient(kind, nan_outputs):
    groups, mask = signatures(45, 4, 2), MASKS[kind]()

    def run(backend):
        return lambda *x: fa.grouped_attention(
            *x, groups, window=3, mask=mask, return_lse=True, backend=backend
        )

    inputs = testing.attention_inputs(1, 2, 1, 45, 45, 16)
    testing.check_op(run("triton"), run("reference"), inputs, terms=64, names=("q", "k", "v"))
