"""The native CPU attention against its definition, on every instruction set this machine runs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import (
    scores,
    tuning,  # noqa: F401  declares what is overridden
)
from fastattn.runtime import device as _device
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config

# small tiles, so that short sequences cross many of their edges
TILES = {
    ("attention", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096, "chunk_k": 64},
    ("attention_backward", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096},
}
SCORES = tuple(scores.SCORES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles():
    with _config.override(TILES):
        yield


def make_qkv(length):
    return (testing.random_tensor(1, 2, length, 64, seed=seed) for seed in range(3))


def run(backend, score, mask, bias=None, **options):
    def op(q, k, v):
        return fa.attention(
            q,
            k,
            v,
            score=score,
            mask=mask,
            bias=bias.to(q.dtype) if isinstance(bias, torch.Tensor) else bias,
            return_lse=scores.SCORES[score].normalised,
            backend=backend,
            **options,
        )

    return op


@pytest.mark.parametrize("op", ["attention", "grouped_attention"])
@pytest.mark.parametrize("magnitude", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4, 70])
def test_large_scores_leave_each_row_one_key(isa, nan_outputs, op, magnitude, dtype, length):
    """Scores of 1e6 to 1e17 differ by far more than their rounding: every weight is 0 or 1, and so are the values' gradients."""
    q, k, v = (t * m for t, m in zip(make_qkv(length), (magnitude, magnitude, 1.0), strict=True))
    groups = torch.ones(1, length, dtype=torch.int64)

    def run(*inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        if op == "attention":
            out = fa.attention(*inputs)
        else:
            out = fa.grouped_attention(*inputs, groups, window=3)
        return out, *torch.autograd.grad(out.sum(), inputs[2])

    inputs = [t.to(dtype) for t in (q, k, v)]
    out, grad = run(*inputs)
    expected, expected_grad = run(*(t.double() for t in inputs))
    assert torch.equal(out, expected.to(dtype))
    # These scores show an order of summing: the backward's is another than decoding's, and of grouped bf16 another than that of
    # AVX-512's bf16 dots.
    if length > 8 if op == "attention" else isa != "avx512bf16" or dtype != torch.bfloat16:
        assert torch.equal(grad, expected_grad.to(dtype))


@given(problem=testing.attention_problems(), score=st.sampled_from(SCORES), dtype=st.sampled_from(DTYPES))
def test_forward_is_within_the_error_budget(isa, nan_outputs, problem, score, dtype):
    inputs = problem.inputs(dtype, requires_grad=False)
    mask = problem.mask()
    actual = run("cpu", score, mask)(*inputs)
    testing.assert_within_budget(
        actual, run("reference", score, mask), inputs, terms=problem.k_len + problem.head_dim
    )


@given(problem=testing.attention_problems(), score=st.sampled_from(SCORES), dtype=st.sampled_from(DTYPES))
def test_gradients_are_within_the_error_budget(isa, nan_outputs, problem, score, dtype):
    mask = problem.mask()
    testing.check_op(
        run("cpu", score, mask),
        run("reference", score, mask),
        problem.inputs(dtype),
        terms=problem.k_len * max(1, problem.heads // problem.kv_heads) + problem.q_len + problem.head_dim,
        names=("q", "k", "v"),
    )


@given(
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(DTYPES),
    q_len=st.integers(1, 3),
    k_len=st.integers(0, 300),
    group=st.integers(1, 3),
    head_dim=st.sampled_from((1, 5, 16, 33, 64)),
    v_dim=st.sampled_from((1, 7, 24, 64)),
    options=st.sampled_from(({}, {"causal": True}, {"window": (40, 0)}, {"key_lengths": [70, 3]})),
    layout=st.sampled_from(testing.LAYOUTS),
)
def test_decoding_merges_chunks_of_keys(
    isa, nan_outputs, score, dtype, q_len, k_len, group, head_dim, v_dim, options, layout
):
    if "key_lengths" in options:
        options = {"key_lengths": torch.tensor(options["key_lengths"]).clamp(max=k_len)}
    mask = fa.Mask(**options)
    inputs = testing.attention_inputs(
        2, 2 * group, 2, q_len, k_len, head_dim, v_dim, dtype=dtype, layout=layout, requires_grad=False
    )
    actual = run("cpu", score, mask)(*inputs)
    testing.assert_within_budget(actual, run("reference", score, mask), inputs, terms=k_len + head_dim)


def leaves(*shapes, dtype=torch.float32):
    return [
        testing.random_tensor(*shape, dtype=dtype, seed=i, requires_grad=True)
        for i, shape in enumerate(shapes)
    ]


def results(q, k, v, score, **options):
    """(out, dq, dk, dv) of one call on the CPU kernels."""
    out = fa.attention(q, k, v, score=score, backend="cpu", **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), testing.output_gradients((out,))))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_equal(isa, score, dtype):
    q, k, v = leaves((1, 4, 90, 24), (1, 2, 110, 24), (1, 2, 110, 17), dtype=dtype)
    mask = fa.Mask(causal=True)
    first = results(q, k, v, score, mask=mask)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(q, k, v, score, mask=mask), strict=True))


