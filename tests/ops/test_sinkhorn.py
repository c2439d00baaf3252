"""Sinkhorn's iterations: the published form, the causal and packed ones, frozen potentials, and the native kernels."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native


def published_sinkhorn(scores, temperature, iterations):
    q = (scores.double() / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(2, keepdim=True)
    return q


def test_sinkhorn_is_the_published_iteration():
    scores = testing.random_tensor(2, 50, 8, dtype=torch.float64)
    actual, potentials = fa.sinkhorn(scores, temperature=0.5, return_potentials=True)
    assert testing.max_error(actual, published_sinkhorn(scores, 0.5, 10)) < 1e-13
    assert testing.max_error(actual.sum(-1), torch.ones(2, 50)) < 1e-13
    assert testing.max_error(fa.sinkhorn(scores, temperature=0.5, potentials=potentials), actual) < 1e-13


def test_sinkhorn_never_overflows():
    """exp(scores / temperature) alone would be e^1000."""
    scores = testing.random_tensor(1, 30, 4, scale=30.0, requires_grad=True)
    (out,), (grad,) = testing.differentiate(lambda s: fa.sinkhorn(s, temperature=0.03), (scores,))
    assert out.isfinite().all() and grad.isfinite().all()


def test_sinkhorn_causal_sees_no_future():
    scores = testing.random_tensor(1, 20, 4, dtype=torch.float64)
    whole, potentials = fa.sinkhorn(scores, causal=True, return_potentials=True)
    for length in (1, 7, 20):
        part, last = fa.sinkhorn(scores[:, :length], causal=True, return_potentials=True)
        assert testing.max_error(part, whole[:, :length]) < 1e-12
    assert testing.max_error(last, potentials) == 0
    frozen = fa.sinkhorn(scores[:, 19:], potentials=potentials)
    assert testing.max_error(frozen, whole[:, 19:]) < 1e-12


def prefixed_sinkhorn(scores, prefix, temperature, iterations):
    """Token by token in float64, without logarithms: the tokens before max(l + 1, prefix) are in l's column sums."""
    x = (scores.double() / temperature).exp()  # (L, G)
    ends = [max(i + 1, prefix) for i in range(len(x))]
    row = torch.ones(len(x), 1, dtype=torch.float64)
    for _ in range(iterations):
        columns = torch.stack([(x * row)[:end].sum(0) for end in ends])
        row = 1 / (x / columns).sum(1, keepdim=True)
    return x * row / columns


