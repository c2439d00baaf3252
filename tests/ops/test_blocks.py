"""Block lists against dense booleans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import fastattn as fa

sizes = st.sampled_from((1, 2, 3, 5, 16))


@st.composite
def tables(draw, count=1):
    """(block, lengths, tables of blocks), the batch or heads of which may be one."""
    block = draw(sizes), draw(sizes)
    lengths = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    found = []
    for _ in range(count):
        one = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))))
        share = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
        counts = (-(-n // size) for n, size in zip(lengths, block, strict=True))
        found.append(torch.rand(*one, *counts, generator=generator) < share)
    return block, lengths, found


def lists(table, block, lengths):
    return fa.Blocks.from_dense(table, block=block, q_length=lengths[0], k_length=lengths[1])


def spread(table, block, lengths):
    """Element by element, as the definition says."""
    dense = table.new_zeros(*table.shape[:2], *lengths)
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            dense[:, :, i, j] = table[:, :, i // block[0], j // block[1]]
    return dense


@given(tables())
def test_dense_there_and_back(drawn):
    block, lengths, (table,) = drawn
    blocks = lists(table, block, lengths)
    assert torch.equal(blocks.table(), table)
    assert torch.equal(blocks.to_dense(), spread(table, block, lengths))
    assert (
        blocks.density == (table.float().mean().item() if table.numel() else 0.0)
        or abs(blocks.density - table.double().mean().item()) < 1e-12
    )
    again = fa.Blocks(
        blocks.offsets,
        blocks.keys.long(),
        block=block,
        q_length=lengths[0],
        k_length=lengths[1],
        batch=blocks.batch,
        heads=blocks.heads,
    )
    assert torch.equal(again.table(), table) and again.keys.dtype == torch.int32


@given(tables())
def test_transposed_is_the_dense_transposed_and_twice_itself(drawn):
    block, lengths, (table,) = drawn
    blocks = lists(table, block, lengths)
    turned = blocks.transposed
    assert turned.block == block[::-1] and (turned.q_length, turned.k_length) == lengths[::-1]
    assert torch.equal(turned.table(), table.transpose(2, 3))
    assert turned.transposed is blocks and blocks.transposed is turned
    fresh = fa.Blocks._made(turned.offsets, turned.keys, like=turned).transposed
    assert torch.equal(fresh.offsets, blocks.offsets) and torch.equal(fresh.keys, blocks.keys)


@given(tables(count=2))
def test_union_and_intersection(drawn):
    block, lengths, (a, b) = drawn
    both = lists(a, block, lengths), lists(b, block, lengths)
    assert torch.equal((both[0] | both[1]).table(), a | b)
    assert torch.equal((both[0] & both[1]).table(), a & b)


@given(tables(), st.data())
def test_split_keeps_the_pairs(drawn, data):
    block, lengths, (table,) = drawn
    fine = tuple(data.draw(st.sampled_from([d for d in (1, 2, 3, 4, 5, 8) if n % d == 0])) for n in block)
    blocks = lists(table, block, lengths)
    assert blocks.split(fine).block == fine
    assert torch.equal(blocks.split(fine).to_dense(), blocks.to_dense())


@given(tables(), st.integers(0, 1000))
def test_indices_in_any_order_with_duplicates_and_nothing(drawn, seed):
    block, lengths, _ = drawn
    rows = -(-lengths[0] // block[0]), -(-lengths[1] // block[1])
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, max(rows[1], 0), (2, 3, rows[0], 5), generator=generator)
    blocks = fa.Blocks.from_indices(indices, block=block, q_length=lengths[0], k_length=lengths[1])
    expected = torch.zeros(2, 3, *rows, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, rows[0]))).view(-1, 3).tolist():
        for j in indices[b, h, i].tolist():
            if j >= 0:
                expected[b, h, i, j] = True
    assert torch.equal(blocks.table(), expected)


def test_of_a_block_mask():
    def mod(b, h, i, j):
        return (i >= j) & (i - j < 300)

    mask = create_block_mask(mod, None, None, 500, 640, device="cpu", BLOCK_SIZE=64)
    blocks = fa.Blocks.from_block_mask(mask)
    assert blocks.block == (64, 64) and (blocks.q_length, blocks.k_length) == (500, 640)
    i, j = torch.arange(500)[:, None], torch.arange(640)
    meant = mod(0, 0, i, j)
    assert bool((blocks.to_dense()[0, 0] >= meant).all())
    padded = torch.nn.functional.pad(meant, (0, 0, 0, 12)).view(8, 64, 10, 64)
    assert torch.equal(blocks.table()[0, 0], padded.any(3).any(1))
    with pytest.raises(TypeError, match=r"block_mask must be a torch\.nn"):
        fa.Blocks.from_block_mask(meant)


@pytest.mark.parametrize("make", ["from_indices", "from_dense", "union", "split", "transposed"])
def test_made_in_a_compiled_function(make):
    """Capacity instead of a number of pairs: nothing breaks the graph, and the lists are the same."""
    torch._dynamo.reset()
    table = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    options = {"block": (8, 8), "q_length": 30, "k_length": 37}
    indices = torch.randint(-1, 5, (1, 2, 4, 3), generator=torch.Generator().manual_seed(1))

    def made(table, indices):
        if make == "from_indices":
            blocks = fa.Blocks.from_indices(indices, **options)
        else:
            blocks = fa.Blocks.from_dense(table, **options)
        if make == "union":
            blocks = blocks | fa.Blocks.from_indices(indices, **options)
        if make == "split":
            blocks = blocks.split((4, 2))
        if make == "transposed":
            blocks = blocks.transposed
        return blocks.to_dense(), blocks.offsets

    for got, want in zip(
        torch.compile(made, fullgraph=True, backend="aot_eager")(table, indices),
        made(table, indices),
        strict=True,
    ):
        assert torch.equal(got, want)


def ints(*values):
    return torch.tensor(values)


OPTIONS = {"block": (4, 4), "q_length": 8, "k_length": 12}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.Blocks(ints(0, 1), ints(0), **OPTIONS), ValueError, "offsets must have 3 entries"),
        (lambda: fa.Blocks(ints(1, 1, 1), ints(0), **OPTIONS), ValueError, "offsets must start at 0, given 1"),
        (lambda: fa.Blocks(ints(0, 2, 1), ints(0, 1), **OPTIONS), ValueError, "must not decrease, given 2 then 1"),
        (lambda: fa.Blocks(ints(0, 1, 3), ints(0, 1), **OPTIONS), ValueError, "end at 3, past the 2 keys"),
        (lambda: fa.Blocks(ints(0, 1, 2), ints(0, 3), **OPTIONS), ValueError, r"in \[0, 3\), given 3 at position 1"),
        (lambda: fa.Blocks(ints(0, 2, 2), ints(1, 0), **OPTIONS), ValueError, "ascend in a row, each once, given 1 then 0"),
        (lambda: fa.Blocks(ints(0, 2, 2), ints(1, 1), **OPTIONS), ValueError, "ascend in a row, each once, given 1 then 1"),
        (lambda: fa.Blocks(torch.zeros(3), ints(1), **OPTIONS), TypeError, "offsets must be int32 or int64"),
        (lambda: fa.Blocks(ints(0, 0, 0), ints(), **OPTIONS | {"block": (0, 4)}), TypeError, "keys must be"),
        (lambda: fa.Blocks(ints(0, 0, 0), ints(0), **OPTIONS | {"block": (0, 4)}), ValueError, r"block must lie in \[1"),
        (lambda: fa.Blocks(ints(0, 0, 0), ints(0), **OPTIONS | {"block": 4}), TypeError, r"block must be \(queries, keys\)"),
        (lambda: fa.Blocks(ints(0, 0, 0), ints(0), **OPTIONS | {"heads": 0}), ValueError, "heads must lie in"),
        (lambda: fa.Blocks(ints(0, 0, 0), ints(0), **OPTIONS | {"leaks": True}), TypeError, "leaks must be a str"),
        (lambda: fa.Blocks.from_indices(ints(0, 1), **OPTIONS), ValueError, "indices must have 4 dimensions"),
        (lambda: fa.Blocks.from_indices(ints(3, 1).view(1, 1, 2, 1), **OPTIONS), ValueError, "or be -1, given 3"),
        (lambda: fa.Blocks.from_indices(ints(3, 1).view(1, 1, 1, 2), **OPTIONS), ValueError, "must have 2 rows"),
        (lambda: fa.Blocks.from_dense(torch.ones(2, 2, dtype=torch.bool), **OPTIONS), ValueError, r"must have \(2, 3\) blocks"),
        (lambda: fa.Blocks.from_dense(torch.ones(2, 3), **OPTIONS), TypeError, "must be a bool tensor"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_immutable_and_its_own():
    offsets, keys = ints(0, 1, 2).int(), ints(0, 2).int()
    blocks = fa.Blocks(offsets, keys, **OPTIONS)
    keys.fill_(7)
    assert blocks.keys.tolist() == [0, 2]
    with pytest.raises(AttributeError, match="immutable"):
        blocks.block = (2, 2)
    with pytest.raises(TypeError, match="truth value"):
        bool(blocks)
    other = fa.Blocks(offsets, ints(0, 2), **OPTIONS | {"k_length": 13})
    with pytest.raises(ValueError, match="the same k_length, given 12 and 13"):
        blocks | other
    assert repr(blocks) == "Blocks(block=(4, 4), q_length=8, k_length=12, 2 of 6 blocks)"


def test_meta_tensors_have_no_contents_to_check():
    blocks = fa.Blocks(ints(0, 1, 2).to("meta"), ints(0, 9).to("meta"), **OPTIONS)
    assert blocks.to_dense().shape == (1, 1, 8, 12) and blocks.device.type == "meta"