@pytest.mark.parametrize("threads", (1, 3, 5))
@pytest.mark.parametrize("kv_heads", (1, 3, 7))
def test_gradients_for_any_heads_and_threads(isa, nan_outputs, monkeypatch, threads, kv_heads):
    """Key heads are cut in slices of keys that keep the threads busy, and packed in waves: 7 of these do not fit in one."""
    monkeypatch.setattr(_native, "threads", lambda: threads)
    inputs = testing.attention_inputs(1, 2 * kv_heads, kv_heads, 200, 90, 200)
    mask = fa.Mask(causal=True)
    testing.check_op(run("cpu", "softmax", mask), run("reference", "softmax", mask), inputs, terms=200 + 200)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_bitwise_its_samples(isa, nan_outputs, score, dtype):
    """Two samples of 4 heads are enough short heads for each of the 2 threads to pack and finish one alone; of one sample the
    threads pack all heads first."""
    lengths = torch.tensor([61, 17], dtype=torch.int32)
    q, k, v = (testing.random_tensor(2, 4, 61, 20, seed=seed, dtype=dtype) for seed in range(3))
    k[1, :, 17:] = v[1, :, 17:] = float(
        "nan"
    )  # what a thread packed before may be left where nothing is attended

    def outputs(rows):
        inputs = [t[rows].clone().requires_grad_() for t in (q, k, v)]
        out = fa.attention(
            *inputs, score=score, mask=fa.Mask(causal=True, key_lengths=lengths[rows]), backend="cpu"
        )
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    whole = outputs(slice(0, 2))
    for rows in (slice(0, 1), slice(1, 2)):
        for found, alone in zip(whole, outputs(rows), strict=True):
            assert torch.equal(found[rows], alone)
            assert alone.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("step", (0.1, 0.4, 3.0))
