"""Biases by distance: the table's definition in loops, T5 and ALiBi against transformers and the paper, kernels against the definition."""

import math

import pytest
import torch
from attention_options import RNG, options
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import cpu, scores
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config

SCORES = tuple(scores.SCORES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(table, centre, lq, lk):
    """(1, Hq or 1, Lq, Lk), element by element."""
    rows = []
    for i in range(lq):
        d = [j - (i + lk - lq) for j in range(lk)]
        rows.append(torch.stack([table[:, min(max(x + centre, 0), table.shape[1] - 1)] for x in d], -1))
    return torch.stack(rows, 1)[None]


@pytest.mark.parametrize("heads", (1, 4))
@pytest.mark.parametrize("centre", (-3, 0, 4, 20))
def test_definition(heads, centre):
    q, k, v = testing.attention_inputs(2, 4, 2, 5, 7, 3, dtype=torch.float64)
    table = testing.random_tensor(heads, 9, dtype=torch.float64, seed=3, requires_grad=True)

    def mine(q, k, v, table):
        return fa.attention(q, k, v, bias=fa.DistanceBias(table, centre), return_lse=True)

    def theirs(q, k, v, table):
        return fa.attention(q, k, v, bias=dense(table, centre, 5, 7), return_lse=True)

    found, expected = (testing.differentiate(f, (q, k, v, table)) for f in (mine, theirs))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64 sums of some 100 terms of size 1
    assert torch.autograd.gradcheck(mine, (q, k, v, table))


def test_distances_in_documents_and_in_padding():
    """Each document counts from its own last key; padding's keys only where the mask is aligned to what is none."""
    q, k, v = testing.attention_inputs(1, 2, 1, 12, 14, 4, dtype=torch.float64)
    bias = fa.DistanceBias(testing.random_tensor(2, 9, dtype=torch.float64, seed=3), 4)
    mask = fa.Mask(cu_seqlens_q=torch.tensor([0, 5, 12]), cu_seqlens_k=torch.tensor([0, 4, 14]))
    packed = fa.attention(q, k, v, bias=bias, mask=mask)
    parts = [
        fa.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], bias=bias)
        for a, b, c, d in ((0, 5, 0, 4), (5, 12, 4, 14))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 2), rtol=0, atol=1e-14)
    lengths = torch.tensor([9])
    padded = fa.attention(
        q, k, v, bias=bias, mask=fa.Mask(causal=True, key_lengths=lengths, align="key_lengths")
    )
    cut = fa.attention(q, k[:, :, :9], v[:, :, :9], bias=bias, mask=fa.Mask(causal=True))
    torch.testing.assert_close(padded, cut, rtol=0, atol=1e-14)


def small_tiles(patch, pack_kib):
    values = {"block_q": 24, "block_k": 32, "decode_rows": 8, "chunk_k": 64, "pack_kib": pack_kib}
    names = {op: _config.tunings()[op, "cpu"].parameters for op in ("attention", "attention_backward")}
    patch.setattr(
        cpu, "lookup", lambda op, *_, **more: _config.Choice({n: values[n] for n in names[op]}, "override")
    )


@pytest.mark.parametrize("score", SCORES)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    own=st.booleans(),
    size=st.integers(1, 40),
    pack_kib=st.sampled_from((0, 4096)),
    threads=st.sampled_from((1, 2, 5)),
)
def test_kernels_are_within_the_error_budget(
    isa, nan_outputs, score, data, dtype, wide, own, size, pack_kib, threads
):
    problem = data.draw(testing.attention_problems())
    choice, with_sink = data.draw(st.just(({}, False)) | options(score))
    centre = data.draw(st.integers(-5, size + 5))
    inputs = problem.inputs(dtype)
    of_table = torch.float32 if wide else dtype
    table = testing.random_tensor(
        problem.heads if own else 1, size, dtype=of_table, seed=6, requires_grad=True
    )

    def run(backend):
        return lambda q, k, v, table: fa.attention(
            q, k, v, score=score, bias=fa.DistanceBias(table, centre), mask=problem.mask(), sink=0.5 if with_sink else None,
            rng=torch.tensor(RNG), return_lse=scores.SCORES[score].normalised, backend=backend, **choice,
        )  # fmt: skip

    terms = max(
        problem.k_len * problem.heads + problem.q_len * inputs[0].shape[0] + problem.head_dim,
        inputs[0].shape[0] * problem.heads * problem.q_len * problem.k_len,
    )
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, pack_kib)
        patch.setattr(_native, "threads", lambda: threads)
        testing.check_op(
            run("cpu"), run("reference"), (*inputs, table), terms=terms, names=("q", "k", "v", "table")
        )


def test_t5_is_transformers():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    for decoder, lq, lk in ((False, 5, 9), (False, 150, 150), (True, 150, 150), (True, 1, 40)):
        config = T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=decoder)
        layer = T5Attention(config, has_relative_attention_bias=True)
        expected = layer.compute_bias(lk, lk)[:, :, lk - lq :]
        bias = fa.bias.t5(layer.relative_attention_bias.weight, lq, lk, bidirectional=not decoder)
        q = torch.zeros(1, 4, lq, 8, requires_grad=True)
        found = dense(bias.table, bias.centre, lq, lk)
        assert torch.equal(found, expected)
        v = torch.eye(lk).expand(1, 4, lk, lk)
        if lk < 150:  # weights that are softmax of the bias alone
            out = fa.attention(q, torch.zeros(1, 4, lk, 8), v, bias=bias, scale=1.0)
            torch.testing.assert_close(out, expected.softmax(-1), rtol=1e-6, atol=1e-7)


