"""Sinks, soft cap and dropout of attention: the definition by hand, the CPU kernels against it, and what callers may give."""

import math

import pytest
import torch
from attention_options import RNG, check, options
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import reference, scores, tuning  # noqa: F401  the last declares what is overridden
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config

SCORES = tuple(scores.SCORES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# small tiles, so that short sequences cross many of their edges
TILES = {
    ("attention", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096, "chunk_k": 64},
    ("attention_backward", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096},
}


def qkv(*shape, **more):
    return testing.attention_inputs(*shape, dtype=torch.float64, **more)


# --- the definition ---------------------------------------------------------------------------------------------------


def by_hand(q, k, v, *, scale, softcap=None, bias=0.0, sink=None, kept=None, share=1.0):
    """softmax attention with every option, from the documentation: a sink is one more column, cut off again."""
    s = scale * q @ k.mT
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s + bias
    if sink is not None:
        s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1)
    weight = s.softmax(-1)[..., : k.shape[2]]
    if kept is not None:
        weight = weight * kept / share
    return weight @ v, lse


def test_definition():
    q, k, v = qkv(2, 3, 3, 5, 7, 4)
    sink = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    rng = torch.tensor(RNG)
    kept = reference.kept((2, 3, 5, 7), 16384, rng)

    def mine(*x):
        return fa.attention(
            *x[:3], scale=0.7, softcap=1.5, bias=0.25, sink=x[3], dropout_p=0.25, rng=rng, return_lse=True, backend="reference"
        )  # fmt: skip

    def theirs(*x):
        return by_hand(*x[:3], scale=0.7, softcap=1.5, bias=0.25, sink=x[3], kept=kept, share=0.75)

    found, gradients = testing.differentiate(mine, (q, k, v, sink))
    expected, true = testing.differentiate(theirs, (q, k, v, sink))
    for a, b in zip((*found, *gradients), (*expected, *true), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64 sums of 7 terms of size 1
    assert torch.autograd.gradcheck(mine, (q, k, v, sink))


def test_one_key_and_a_sink():
    """out = v sigmoid(s - t)."""
    q, k, v = (torch.tensor([[[[x]]]], dtype=torch.float64) for x in (2.0, 3.0, 5.0))
    out, lse = fa.attention(q, k, v, scale=0.5, sink=1.0, return_lse=True)
    assert math.isclose(float(out), 5 / (1 + math.exp(-2)), rel_tol=1e-15)
    assert math.isclose(float(lse), 3 + math.log1p(math.exp(-2)), rel_tol=1e-15)


def test_philoxs_known_answers():
    """The vectors of Random123's kat_vectors, philox4x32 of ten rounds."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        found = reference.philox([torch.tensor(x) for x in counter], [torch.tensor(x) for x in key])
        assert tuple(map(int, found)) == words


def test_which_number_a_key_has():
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # of the first group of keys, seed and offset 0
    for t, number in enumerate([w & 0xFFFF for w in words] + [w >> 16 for w in words]):
        for dropped, expected in ((number, True), (number + 1, False)):
            kept = reference.kept((1, 1, 1, 8), dropped, torch.tensor([0, 0]))
            assert bool(kept[0, 0, 0, t]) == expected


def test_the_share_that_is_dropped_and_its_independence():
    kept = reference.kept((2, 4, 256, 256), 6554, torch.tensor([3, 0])).double()
    n = kept.numel()
    share = 1 - 6554 / 65536
    deviation = (share * (1 - share) / n) ** 0.5
    assert abs(float(kept.mean()) - share) < 5 * deviation
    centred = (kept - share) / (share * (1 - share)) ** 0.5
    for dim in range(
        4
    ):  # neighbours in batch, head, query and key; of independent ones the mean product is below 5 / sqrt(n)
        a, b = centred.narrow(dim, 0, kept.shape[dim] - 1), centred.narrow(dim, 1, kept.shape[dim] - 1)
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
    other = reference.kept((2, 4, 256, 256), 6554, torch.tensor([3, 1])).double()
    assert abs(float((centred * (other - share)).mean())) < 5 / n**0.5


def test_dropout_leaves_the_mean():
    """Over many draws the mean of the output is the undropped one: each has a deviation below |w v| / sqrt(keep) a term."""
    q, k, v = qkv(1, 1, 1, 2, 16, 4, requires_grad=False)
    whole = fa.attention(q, k, v)
    runs = torch.stack(
        [fa.attention(q, k, v, dropout_p=0.3, rng=torch.tensor([seed, 0])) for seed in range(2000)]
    )
    assert testing.max_error(runs.mean(0), whole) < 5 * float(runs.std(0).max()) / 2000**0.5


def test_a_sink_of_minus_infinity_is_none_and_one_of_infinity_takes_all(isa):
    q, k, v = testing.attention_inputs(1, 2, 1, 40, 50, 16)
    plain = testing.differentiate(lambda *x: fa.attention(*x, return_lse=True), (q, k, v))
    none = testing.differentiate(lambda *x: fa.attention(*x, sink=-math.inf, return_lse=True), (q, k, v))
    for a, b in zip((*plain[0], *plain[1]), (*none[0], *none[1]), strict=True):
        assert torch.equal(a, b)
    outputs, gradients = testing.differentiate(lambda *x: fa.attention(*x, sink=1e30), (q, k, v))
    assert not any(t.any() for t in (*outputs, *gradients))


def test_rows_without_keys_have_the_sink(isa, nan_outputs):
    q, k, v = testing.attention_inputs(1, 2, 1, 6, 4, 8)
    mask = fa.Mask(causal=True)  # rows 0 and 1 attend nothing
    sink = torch.tensor([0.5, -1.0], requires_grad=True)
    out, lse = fa.attention(q, k, v, mask=mask, sink=sink, return_lse=True, backend="cpu")
    assert not out[:, :, :2].any()
    assert torch.equal(lse[0, :, :2], sink.detach()[:, None].expand(2, 2))
    dq, ds = torch.autograd.grad(lse[:, :, :2].sum() + out[:, :, :2].sum(), (q, sink), materialize_grads=True)
    assert not dq.any() and torch.equal(ds, torch.tensor([2.0, 2.0]))


def test_a_far_cap_is_none(isa):
    q, k, v = testing.attention_inputs(1, 2, 1, 40, 50, 16)
    plain = testing.differentiate(lambda *x: fa.attention(*x), (q, k, v))
    capped = testing.differentiate(lambda *x: fa.attention(*x, softcap=1e25), (q, k, v))
    for a, b in zip((*plain[0], *plain[1]), (*capped[0], *capped[1]), strict=True):
        # scores are rounded at other places: a few units in the last place of weights, in sums of 50
        assert testing.max_error(a, b) <= testing.absolute_bound(torch.float32, 50, 4 * testing.max_finite(b))


@pytest.mark.parametrize("raw", (-60.0, -1.1, 0.0, 0.59, 0.61, 12.0, 50.0))
def test_slopes_of_a_cap_are_relatively_accurate(isa, raw):
    """ds/draw is 1 - tanh^2, 4 e^-2x at large x: formed as 1 - t * t it would be 0 from 9 on."""
    q, k, v = torch.tensor([[[[raw]]]]), torch.ones(1, 1, 2, 1), torch.tensor([[[[0.0], [1.0]]]])
    k[0, 0, 1] = 0.0  # its score is 0: weights sigmoid(-capped) and sigmoid(capped)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(fa.attention(q, k, v, scale=1.0, softcap=2.0, backend="cpu").sum(), q)
    wide = q.detach().double().requires_grad_()
    capped = 2 * torch.tanh(wide / 2)
    slope = 1 / torch.cosh(wide.detach() / 2) ** 2
    weight = torch.sigmoid(capped.detach())
    true = -weight * (1 - weight) * slope
    # dP - delta cancels to a rounding of values of 1; exponentials and quotients are right to a few units
    assert testing.relative_error(dq, true) < 40 * testing.EPS32 / float(min(weight, 1 - weight))


# --- the CPU kernels -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles():
    with _config.override(TILES):
        yield


@pytest.mark.parametrize("score", SCORES)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_options_are_within_the_error_budget(isa, nan_outputs, small_tiles, score, data, dtype, bias):
    check("cpu", score, dtype, data.draw(testing.attention_problems()), data.draw(options(score)), bias=bias)


@pytest.mark.parametrize("score", SCORES)
def test_what_is_dropped_depends_on_positions_alone(isa, score, monkeypatch):
    """The same weights from one query row decoded alone, other tiles and threads, grouped queries, and from the definition."""
    q, k = torch.zeros(2, 4, 70, 16), torch.zeros(2, 2, 133, 16)
    v = torch.eye(133).expand(2, 2, -1, -1)  # an output is its row of weights
    rng = torch.tensor(RNG)
    call = {"score": score, "dropout_p": 0.3, "rng": rng, "bias": 0.0, "backend": "cpu"}
    kept = reference.kept((2, 4, 70, 133), round(0.3 * 65536), rng)
    whole = fa.attention(q, k, v, **call)
    assert torch.equal(whole != 0, kept)
    for tiles in ({"block_q": 24, "block_k": 32}, {"block_q": 96, "block_k": 256}):
        with _config.override({("attention", "cpu"): tiles}):
            assert torch.equal(fa.attention(q, k, v, **call) != 0, kept)
    first = fa.attention(q[:, :, :1], k, v, **call)
    assert torch.equal(first != 0, kept[:, :, :1])
    monkeypatch.setattr(_native, "threads", lambda: 5)
    assert torch.equal(fa.attention(q, k, v, **call) != 0, kept)
    documents = fa.Mask(cu_seqlens_q=torch.tensor([0, 11, 70]), cu_seqlens_k=torch.tensor([0, 21, 133]))
    packed = fa.attention(q[:1], k[:1], v[:1], mask=documents, **call)
    within = (torch.arange(70) < 11)[:, None] == (torch.arange(133) < 21)
    assert torch.equal(packed != 0, kept[:1] & within)


def test_torchs_seed_and_generators_reproduce_dropout():
    q, k, v = testing.attention_inputs(1, 2, 2, 20, 30, 8, requires_grad=False)
    torch.manual_seed(3)
    first, second = (fa.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(fa.attention(q, k, v, dropout_p=0.5), first)
    generator = torch.Generator().manual_seed(9)
    drawn = fa.attention(q, k, v, dropout_p=0.5, rng=generator)
    assert torch.equal(fa.attention(q, k, v, dropout_p=0.5, rng=generator.manual_seed(9)), drawn)
    state = torch.random.get_rng_state()
    fa.attention(q, k, v, dropout_p=0.0)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn where nothing is dropped


def test_checkpointing_recomputes_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    q, k, v = testing.attention_inputs(1, 2, 2, 20, 30, 8)

    def call(*x):
        return fa.attention(*x, dropout_p=0.5)

    results = []
    for run in (call, lambda *x: checkpoint(call, *x, use_reentrant=False)):
        torch.manual_seed(1)
        out = run(q, k, v)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ("aot_eager", "inductor"))
def test_compiles(mode):
    q, k, v = testing.attention_inputs(1, 2, 2, 20, 30, 8)
    sink = torch.zeros(2, requires_grad=True)
    rng = torch.tensor(RNG)

    def call(q, k, v, sink):
        return fa.attention(q, k, v, sink=sink, softcap=2.0, dropout_p=0.5, rng=rng)

    eager = testing.differentiate(call, (q, k, v, sink))
    found = testing.differentiate(torch.compile(call, fullgraph=True, backend=mode), (q, k, v, sink))
    for a, b in zip((*eager[0], *eager[1]), (*found[0], *found[1]), strict=True):
        assert torch.equal(a, b)
    drawing = torch.compile(lambda *x: fa.attention(*x, dropout_p=0.5), fullgraph=True, backend=mode)
    torch.manual_seed(0)
    first = drawing(q, k, v)
    assert not torch.equal(first, drawing(q, k, v))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sink": 0.0, "score": "sigmoid"}, ValueError, "sink is for softmax only"),
        ({"sink": torch.zeros(3)}, ValueError, "sink must be float32 of shape"),
        ({"sink": torch.zeros(2, dtype=torch.float64)}, ValueError, "sink must be float32"),
        ({"sink": torch.zeros(2, 1)}, ValueError, "sink must have 1 dimensions"),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number above 0"),
        ({"softcap": math.inf}, ValueError, "softcap must be a finite number above 0"),
        ({"softcap": math.nan}, ValueError, "softcap must be a finite number above 0"),
        ({"softcap": "30"}, TypeError, "softcap must be a number"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must lie in \[0, 1\], given 1.5"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\]"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p must lie in \[0, 1\]"),
        ({"dropout_p": 0.1, "rng": 3}, TypeError, "rng must be a torch.Generator, an int64 tensor"),
        ({"dropout_p": 0.1, "rng": torch.zeros(2)}, ValueError, "rng must be int64 of shape"),
        (
            {"dropout_p": 0.1, "rng": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "rng must be int64 of shape",
        ),
    ],
)
def test_bad_options(given, error, message):
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(error, match=message):
        fa.attention(q, q, q, **given)