def test_scores_may_pass_what_their_weights_are_relative_to(isa, nan_outputs, dtype, causal, step):
    """Scores that rise along the keys, by up to 3 a key: weights of up to 2^16 of what they are relative to, and rows whose
    maximum is raised in every panel of keys, with the values of others before it in the same tile."""
    length = 200
    rising = torch.arange(length) * step
    rising[length // 2 :] = rising[length // 2 :].flip(0)  # and falls again
    q, k, v = (t.squeeze(0) for t in make_qkv(length))
    q = torch.cat([torch.ones(2, length, 1), 0.1 * q[..., 1:]], -1)
    k = torch.cat([rising.expand(2, length).unsqueeze(-1), 0.1 * k[..., 1:]], -1)
    inputs = [t.unsqueeze(0).to(dtype) for t in (q, k, v)]
    mask = fa.Mask(causal=causal)
    for tiles in (TILES["attention", "cpu"], {"block_q": 48, "block_k": 256}):
        with _config.override({("attention", "cpu"): tiles}):
            actual = run("cpu", "softmax", mask, scale=1.0)(*inputs)
        expected = run("reference", "softmax", mask, scale=1.0)
        testing.assert_within_budget(actual, expected, inputs, terms=length + 64)


def test_default_tiles_follow_the_caches():
    """What the rule gives is what was measured best on processors of both kinds of caches."""

    def tiles(op, arch, dtype, l1, l2, heads=32, length=2048, cores=2):
        target = _device.Target("cpu", "some processor", arch, units=cores, l1=l1 << 10, l2=l2 << 10)
        key = {"dtype": dtype, "score": "softmax", "head_dim": 64, "value_dim": 64}
        key |= {"batch": 1, "heads": heads, "kv_heads": heads, "q_length": length, "k_length": length}
        chosen = _config.declared()[op, "cpu"].defaults(key, target)
        assert _config.declared()[op, "cpu"].refuses(chosen, key, target) is None
        return chosen["block_q"], chosen["block_k"]

    assert tiles("attention", "avx512bf16", "bfloat16", 32, 1024) == (192, 256)
    assert tiles("attention", "avx512bf16", "float32", 32, 1024) == (192, 128)
    assert tiles("attention", "avx512", "bfloat16", 48, 2048) == (192, 192)
    assert tiles("attention", "avx2", "float32", 32, 512) == (192, 256)
    assert tiles("attention", "avx2", "float32", 32, 512, heads=3, length=200) == (96, 256)
    assert tiles("attention_backward", "avx512bf16", "bfloat16", 32, 1024) == (192, 192)
    assert tiles("attention_backward", "avx512", "bfloat16", 48, 2048) == (192, 192)
    assert tiles("attention_backward", "avx2", "float32", 32, 512) == (144, 128)
    assert tiles("attention_backward", "avx2", "float32", 32, 1024, heads=2, cores=16) == (192, 96)
    assert tiles("attention", "avx2", "float32", 0, 0) == (192, 256)
    assert tiles("attention", "baseline", "float32", 32, 512) == (96, 128)
    assert tiles("attention_backward", "baseline", "float32", 0, 0) == (144, 128)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("other", (0, 3, 61))
def test_documents_are_bitwise_independent(isa, score, other):
    """A document alone, and packed after another one of any length and content: the same bits."""

    def pack(before: int):
        lengths = [before, 45, 2]
        q, k, v = leaves(*[(1, 2, 45 + 2, d) for d in (16, 16, 20)])
        strangers = [torch.randn(1, 2, before, t.shape[3]) * 9 for t in (q, k, v)]
        q, k, v = (
            torch.cat([s, t.detach()], 2).requires_grad_() for s, t in zip(strangers, (q, k, v), strict=True)
        )
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        mask = fa.Mask(cu_seqlens_q=offsets, prefix_lengths=torch.tensor([0, 20, 0]))
        out = fa.attention(q, k, v, score=score, mask=mask, backend="cpu")
        grad = torch.cat(
            [torch.zeros(1, 2, before, 20), testing.output_gradients((out[:, :, before:],))[0]], 2
        )
        return [t[:, :, before:] for t in (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))]

    assert all(torch.equal(a, b) for a, b in zip(pack(17), pack(other), strict=True))