def test_alibi_is_the_papers():
    """Slopes 1/2, 1/4, ... for 8 heads; of 12, the 8 and every second one of 16."""
    assert torch.equal(fa.bias.alibi_slopes(8), torch.tensor([2.0**-k for k in range(1, 9)]))
    assert torch.equal(fa.bias.alibi_slopes(12)[8:], torch.tensor([2.0 ** (-k / 2) for k in (1, 3, 5, 7)]))
    q, k, v = testing.attention_inputs(1, 4, 4, 6, 6, 8, dtype=torch.float64)
    slopes = fa.bias.alibi_slopes(4).double().requires_grad_()
    far = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    mask = fa.Mask(causal=True)

    def mine(q, k, v, slopes):
        return fa.attention(q, k, v, bias=fa.bias.alibi(slopes, 6, 6), mask=mask)

    def theirs(q, k, v, slopes):
        return fa.attention(q, k, v, bias=-slopes[:, None, None] * far, mask=mask)

    found, expected = (testing.differentiate(f, (q, k, v, slopes)) for f in (mine, theirs))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ("aot_eager", "inductor"))
def test_compiles(mode):
    q, k, v = testing.attention_inputs(2, 4, 2, 20, 30, 8)
    weight = testing.random_tensor(32, 4, seed=9, requires_grad=True)

    def call(q, k, v, weight):
        return fa.attention(q, k, v, bias=fa.bias.t5(weight, 20, 30), scale=1.0, backend="cpu")

    eager = testing.differentiate(call, (q, k, v, weight))
    found = testing.differentiate(torch.compile(call, fullgraph=True, backend=mode), (q, k, v, weight))
    for a, b in zip((*eager[0], *eager[1]), (*found[0], *found[1]), strict=True):
        # a compiler sums the table's rows in an order of its own
        assert testing.max_error(a, b) <= testing.absolute_bound(torch.float32, 1200, testing.max_finite(a))


def test_operators_and_their_gradients():
    q, k, v = testing.attention_inputs(1, 2, 2, 9, 12, 8)
    strip = testing.random_tensor(2, 20, seed=9, requires_grad=True)
    from fastattn.masks import NO_MASK_ARGS

    op = torch.ops.fastattn.attention.default
    torch.library.opcheck(op, (q, k, v, strip, None, 0, 1.0, 0.0, None, 0, None, *NO_MASK_ARGS, ""))


_CASE = """
import torch, fastattn as fa
torch.set_num_threads(2)
def problem(length, wanted):
    return *(torch.randn(1, 2, length, 32).requires_grad_() for _ in range(3)), torch.randn(2, 129).requires_grad_(wanted)
def run(q, k, v, table):
    out = fa.attention(q, k, v, bias=fa.DistanceBias(table, 64), backend="cpu")
    return torch.autograd.grad(out, [t for t in (q, k, v, table) if t.requires_grad], torch.ones_like(out))
"""


def test_memory_is_linear_in_the_length(peak_bytes):
    once, twice = (peak_bytes(_CASE, (40, True), (length, True)) for length in (3000, 6000))
    assert twice < 2.2 * once + (2 << 20)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: fa.DistanceBias(torch.ones(3), 0), ValueError, "table must have 2 dimensions"),
        (lambda q: fa.DistanceBias(torch.ones(1, 0), 0), ValueError, "table must have a distance at least"),
        (
            lambda q: fa.DistanceBias(torch.ones(1, 3), 0.5),
            TypeError,
            "centre must be an integer, given float 0.5",
        ),
        (lambda q: fa.DistanceBias([1.0], 0), TypeError, "table must be a tensor"),
        (
            lambda q: fa.attention(q, q, q, bias=fa.DistanceBias(torch.ones(3, 4), 0)),
            ValueError,
            "bias, a DistanceBias, must have a table of q's dtype or float32 with 2 heads or one, given",
        ),
        (
            lambda q: fa.attention(q, q, q, bias=fa.DistanceBias(torch.ones(2, 4).double(), 0)),
            ValueError,
            "bias, a DistanceBias, must have a table of q's dtype or float32",
        ),
        (lambda q: fa.bias.t5(torch.ones(2, 2), 3, 3), ValueError, "leave nothing to widen"),
        (lambda q: fa.bias.t5(torch.ones(32, 2), 3, 3, max_distance=4), ValueError, "leave nothing to widen"),
    ],
)
def test_bad_tables(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(1, 2, 3, 4))


def test_wrong_sizes_reach_no_kernel():
    from fastattn.masks import NO_MASK_ARGS

    q = torch.ones(1, 2, 3, 4)
    for strip in (torch.ones(2, 4), torch.ones(3, 5), torch.ones(2, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="bias by distance must be float32 of shape"):
            torch.ops.fastattn.attention(q, q, q, strip, None, 0, 1.0, 0.0, None, 0, None, *NO_MASK_ARGS, "")


def test_infinities_of_a_table_take_keys_out(isa, nan_outputs):
    """A window, as a table of -inf beyond it."""
    q, k, v = testing.attention_inputs(1, 2, 2, 40, 40, 8)
    table = torch.full((1, 7), -math.inf)
    table[:, 1:-1] = 0.0
    found = fa.attention(q, k, v, bias=fa.DistanceBias(table, 3), backend="cpu")
    expected = fa.attention(q, k, v, mask=fa.Mask(window=(2, 2)), backend="cpu")
    assert testing.max_error(found, expected) <= testing.absolute_bound(
        torch.float32, 40, testing.max_finite(v)
    )
