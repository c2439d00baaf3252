"""Triton Sinkhorn in the interpreter, against the reference: whole and causal, padded and packed, outputs, potentials, gradients."""

import pytest
import torch

import fastattn as fa
from fastattn import testing


def call(backend, **options):
    return lambda scores: fa.sinkhorn(scores, backend=backend, **options)


LENGTHS = {
    "whole": ((2, 30), {}),
    "padded": ((3, 40), {"lengths": torch.tensor([39, 17, 0])}),
    "packed": ((1, 45), {"cu_seqlens": torch.tensor([0, 2, 2, 40])}),
    "packed_padded": ((1, 45), {"cu_seqlens": torch.tensor([0, 9, 43]), "lengths": torch.tensor([5, 34])}),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    ("causal", "groups", "prefix"), ((False, 2, 0), (False, 17, 0), (True, 3, 0), (True, 3, 1), (True, 3, 2))
)
def test_is_the_iteration(causal, groups, prefix, kind, nan_outputs):
    """Chunks of 16 tokens: sequences of none, of part of one, of several. Prefixes of half of a sequence and of all of it."""
    shape, options = LENGTHS[kind]
    options = options | {"causal": causal, "temperature": 0.3, "iterations": 2}
    if prefix:
        cuts = options.get("cu_seqlens")
        spans = torch.full((shape[0],), shape[1]) if cuts is None else cuts.diff()
        options["prefix_lengths"] = spans * prefix // 2
    scores = testing.random_tensor(*shape, groups, requires_grad=True)
    # every iteration adds sums over at most 40 tokens and 17 groups
    testing.check_op(call("triton", **options), call("reference", **options), (scores,), terms=4 * 57)
    _, actual = call("triton", return_potentials=True, **options)(scores)
    _, expected = call("reference", return_potentials=True, **options)(scores.double())
    # x of up to 4 / 0.3 and a log-sum-exp of them, each rounded in float32, over two iterations
    assert testing.max_error(actual, expected) < 2 * 20 * testing.EPS32 * 4


@pytest.mark.parametrize("causal", (False, True))
def test_float16(causal, nan_outputs):
    scores = testing.random_tensor(1, 20, 4, dtype=torch.float16, requires_grad=True)
    options = {"causal": causal, "iterations": 1}
    testing.check_op(call("triton", **options), call("reference", **options), (scores,), terms=24)


@pytest.mark.parametrize("causal", (False, True))
def test_extremes(causal, nan_outputs):
    """x of +-1000: groups that nobody takes, tokens that take one group wholly."""
    scores = testing.random_tensor(1, 40, 4, scale=30.0, requires_grad=True)
    options = {"temperature": 0.03, "causal": causal, "iterations": 3}
    (out,), (grad,) = testing.differentiate(call("triton", **options), (scores,))
    assert out.isfinite().all() and grad.isfinite().all()
    # x, u and v of up to max|x| are added base 2 in float32: 2^ of four roundings of that
    largest = float(scores.detach().abs().max()) / 0.03 * 1.4427
    assert testing.max_error(out.sum(-1), torch.ones(1, 40)) < 4 * largest * testing.EPS32


@pytest.mark.parametrize("causal", (False, True))
def test_documents_are_independent_and_runs_repeat(causal, nan_outputs):
    """Changing one document leaves the others bitwise equal."""
    options = {"cu_seqlens": torch.tensor([0, 20, 38]), "causal": causal, "iterations": 2}
    scores = testing.random_tensor(1, 38, 4, requires_grad=True)
    changed = scores.detach().clone()
    changed[:, 20:] += 3 * testing.random_tensor(1, 18, 4, seed=9)
    runs = [testing.differentiate(call("triton", **options), (s.detach().requires_grad_(),)) for s in (scores, scores, changed)]  # fmt: skip
    for (out,), (grad,) in runs[1:]:
        assert torch.equal(out[:, :20], runs[0][0][0][:, :20])
        assert torch.equal(grad[:, :20], runs[0][1][0][:, :20])
    assert torch.equal(runs[0][0][0], runs[1][0][0]) and torch.equal(runs[0][1][0], runs[1][1][0])


def test_a_prefix_of_nothing_changes_nothing(nan_outputs):
    scores = testing.random_tensor(2, 40, 4, requires_grad=True)
    none = {"prefix_lengths": torch.zeros(2, dtype=torch.int64)}
    runs = [
        testing.differentiate(call("triton", causal=True, iterations=2, **o), (scores,)) for o in ({}, none)
    ]
    for (a,), (b,) in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", (False, True))
def test_empty(causal):
    for shape, cuts in (((0, 5, 3), None), ((2, 0, 3), None), ((1, 0, 3), torch.tensor([0, 0]))):
        scores = torch.empty(shape, requires_grad=True)
        out = fa.sinkhorn(scores, causal=causal, cu_seqlens=cuts, backend="triton")
        out.sum().backward()
        assert out.shape == shape and scores.grad.shape == shape


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("groups", (3, 16))
@pytest.mark.parametrize("causal", (False, True))
def test_what_is_no_number_stays(causal, groups, bad, nan_outputs):
    """One such score, a token of them alone and a group of them alone reach what they reach in the definition."""
    options = {"causal": causal, "temperature": 0.5, "iterations": 2}
    for place in ((0, 20, 1), (0, 17), (slice(None), slice(None), 2)):
        scores = testing.random_tensor(1, 32, groups)
        scores[place] = bad
        found, expected = (fa.sinkhorn(scores, backend=one, **options) for one in ("triton", "reference"))
        assert torch.equal(found.isfinite(), expected.isfinite())
        torch.testing.assert_close(found, expected, equal_nan=True)