def test_weights_of_a_decode_step_do_not_depend_on_other_documents(isa):
    q, k, v = (torch.randn(1, 2, n, 16) for n in (1, 130, 130))

    def step(before: int):
        rows, keys = torch.randn(1, 2, before, 16), torch.randn(1, 2, before, 16)
        offsets = torch.tensor([0, before, before + 1]), torch.tensor([0, before, before + 130])
        mask = fa.Mask(causal=True, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
        return fa.attention(
            torch.cat([rows, q], 2),
            torch.cat([keys, k], 2),
            torch.cat([keys, v], 2),
            mask=mask,
            backend="cpu",
        )[:, :, before:]

    assert torch.equal(step(0), step(70))
    assert torch.equal(step(0), fa.attention(q, k, v, backend="cpu"))


def test_rows_with_nothing_to_attend(isa, nan_outputs):
    q, k, v = leaves((1, 2, 30, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    mask = fa.Mask(causal=True)  # the last row is aligned with the last key: the first ten have none
    out, lse = fa.attention(q, k, v, mask=mask, return_lse=True, backend="cpu")
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert not out[:, :, :10].any() and (lse[:, :, :10] == -torch.inf).all() and not dq[:, :, :10].any()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))


@pytest.mark.parametrize("lengths", ((0, 5), (5, 0), (0, 0)))
def test_empty_lengths(isa, nan_outputs, lengths):
    q, k, v = leaves((2, 2, lengths[0], 8), (2, 2, lengths[1], 8), (2, 2, lengths[1], 8))
    for score in SCORES:
        assert all(not t.any() for t in results(q, k, v, score))


@given(
    problem=testing.attention_problems(("full", "causal", "key_lengths"), max_len=50),
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(((1, 1), (1, 0), (0, 1))),
    blocked=st.booleans(),
)
def test_tensor_bias(isa, nan_outputs, problem, score, dtype, shape, blocked):
    bias = testing.random_tensor(1, 1, problem.q_len, problem.k_len, dtype=dtype, seed=9)
    if not shape[0]:
        bias = bias[:, :, :1]
    if not shape[1]:
        bias = bias[..., :1]
    if blocked:
        bias = bias.masked_fill(bias > 0.5, -torch.inf)
    mask = problem.mask()
    testing.check_op(
        run("cpu", score, mask, bias=bias),
        run("reference", score, mask, bias=bias),
        problem.inputs(dtype),
        terms=problem.k_len * max(1, problem.heads // problem.kv_heads) + problem.q_len + problem.head_dim,
        names=("q", "k", "v"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_tiles_of_a_bias_that_let_nothing_through_are_skipped(isa, nan_outputs, score, dtype):
    """What such tiles hold is not even read: a NaN past every row's last key stays there."""
    q, k, v = testing.attention_inputs(1, 2, 2, 400, 700, 16, dtype=dtype)
    bias = torch.zeros(400, 700, dtype=dtype).masked_fill(
        torch.arange(700) > torch.arange(400)[:, None], -torch.inf
    )
    options = {"bias": bias.expand(1, 1, 400, 700)}
    testing.check_op(
        run("cpu", score, None, **options), run("reference", score, None, **options), (q, k, v), terms=1116
    )
    clean = fa.attention(q, k, v, score=score, backend="cpu", **options)
    with torch.no_grad():
        k[:, :, 660:] = v[:, :, 660:] = torch.nan
    assert torch.equal(clean, fa.attention(q, k, v, score=score, backend="cpu", **options))


@pytest.mark.parametrize("fill", (-1e9, -1e30, torch.finfo(torch.bfloat16).min, 3e38))
@pytest.mark.parametrize("q_len", (1, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_of_a_finite_mask(isa, nan_outputs, dtype, q_len, fill):
    """A bias that takes in the scores: such a row is the mean of the values, as in torch, and its gradient that of the mean."""
    q, k, v = testing.attention_inputs(1, 2, 1, q_len, 50, 16, dtype=dtype)
    bias = torch.zeros(1, 1, q_len, 50, dtype=dtype)
    bias[:, :, 0] = fill
    bias[:, :, :, 40:] = -torch.inf

    def run_without_backend(q, k, v):
        return fa.attention(q, k, v, bias=bias.to(q.dtype))

    testing.check_op(
        run_without_backend,
        lambda q, k, v: fa.attention(q, k, v, bias=bias.to(q.dtype), backend="reference"),
        (q * 2.0**-6, k, v),  # no score near the spacing of floats at 1e9
        terms=200,
    )
    out = fa.attention(q, k, v, bias=bias)
    mean = v[:, :, :40].double().mean(2).expand(1, 2, 16)
    assert testing.max_error(out[:, :, 0], mean) <= 4 * torch.finfo(dtype).eps * testing.max_finite(v)
    assert fa.attention(q, k, v, bias=bias, backend="cpu").sum().backward() is None


@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0))
@pytest.mark.parametrize("score", SCORES)
def test_any_scale_and_number_bias(isa, score, scale):
    inputs = testing.attention_inputs(q_len=40, k_len=50)
    options = {"scale": scale, "bias": -1.5}
    testing.check_op(
        run("cpu", score, None, **options), run("reference", score, None, **options), inputs, terms=106
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bias", [-math.inf, math.inf, math.nan])
def test_a_bias_that_is_no_finite_number_has_the_definitions_result(score, bias):
    q, k, v = make_qkv(9)
    found = fa.attention(q, k, v, score=score, bias=bias)
    expected = fa.attention(q, k, v, score=score, bias=bias, backend="reference")
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_small_sigmoid_weights_are_relatively_accurate(isa):
    """bias -log(65536): each weight is about 1.5e-5. One key with v = 1 makes the output the weight itself.

    The product of 16 terms and the exponent's argument, both below 4, are in error by a few eps32 * 4; the polynomial adds
    9e-8 and the reciprocal 3e-7.
    """
    q, k, _ = testing.attention_inputs(1, 1, 1, 400, 1, 16, 1, requires_grad=False, scale=0.8)
    v, bias = torch.ones(1, 1, 1, 1), -math.log(65536)
    truth = torch.sigmoid(q.double() @ k.double().mT / 4 + bias)
    assert testing.relative_error(fa.sigmoid_attention(q, k, v, bias=bias, backend="cpu"), truth) < 1e-6
    low = [t.bfloat16() for t in (q, k, v)]
    truth = torch.sigmoid(low[0].double() @ low[1].double().mT / 4 + bias)
    assert testing.relative_error(fa.sigmoid_attention(*low, bias=bias, backend="cpu"), truth) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_of_equal_values_is_that_value(isa, nan_outputs, dtype):
    """As LSSA's in test_lssa.py: the rounding that a row's weights have in common does not show."""
    q, k, v = testing.attention_inputs(1, 2, 2, 70, 70, 64, dtype=dtype, requires_grad=False)
    v = torch.full_like(v, 2 - torch.finfo(dtype).eps)
    out = fa.attention(q, k, v, score="softplus", mask=fa.Mask(causal=True), backend="cpu")
    bound = 2 * 2 * 74 * testing.EPS32 if dtype == torch.float32 else 0
    assert testing.max_error(out, v) <= bound


@pytest.mark.parametrize("score", SCORES)
def test_a_dense_mask_changed_in_place_is_classed_again(isa, score):
    q, k, v = leaves((1, 2, 60, 8), (1, 2, 100, 8), (1, 2, 100, 8))
    dense = torch.ones(60, 100, dtype=torch.bool)
    mask = fa.Mask(dense=dense)
    full = results(q, k, v, score, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(full, results(q, k, v, score), strict=True))
    dense[:, 40:] = False
    testing.check_op(run("cpu", score, mask), run("reference", score, mask), (q, k, v), terms=168)


def test_masked_padding_may_hold_nan(isa):
    q, k, v = testing.attention_inputs(2, 2, 2, 20, 90, 16, requires_grad=False)
    lengths = torch.tensor([70, 33])
    clean = fa.attention(q, k, v, mask=fa.Mask(key_lengths=lengths), backend="cpu")
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    assert torch.equal(clean, fa.attention(q, k, v, mask=fa.Mask(key_lengths=lengths), backend="cpu"))


def test_a_nan_is_not_hidden(isa):
    q, k, v = testing.attention_inputs(1, 1, 1, 20, 90, 16, requires_grad=False)
    k[0, 0, 50, 3] = torch.nan
    for score in SCORES:
        assert fa.attention(q, k, v, score=score, backend="cpu").isnan().all()
        assert fa.attention(q[:, :, :1], k, v, score=score, backend="cpu").isnan().all()


def test_refusals_name_the_reason():
    q = torch.randn(1, 1, 4, 300)
    with pytest.raises(NotImplementedError, match="head dims from 1 to 256"):
        fa.attention(q, q, q, backend="cpu")
    with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
        fa.attention(q[..., :8].double(), q[..., :8].double(), q[..., :8].double(), backend="cpu")
