"""The compiler behind flex_attention: traces, derivatives, intervals, recognised masks and programs, each against plain torch."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flex_mods import BATCH, HEADS, MASKS, SCORES
from hypothesis import given
from hypothesis import strategies as st

from fastattn import testing
from fastattn.masks import NO_MASK_ARGS
from fastattn.ops.flex import prepare, program, reference
from fastattn.ops.flex.derivative import derive
from fastattn.ops.flex.evaluate import evaluate
from fastattn.ops.flex.graph import Graph
from fastattn.ops.flex.intervals import intervals
from fastattn.ops.flex.recognise import documents, recognise
from fastattn.ops.flex.tracing import trace

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import _functions

LENGTH = 70
SIZES = prepare.Sizes(BATCH, HEADS, LENGTH, LENGTH)


@pytest.fixture(autouse=True)
def integers_become_float64():
    """A quotient of integers has torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def places(length=LENGTH):
    return {
        "b": torch.arange(BATCH).view(-1, 1, 1, 1),
        "h": torch.arange(HEADS).view(-1, 1, 1),
        "q": torch.arange(length).view(-1, 1),
        "k": torch.arange(length),
    }


@pytest.mark.parametrize("name", SCORES)
def test_graph_and_derivative(name):
    """Of each function, and of every score: the graph in float64 is the function, its derivative is autograd's."""
    captured = [t.requires_grad_(t.is_floating_point()) for t in SCORES[name][0](LENGTH)]
    function = SCORES[name][1](*captured)
    s = testing.random_tensor(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64) * 3
    s[0, 0, 0, :6] = torch.tensor([0.0, -30.0, 30.0, 1e-12, -1e3, 1e3])
    s.requires_grad_()
    expected = function(s, *places().values()).expand(s.shape)
    graph = Graph()
    out = trace(function, graph, of_score=True)
    (value,) = evaluate(graph, [out], {"s": s.detach(), **places()})
    # float64, but for what a function makes float32 itself: .float() of an integer, and its logarithm
    torch.testing.assert_close(value.expand(s.shape), expected.detach(), rtol=3e-7, atol=3e-7)
    loads = tuple(graph.where(lambda n: n.op == "load" and n.type == "f", [out]))
    slope, derivatives = derive(graph, out, loads)
    values = evaluate(graph, [slope, *derivatives.values()], {"s": s.detach(), **places()})
    finite = expected.isfinite()
    grads = torch.autograd.grad(
        expected.masked_fill(~finite, 0.0).sum(),
        [s, *(t for t in captured if t.requires_grad)],
        allow_unused=True,
    )
    mine = values[0].expand(s.shape).masked_fill(~finite, 0.0)
    torch.testing.assert_close(
        mine, torch.zeros_like(mine) if grads[0] is None else grads[0], rtol=3e-7, atol=3e-7
    )
    sums = {id(t): torch.zeros_like(t) for t in captured if t.requires_grad}
    for load, value in zip(derivatives, values[1:], strict=True):
        node = graph.nodes[load]
        tensor = graph.tensors[node.value]
        index = evaluate(graph, list(node.args), {"s": s.detach(), **places()})
        value = value.expand(s.shape).masked_fill(~finite, 0.0)
        if index:
            sums[id(tensor)].index_put_(tuple(i.expand(s.shape) for i in index), value, accumulate=True)
        else:
            sums[id(tensor)] += value.sum()
    for t, grad in zip((t for t in captured if t.requires_grad), grads[1:], strict=True):
        scale = 3e-7 * max(grad.abs().max().item(), 1)
        torch.testing.assert_close(sums[id(t)], grad, rtol=0, atol=scale)


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_classed_soundly(name):
    """What is recognised and the rest are the mask; no full tile has a False, no empty one a True; few tiles are left mixed."""
    mask_mod = MASKS[name](LENGTH)
    dense = mask_mod(*places().values()).expand(BATCH, HEADS, LENGTH, LENGTH)
    call = prepare.traced(None, mask_mod, SIZES)
    classes = prepare.classes(call, torch.device("cpu"))
    for b in range(BATCH):
        for h in range(HEADS):
            kinds = classes[b if classes.shape[0] > 1 else 0, h if classes.shape[1] > 1 else 0]
            for i in range(kinds.shape[0]):
                for j in range(kinds.shape[1]):
                    tile = dense[b, h, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
                    if kinds[i, j] == prepare.EMPTY:
                        assert not tile.any()
                    elif kinds[i, j] == prepare.FULL:
                        assert tile.all()
    args, rest = recognise(call.graph, call.mask, square=True)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if args.causal:
        allowed &= j <= i
    if args.window_left >= 0:
        allowed &= i - j <= args.window_left
    if args.window_right >= 0:
        allowed &= j - i <= args.window_right
    if rest is not None:
        (value,) = evaluate(call.graph, [rest], {"s": torch.zeros(()), **places()})
        allowed = allowed & value
    assert torch.equal(allowed.expand(dense.shape), dense)


RECOGNISED = {
    "causal": (True, -1, -1, True),
    "window": (True, 9, -1, True),
    "both sides": (False, 12, 12, True),
    "documents": (True, -1, -1, False),
    "dilated": (True, -1, -1, False),
    "shared prefix": (True, -1, -1, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_recognised(name):
    call = prepare.traced(None, MASKS[name](LENGTH), SIZES)
    args, rest = recognise(call.graph, call.mask, square=True)
    expected = RECOGNISED.get(name, (False, -1, -1, False))
    if name == "some rows nothing":
        expected = (True, -1, -1, False)
    assert (args.causal, args.window_left, args.window_right, rest is None) == expected
    assert recognise(call.graph, call.mask, square=False) == (NO_MASK_ARGS, call.mask)


@pytest.mark.parametrize(
    "numbers", ([0, 0, 0, 1, 1, 5], [3] * 6, [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0])
)
@pytest.mark.parametrize("swapped", (False, True))
def test_documents_are_recognised(numbers, swapped):
    of = torch.tensor(numbers)

    def same(b, h, q, k):
        return of[k] == of[q] if swapped else of[q] == of[k]

    call = prepare.traced(None, same, prepare.Sizes(1, 1, 6, 6))
    starts = documents(call.graph, call.mask, 6)
    if numbers != sorted(numbers):
        assert starts is None
        return
    i = torch.arange(6)
    found = (
        torch.searchsorted(starts, i, right=True)[:, None] == torch.searchsorted(starts, i, right=True)[None]
    )
    assert torch.equal(found, of[:, None] == of[None])
    other = prepare.traced(None, lambda b, h, q, k: of[q] == of[k + 0 * q], prepare.Sizes(1, 1, 6, 6))
    assert documents(other.graph, other.mask, 6) is None


# --- random functions ------------------------------------------------------------------------------------------------

TABLE = testing.random_tensor(_functions.ROWS, dtype=torch.float64)


@given(st.integers(0, 2**32), st.data())
def test_intervals_contain_every_value(seed, data):
    length, rng = 40, random.Random(seed)
    tree, truth = _functions.whole(rng, rng.randint(0, 4)), _functions.condition(rng, 3)
    graph = Graph()
    try:
        places_of = trace(
            lambda b, h, q, k: _functions.build(truth, {"b": b, "h": h, "q": q, "k": k}, TABLE),
            graph,
            of_score=False,
        )
        index = trace(
            lambda s, b, h, q, k: _functions.build(tree, {"b": b, "h": h, "q": q, "k": k}, TABLE),
            graph,
            of_score=True,
        )
    except NotImplementedError as refused:  # an integer of more than 32 bits, folded
        assert "32 bits" in str(refused)
        return
    except OverflowError:
        return
    node = graph.nodes[index]
    outs = [places_of] + ([node.args[0]] if node.op == "i2f" else [])
    low = {
        n: data.draw(st.integers(0, top - 1))
        for n, top in zip("bhqk", (BATCH, HEADS, length, length), strict=True)
    }
    high = {
        n: data.draw(st.integers(low[n], top - 1))
        for n, top in zip("bhqk", (BATCH, HEADS, length, length), strict=True)
    }
    sizes = prepare.Sizes(BATCH, HEADS, length, length)
    whole_box = sizes.whole
    box = {n: type(whole_box[n])(np.float64(low[n]), np.float64(high[n])) for n in "bhqk"}
    env = {n: torch.arange(low[n], high[n] + 1) for n in "bhqk"}
    shaped = {n: env[n].view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate("bhqk")}
    for out, interval in zip(outs, intervals(graph, outs, box), strict=True):
        (value,) = evaluate(graph, [out], {"s": torch.zeros(()), **shaped})
        assert interval.low.max() <= int(value.min()) and int(value.max()) <= interval.high.min()


@given(st.integers(0, 2**32))
def test_random_functions(seed):
    """A program, its derivatives and its loads against autograd of the function, in float64 on every score."""
    length, rng = 12, random.Random(seed)
    tree = _functions.number(rng, rng.randint(1, 5))
    table = TABLE.clone().requires_grad_()
    sizes = prepare.Sizes(BATCH, HEADS, length, length)

    def function(s, b, h, q, k):
        return _functions.build(tree, {"s": s, "b": b, "h": h, "q": q, "k": k}, table)

    try:
        call = prepare.traced(function, None, sizes)
        from_start = prepare.check_numbers(call)
    except NotImplementedError as refused:
        assert "32 bits" in str(refused) or "kernels take" in str(refused)
        return
    tables, indices, offsets = prepare.tables(call.graph.tensors, torch.float64, torch.device("cpu"))
    words = prepare.program(call, offsets, from_start, True)
    s = (testing.random_tensor(BATCH, HEADS, length, length, dtype=torch.float64) * 2).requires_grad_()
    expected = torch.as_tensor(function(s, *places(length).values())).double().expand(s.shape)
    section = program.sections(words)[2]
    values = reference._Values(section, s.detach(), tables, indices)
    # in float64, but for integers that a function makes floats of in float32, exact to 2^-24
    bound = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        values.registers[section.score].double().expand(s.shape), expected.detach(), **bound
    )
    if not expected.requires_grad:
        return
    grad_s, grad_table = torch.autograd.grad(expected.sum(), (s, table), allow_unused=True)
    slope = values.registers[section.slope].double().expand(s.shape)
    torch.testing.assert_close(slope, torch.zeros_like(slope) if grad_s is None else grad_s, **bound)
    if grad_table is not None and len(section.loads):
        found = torch.zeros_like(table)
        for load, (_, register) in enumerate(section.loads):
            index = values.gradient_index(load).expand(s.shape).reshape(-1)
            found.index_add_(0, index, values.registers[register].double().expand(s.shape).reshape(-1))
        torch.testing.assert_close(found.detach(), grad_table, rtol=1e-4, atol=1e-4 * s.numel() ** 0.5)


# --- programs that are none ------------------------------------------------------------------------------------------


def words_of(function):
    call = prepare.traced(function, None, SIZES)
    *_, offsets = prepare.tables(call.graph.tensors, torch.float32, torch.device("cpu"))
    return prepare.program(call, offsets, prepare.check_numbers(call), False).tolist()


def test_words_that_are_no_program_are_refused():
    good = words_of(lambda s, b, h, q, k: 5 * torch.tanh(s / 5) + h)

    def read(words):
        return program.read(np.array(words, np.int64).tobytes())

    assert read(good)[0] is not None
    refused = 0
    for place in range(program.SECTIONS, len(good)):
        for value in (-1, 10**6, 97, 2**40):
            changed = [*good]
            changed[place] = value
            try:
                read(changed)
            except ValueError as error:
                assert "program" in str(error)
                refused += 1
    assert refused > 2 * len(good)
    for cut in range(len(good)):
        if any(good[: program.SECTIONS][:cut]):
            with pytest.raises(ValueError, match="program"):
                read(good[:cut])
