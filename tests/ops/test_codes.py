"""Heads of shared rows on the CPU against their definitions in float64, over shapes, dtypes, options and instruction sets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import check_low_precision, compare, dense_problem

import fastattn as fa
from fastattn import testing
from fastattn.ops.codes import cpu, reference


@pytest.fixture
def small_chunks(monkeypatch):
    """MiB become KiB, so that a small problem has several chunks."""
    monkeypatch.setattr(cpu, "_MIB", 1 << 8)


def code_pattern(pattern, v, k, seed):
    """(codes (V,), K): any, all tokens on one code, a code each, or every other code empty."""
    g = torch.Generator().manual_seed(seed)
    if pattern == "all":
        return torch.randperm(v, generator=g), v
    if pattern == "one":
        return torch.full((v,), k - 1), k
    codes = torch.randint(0, k, (v,), generator=g)
    return (codes // 2 * 2 if pattern == "gaps" else codes), k


@given(
    n=st.integers(0, 40),
    v=st.integers(1, 300),
    k=st.integers(1, 50),
    d=st.integers(1, 40),
    pattern=st.sampled_from(["any", "one", "all", "gaps"]),
    ignored=st.sampled_from([0.0, 0.5]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    biased=st.booleans(),
    shadowed=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_vq_cross_entropy(
    isa, nan_outputs, small_chunks, n, v, k, d, pattern, ignored, reduction, biased, shadowed, index, seed
):
    h, shadow, bias, _, target, upstream = dense_problem(n, v, d, seed, ignored, index=index)
    codes, k = code_pattern(pattern, v, k, seed)
    codebook = testing.random_tensor(k, d, seed=seed + 3, requires_grad=True)
    leaves = (h, codebook, *([bias] if biased else []), *([shadow] if shadowed else []))

    def op(h, codebook, *rest, backend):
        rest = list(rest)
        return fa.vq_cross_entropy(
            h,
            codebook,
            codes.to(index),
            target,
            bias=rest.pop(0) if biased else None,
            shadow=rest.pop(0) if shadowed else None,
            reduction=reduction,
            backend=backend,
        )

    grad = upstream if reduction == "none" else torch.tensor(1.7)
    _, gradients = compare(op, leaves, grad)
    assert not gradients[0][target == -100].any()


@given(
    n=st.integers(0, 9),
    v=st.integers(1, 300),
    k=st.integers(1, 20),
    d=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_vq_logits(isa, nan_outputs, small_chunks, n, v, k, d, seed):
    h, _, bias, *_ = dense_problem(n, v, d, seed, 0)
    codes, _ = code_pattern("any", v, k, seed)
    codebook = testing.random_tensor(k, d, seed=seed + 3, requires_grad=True)

    def op(h, codebook, bias, backend):
        return fa.vq_logits(h, codebook, codes, bias=bias, backend=backend)

    compare(op, (h, codebook, bias), testing.random_tensor(n, v, seed=seed))


@pytest.mark.parametrize("v", [1, 3, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_choices(isa, v, dtype):
    """argmax and nearest codes are the exact ones, one row at a time or many."""
    for n in (1, 30):
        h, _, bias, *_ = dense_problem(n, v, 21, v, 0, dtype)
        h = h.detach()
        for k, pattern in ((1, "any"), (40, "gaps"), (1, "all")):
            codes, k = code_pattern(pattern, v, k, 3)
            codebook = testing.random_tensor(k, 21, seed=9, dtype=dtype)
            for b in (None, bias.detach()):
                expected = reference.vq_argmax(h, codebook, codes, b)
                assert torch.equal(fa.vq_argmax(h, codebook, codes, bias=b), expected)
            assert torch.equal(fa.nearest_codes(h, codebook), reference.nearest_codes(h, codebook))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ties_go_to_the_lowest(isa, backend):
    """Codes with one vector, whose products a library may round differently by place."""
    with fa.set_backend(backend):
        check_ties()


def check_ties():
    for width, count, rows in ((67, 39, 50), (54, 18, 35)):
        same = testing.random_tensor(1, width, seed=1).repeat(count, 1)
        assert not fa.nearest_codes(testing.random_tensor(rows, width, seed=2), same).any()
    vector = testing.random_tensor(1, 67, seed=1)
    codebook = vector.repeat(39, 1)
    x = testing.random_tensor(50, 67, seed=2)
    assert not fa.nearest_codes(x, codebook).any()
    codes = torch.arange(39).flip(0)
    assert not fa.vq_argmax(x, codebook, codes).any()
    assert not fa.vq_argmax(x[:1], codebook, codes, bias=torch.zeros(39)).any()
    bias = torch.zeros(39)
    bias[[7, 30]] = 1.0
    assert (fa.vq_argmax(x, codebook, codes, bias=bias) == 7).all()


def test_rows_of_nan_choose_a_valid_token(isa):
    h = torch.full((2, 5), math.nan)
    codes = torch.tensor([3, 3, 1])
    codebook = testing.random_tensor(4, 5, seed=1)
    assert fa.vq_argmax(h, codebook, codes).tolist() == [0, 0]
    assert all(0 <= t < 3 for t in fa.vq_sample(h, codebook, codes).tolist())


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e25])
def test_choices_beyond_the_range_of_float32(isa, scale):
    """Products that vanish or overflow in float32, of either sign: the choices of float64, one row at a time or many."""
    codes = torch.arange(9)
    for n in (1, 40):
        h = testing.random_tensor(n, 5, seed=n) * scale
        codebook = testing.random_tensor(9, 5, seed=3) * scale
        assert torch.equal(fa.vq_argmax(h, codebook, codes), reference.vq_argmax(h, codebook, codes, None))
        assert torch.equal(fa.nearest_codes(h, codebook), reference.nearest_codes(h, codebook))


def test_a_code_of_nan_is_chosen_by_no_row(isa):
    codebook = torch.tensor([[math.nan, 0.0], [0.0, 3.0], [1.0, 0.0]])
    rows = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    assert fa.nearest_codes(rows, codebook).tolist() == [1, 1, 2]
    assert fa.vq_argmax(rows, codebook, torch.tensor([0, 1, 2])).tolist() == [1, 1, 2]


def test_choices_where_torch_rounds_products(monkeypatch):
    """On AVX-512, torch may multiply float32 in bfloat16 when it was told that this will do."""
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: out.copy_(mm(a.bfloat16().float(), b.bfloat16().float()))
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    h, codebook = testing.random_tensor(200, 16, seed=1), testing.random_tensor(300, 16, seed=2)
    codes = torch.arange(300)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fa.vq_argmax(h, codebook, codes), reference.vq_argmax(h, codebook, codes, None))
    finally:
        torch.set_float32_matmul_precision(before)


def test_choices_after_a_gpu_was_allowed_tf32():
    matmul, rows = torch.backends.cuda.matmul, torch.eye(3)
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert fa.nearest_codes(rows, rows).tolist() == [0, 1, 2]
    finally:
        matmul.fp32_precision = before


def test_choices_take_what_requires_gradients():
    h, weight, bias, *_ = dense_problem(9, 9, 5, 1, 0)
    codes = torch.arange(9)
    for found in (
        fa.vq_argmax(h, weight, codes, bias=bias),
        fa.vq_sample(h, weight, codes, bias=bias),
        fa.nearest_codes(h, weight),
    ):
        assert found.shape == (9,) and not found.requires_grad


def chi_square_limit(bins):
    """Beyond which a true sampler falls once in 1e6 (Wilson-Hilferty, normal quantile 4.75)."""
    f = bins - 1
    return f * (1 - 2 / (9 * f) + 4.75 * math.sqrt(2 / (9 * f))) ** 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("biased", [False, True])
def test_samples_follow_the_dense_distribution(isa, biased, temperature):
    """Chi-square over 60 tokens of 40000 draws; tokens expected fewer than 5 times are pooled."""
    draws, v, k, d = 40000, 60, 9, 6
    h, _, bias, *_ = dense_problem(1, v, d, 4, 0)
    codes, _ = code_pattern("gaps", v, k, 1)
    codebook = testing.random_tensor(k, d, seed=2, scale=0.5)
    bias = bias.detach() if biased else None
    if biased:
        bias[5] = -math.inf
    rows = h.detach().expand(draws, d)
    g = torch.Generator().manual_seed(0)
    tokens = fa.vq_sample(rows, codebook, codes, bias=bias, temperature=temperature, generator=g)
    logits = reference.dense_logits(h.detach().double(), codebook.double(), codes, bias)[0]
    expected = torch.softmax(logits / temperature, 0) * draws
    counts = torch.bincount(tokens, minlength=v).double()
    if biased:
        assert counts[5] == 0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(counts.numel())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("biased", [False, True])
def test_samples_at_any_temperature(isa, backend, biased):
    """Close to 0 only the likeliest token is drawn; at a great one, every token whose bias is not -inf."""
    h, _, bias, *_ = dense_problem(1, 40, 6, 4, 0)
    codes, _ = code_pattern("gaps", 40, 9, 1)
    codebook = testing.random_tensor(9, 6, seed=2)
    bias = bias.detach() if biased else None
    if biased:
        bias[::3] = -math.inf
    logits = reference.dense_logits(h.detach().double(), codebook.double(), codes, bias)[0]
    rows, g = h.detach().expand(2000, -1), torch.Generator().manual_seed(0)
    with fa.set_backend(backend):
        for temperature in (1e-20, 1e-38, 1e-45, 1e-300, 5e-324):
            tokens = fa.vq_sample(rows[:50], codebook, codes, bias=bias, temperature=temperature, generator=g)
            assert (logits[tokens] == logits.max()).all()
        for temperature in (1e20, 1e38, 1e45, 1e300):
            tokens = fa.vq_sample(rows, codebook, codes, bias=bias, temperature=temperature, generator=g)
            assert torch.equal(tokens.unique(), logits.isfinite().nonzero()[:, 0])
        h = torch.full_like(h, math.inf)
        assert int(fa.vq_sample(h, codebook, codes, bias=bias, temperature=1.0)) < 40


def test_sampling_is_the_references(isa):
    """The same uniforms give the same tokens, but for uniforms within rounding of a boundary."""
    h, _, bias, *_ = dense_problem(300, 80, 7, 8, 0)
    codes, _ = code_pattern("any", 80, 12, 2)
    codebook = testing.random_tensor(12, 7, seed=3)
    uniform = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    args = (h.detach(), codebook, codes, bias.detach(), uniform, 0.8)
    same = torch.ops.fastattn.vq_sample(*args, "cpu") == torch.ops.fastattn.vq_sample(*args, "reference")
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_samples_of_large_products_keep_their_biases(isa, backend):
    """Products of 1e30, beside which a bias is lost even in float64: tokens of one code differ by it alone."""
    h, codebook = torch.full((2000, 1), 1e30), torch.tensor([[1.0], [-1.0]])
    codes, bias = torch.tensor([0, 0, 0, 1]), torch.tensor([0.0, 3.0, -math.inf, 3.0])
    with fa.set_backend(backend):
        tokens = fa.vq_sample(h, codebook, codes, bias=bias, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=4).tolist()
    # token 0 has 1 / (1 + e^3) = 4.7 % of 2000: 95 times, five deviations either way
    assert 47 <= counts[0] <= 143 and counts[0] + counts[1] == 2000


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_low_precision(isa, nan_outputs, small_chunks, dtype, reduction):
    h, _, bias, _, target, upstream = dense_problem(23, 150, 17, 5, 0.3, dtype)
    codebook = testing.random_tensor(11, 17, seed=6, dtype=dtype, requires_grad=True)
    codes, _ = code_pattern("any", 150, 11, 7)

    def op(h, codebook, bias, backend):
        return fa.vq_cross_entropy(
            h, codebook, codes, target, bias=bias, reduction=reduction, backend=backend
        )

    check_low_precision(op, (h, codebook, bias), upstream if reduction == "none" else torch.tensor(1.0))


def test_infinite_bias_leaves_a_token_out(isa):
    h, _, bias, *_ = dense_problem(6, 30, 5, 2, 0)
    bias = bias.detach()
    bias[[3, 29]] = -math.inf
    target = torch.tensor([0, 1, 2, 4, 5, 6])
    rest = [i for i in range(30) if i not in (3, 29)]
    place = torch.tensor([rest.index(int(t)) for t in target])
    codes = torch.arange(30) % 4
    codes[29] = 4  # a code whose only token is left out
    codebook = testing.random_tensor(5, 5, seed=4, requires_grad=True)
    grads = []
    for which, y, b in ((slice(None), target, bias), (rest, place, bias[rest])):
        b = b.clone().requires_grad_()
        loss = fa.vq_cross_entropy(h, codebook, codes[which], y, bias=b)
        dh, dcodebook, db = torch.autograd.grad(loss, (h, codebook, b))
        grads.append((loss, dh, dcodebook, db if len(db) < 30 else db[rest]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    blocked = fa.vq_cross_entropy(h, codebook, codes, torch.full((6,), 29), bias=bias)
    assert blocked == math.inf


def test_explains():
    h, codebook, *_ = dense_problem(4, 10, 3, 1, 0)
    assert fa.explain("vq_argmax", h, codebook, torch.zeros(10, dtype=torch.int64)).backend == "cpu"