@given(data=st.data())
def test_prefix_is_the_rule(data):
    length = data.draw(st.integers(1, 20))
    prefixes = data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3))
    iterations = data.draw(st.integers(1, 4))
    scores = testing.random_tensor(len(prefixes), length, 4, dtype=torch.float64)
    options = {"temperature": 0.5, "iterations": iterations, "causal": True}
    actual = fa.sinkhorn(scores, prefix_lengths=torch.tensor(prefixes), **options)
    for one, of, prefix in zip(actual, scores, prefixes, strict=True):
        assert testing.max_error(one, prefixed_sinkhorn(of, prefix, 0.5, iterations)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_prefix_sees_itself_and_no_future(backend):
    """After it, a token changes none before it; in it, one changes all."""
    scores = testing.random_tensor(1, 300, 4)
    options = {"causal": True, "prefix_lengths": torch.tensor([140]), "backend": backend}
    before = fa.sinkhorn(scores, **options)
    for token, unchanged in ((299, 299), (200, 200), (140, 140), (139, 0), (70, 0)):
        other = scores.clone()
        other[:, token, 0] += 1  # of one group: one of all changes no share
        changed = (fa.sinkhorn(other, **options) != before).any(-1)[0]
        assert not changed[:unchanged].any() and changed[token] and changed[0] == (unchanged == 0)


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 0.0)]
)
def test_a_prefix_of_everything_is_the_plain_form(backend, dtype, bound):
    scores = testing.random_tensor(2, 300, 5, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([300, 211])
    options = {"temperature": 0.5, "lengths": lengths, "return_potentials": True, "backend": backend}
    for prefixes in (lengths, torch.tensor([300, 300])):  # beyond the tokens there are none
        runs = [
            testing.differentiate(lambda s, o=o: fa.sinkhorn(s, **options, **o)[0], (scores,))
            for o in ({}, {"causal": True, "prefix_lengths": prefixes})
        ]
        for (plain,), (prefixed,) in zip(*runs, strict=True):
            assert testing.max_error(plain, prefixed) <= bound * (1 + testing.max_finite(plain))
        _, plain = fa.sinkhorn(scores, **options)
        _, prefixed = fa.sinkhorn(scores, causal=True, prefix_lengths=prefixes, **options)
        assert testing.max_error(plain, prefixed) <= bound * (1 + testing.max_finite(plain))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_prefix_of_nothing_changes_nothing(backend):
    scores = testing.random_tensor(2, 300, 5, requires_grad=True)
    none = torch.zeros(2, dtype=torch.int64)
    (out,), (grad,) = testing.differentiate(lambda s: fa.sinkhorn(s, causal=True, backend=backend), (scores,))
    (same,), (alike,) = testing.differentiate(
        lambda s: fa.sinkhorn(s, causal=True, prefix_lengths=none, backend=backend), (scores,)
    )
    assert torch.equal(out, same) and torch.equal(grad, alike)


def test_bad_prefixes_are_refused():
    scores, of = torch.zeros(1, 5, 3), torch.tensor
    for options, error, message in (
        ({"prefix_lengths": of([2]), "causal": False}, ValueError, "prefix_lengths needs causal to be True"),
        ({"prefix_lengths": of([6])}, ValueError, r"prefix_lengths must lie in \[0, 6\)"),
        ({"prefix_lengths": of([-1])}, ValueError, r"prefix_lengths must lie in \[0, 6\)"),
        ({"prefix_lengths": of([1, 2])}, ValueError, r"prefix_lengths must have shape"),
        ({"prefix_lengths": of([1.0])}, TypeError, "prefix_lengths must be int32 or int64"),
        (
            {"prefix_lengths": of([3, 1]), "cu_seqlens": of([0, 2, 5])},
            ValueError,
            r"prefix_lengths\[0\] must lie in \[0, 2\], the length of its document, given 3",
        ),
    ):
        with pytest.raises(error, match=f"fastattn.sinkhorn: {message}"):
            fa.sinkhorn(scores, **{"causal": True, **options})


@pytest.mark.parametrize("causal", [False, True])
def test_sinkhorn_ignores_padding(causal):
    scores = testing.random_tensor(3, 20, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([20, 13, 0])
    (out,), (grad,) = testing.differentiate(
        lambda s: fa.sinkhorn(s, lengths=lengths, causal=causal), (scores,)
    )
    alone = fa.sinkhorn(scores[1:2, :13], causal=causal)
    assert testing.max_error(out[1:2, :13], alone) < 1e-12
    assert (out[1, 13:] == 0).all() and (out[2] == 0).all()
    assert (grad[1, 13:] == 0).all() and (grad[2] == 0).all() and grad.isfinite().all()
    assert (fa.focus_groups(out, top_k=2)[1, 13:] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "prefix_lengths": torch.tensor([5, 2])}]
)
def test_sinkhorn_gradcheck(options):
    scores = testing.random_tensor(2, 7, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 4])
    assert torch.autograd.gradcheck(
        lambda s: fa.sinkhorn(s, temperature=0.7, iterations=4, lengths=lengths, **options),
        (scores,),
        fast_mode=True,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 0)]
)
def test_documents_are_balanced_one_by_one(causal, backend, dtype, bound):
    """Bitwise by the kernels; the reference sums padding too, in another order."""
    cuts, lengths = [0, 9, 9, 40], torch.tensor([6, 0, 31])
    scores = testing.random_tensor(1, 45, 5, dtype=dtype, requires_grad=True)
    options = {"causal": causal, "temperature": 0.5, "return_potentials": True, "backend": backend}
    grad = testing.random_tensor(1, 45, 5, dtype=dtype, seed=3)
    out, potentials = fa.sinkhorn(scores, cu_seqlens=torch.tensor(cuts), lengths=lengths, **options)
    (slope,) = torch.autograd.grad(out, scores, grad)
    assert potentials.shape == (3, 1, 5) and (potentials[1] == 0).all()
    assert (out[:, 6:9] == 0).all() and (out[:, 40:] == 0).all()
    assert (slope[:, 6:9] == 0).all() and (slope[:, 40:] == 0).all()
    for i, span in ((0, slice(0, 6)), (2, slice(9, 40))):
        leaf = scores[:, span].detach().requires_grad_()
        alone, found = fa.sinkhorn(leaf, **options)
        (expected,) = torch.autograd.grad(alone, leaf, grad[:, span])
        assert testing.max_error(out[:, span], alone) <= bound
        assert testing.max_error(potentials[i : i + 1], found) <= bound
        assert testing.max_error(slope[:, span], expected) <= bound


@pytest.mark.parametrize(
    ("cuts", "message"),
    [([1, 4], "must start at 0"), ([0, 3, 2], "must start at 0, not decrease"), ([0, 6], "end at most at 5")],
)
def test_bad_offsets_are_refused(cuts, message):
    with pytest.raises(ValueError, match=f"fastattn.sinkhorn: cu_seqlens {message}|{message}"):
        fa.sinkhorn(torch.zeros(1, 5, 3), cu_seqlens=torch.tensor(cuts))
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of one"):
        fa.sinkhorn(torch.zeros(2, 5, 3), cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal):
    scores = testing.random_tensor(1, 12, 4, requires_grad=True)
    for lengths, cuts in ((torch.tensor([9]), None), (None, torch.tensor([0, 5, 11]))):
        torch.library.opcheck(
            torch.ops.fastattn.sinkhorn.default, (scores, lengths, cuts, None, 0.1, 4, causal, "")
        )


# --- native kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(params=testing.isas())
def isa(request):
    with _native.use_cpu_isa(request.param):
        yield request.param


def call(backend, **options):
    return lambda scores: fa.sinkhorn(scores, backend=backend, **options)


@given(data=st.data())
def test_native(isa, data):
    """Outputs and gradients against float64 autograd of the iterations."""
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 65, 300]), min_size=1, max_size=2))
    # one token, like one group, has a share of 1 or 1 / G whatever its score: gradients and so budgets of 0
    assume(max(lengths) != 1)
    groups = data.draw(st.sampled_from([2, 4, 8, 9, 17, 63]))
    options = {
        "causal": data.draw(st.booleans()),
        "iterations": data.draw(st.sampled_from([1, 2, 5])),
        "temperature": data.draw(st.sampled_from([0.1, 1.0, 7.0])),
    }
    if data.draw(st.booleans()):
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        scores = testing.random_tensor(1, sum(lengths) + 3, groups, requires_grad=True)
    else:
        options["lengths"] = torch.tensor(lengths)
        scores = testing.random_tensor(
            len(lengths), max(lengths) + data.draw(st.integers(0, 3)), groups, requires_grad=True
        )
    if options["causal"] and data.draw(st.booleans()):
        options["prefix_lengths"] = torch.tensor([data.draw(st.integers(0, n)) for n in lengths])
    # every iteration adds sums over at most 300 tokens and 63 groups
    terms = options["iterations"] ** 2 * (300 + 63)
    with testing.nan_filled_outputs():
        testing.check_op(call("cpu", **options), call("reference", **options), (scores,), terms=terms)


@pytest.mark.parametrize("causal", [False, True])
def test_native_single_group_and_single_token(isa, causal):
    for shape, share in (((1, 300, 1), 1.0), ((2, 1, 5), 0.2)):
        scores = testing.random_tensor(*shape, requires_grad=True)
        (out,), (grad,) = testing.differentiate(call("cpu", causal=causal), (scores,))
        # x of up to 40 base 2 in float32, a gradient of up to 2 / temperature = 20 times its error
        assert testing.max_error(out, torch.full(shape, share)) < 40 * 4 * testing.EPS32
        assert grad.abs().max() < 20 * 10 * 40 * 4 * testing.EPS32


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_native_dtypes_and_potentials(isa, nan_outputs, dtype, causal):
    scores = testing.random_tensor(2, 300, 8, dtype=dtype, requires_grad=True)
    options = {"causal": causal, "temperature": 0.3}
    testing.check_op(call("cpu", **options), call("reference", **options), (scores,), terms=100 * 308)
    _, actual = call("cpu", return_potentials=True, **options)(scores)
    _, expected = call("reference", return_potentials=True, **options)(scores.double())
    # x of up to 4 / 0.3 and a log-sum-exp of them, each rounded in float32, over ten iterations
    assert testing.max_error(actual, expected) < 10 * 20 * testing.EPS32 * 4


@pytest.mark.parametrize("causal", [False, True])
def test_native_extremes(isa, causal):
    """x of +-1000: groups that nobody takes, tokens that take one group wholly."""
    scores = testing.random_tensor(1, 200, 4, scale=30.0, requires_grad=True)
    options = {"temperature": 0.03, "causal": causal}
    (out,), (grad,) = testing.differentiate(call("cpu", **options), (scores,))
    assert out.isfinite().all() and grad.isfinite().all()
    # x, u and v of up to max|x| are added base 2 in float32: 2^ of four roundings of that
    largest = float(scores.detach().abs().max()) / 0.03 * 1.4427
    assert testing.max_error(out.sum(-1), torch.ones(1, 200)) < 4 * largest * testing.EPS32


@pytest.mark.parametrize("causal", [False, True])
def test_native_is_deterministic_for_any_number_of_threads(isa, causal):
    scores = testing.random_tensor(3, 600, 8, requires_grad=True)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(testing.differentiate(call("cpu", causal=causal), (scores,)))
    finally:
        torch.set_num_threads(before)
    for (out,), (grad,) in runs[1:]:
        assert torch.equal(out, runs[0][0][0]) and torch.equal(grad, runs[0][1][0])


def test_frozen_potentials_continue_a_native_prefill(isa):
    scores = testing.random_tensor(1, 90, 8)
    whole, potentials = fa.sinkhorn(scores, causal=True, return_potentials=True)
    for length in (1, 40, 89):
        _, frozen = fa.sinkhorn(scores[:, : length + 1], causal=True, return_potentials=True)
        actual = fa.sinkhorn(scores[:, length : length + 1], potentials=frozen)
        # the same softmax(x + v) by torch and by the kernel; x of up to 40
        assert testing.max_error(actual, whole[:, length : length + 1]) < 40 * 4 * testing.EPS32
    assert potentials.shape == (1, 1, 8)
