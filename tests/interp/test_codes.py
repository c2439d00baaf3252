"""Triton heads of shared rows in the interpreter, against the reference."""

import large_logits
import pytest
import torch

import fastattn as fa
from fastattn import testing

ROWS, WIDTH, CODES, TOKENS = 6, 24, 20, 70


def head(dtype=torch.float32):
    """h, codebook, codes (code 3 has no token), target (one row ignored)."""
    generator = torch.Generator().manual_seed(5)
    h = testing.random_tensor(ROWS, WIDTH, seed=1, dtype=dtype, layout="odd", requires_grad=True)
    codebook = testing.random_tensor(CODES, WIDTH, seed=2, dtype=dtype, requires_grad=True)
    codes = torch.randint(CODES, (TOKENS,), generator=generator)
    codes[codes == 3] = 4
    target = torch.randint(TOKENS, (ROWS,), generator=generator)
    target[1] = -100
    return h, codebook, codes, target


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("extra", (False, True), ids=("plain", "bias_and_shadow"))
def test_vq_cross_entropy(reduction, extra, nan_outputs):
    h, codebook, codes, target = head()
    bias = testing.random_tensor(TOKENS, seed=3, requires_grad=True) if extra else None
    shadow = testing.random_tensor(TOKENS, WIDTH, seed=4, requires_grad=True) if extra else None

    def run(backend):
        return lambda h, codebook, bias, shadow: fa.vq_cross_entropy(
            h, codebook, codes, target, bias=bias, shadow=shadow, reduction=reduction, backend=backend
        )

    names = ("h", "codebook", "bias", "shadow")
    testing.check_op(run("triton"), run("reference"), (h, codebook, bias, shadow), terms=TOKENS, names=names)


def test_vq_cross_entropy_in_float16(nan_outputs):
    h, codebook, codes, target = head(torch.float16)

    def run(backend):
        return lambda h, codebook: fa.vq_cross_entropy(h, codebook, codes, target, backend=backend)

    testing.check_op(run("triton"), run("reference"), (h, codebook), terms=TOKENS)


def test_vq_logits(nan_outputs):
    h, codebook, codes, _ = head()
    bias = testing.random_tensor(TOKENS, seed=3, requires_grad=True)

    def run(backend):
        return lambda h, codebook, bias: fa.vq_logits(h, codebook, codes, bias=bias, backend=backend)

    testing.check_op(run("triton"), run("reference"), (h, codebook, bias), terms=TOKENS)


@pytest.mark.parametrize("with_bias", (False, True))
def test_choices_are_exact(with_bias, nan_outputs):
    """Equal codes and equal biases: the lowest token, and the lowest code."""
    h, codebook, codes, _ = (t.detach() for t in head())
    codebook[7] = codebook[11]
    bias = testing.random_tensor(TOKENS, seed=3).round() if with_bias else None
    with fa.set_backend("triton"):
        token, code = fa.vq_argmax(h, codebook, codes, bias=bias), fa.nearest_codes(h, codebook)
    with fa.set_backend("reference"):
        assert torch.equal(token, fa.vq_argmax(h, codebook, codes, bias=bias))
        assert torch.equal(code, fa.nearest_codes(h, codebook))


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("temperature", (0.3, 1.0))
def test_samples_are_the_definitions(temperature, with_bias, nan_outputs):
    """The same uniforms pick the same tokens; a token of bias -inf and the code without tokens are never drawn."""
    h, codebook, codes, _ = (t.detach() for t in head())
    h = h.repeat(20, 1)
    bias = testing.random_tensor(TOKENS, seed=3) if with_bias else None
    if with_bias:
        bias[::3] = -torch.inf

    def drawn(backend):
        with fa.set_backend(backend):
            generator = torch.Generator().manual_seed(3)
            return fa.vq_sample(h, codebook, codes, bias=bias, temperature=temperature, generator=generator)

    found = drawn("triton")
    assert torch.equal(found, drawn("reference"))
    assert not with_bias or not (found % 3 == 0).any()


@pytest.mark.parametrize("scale", (1e-22, 1e25))
def test_choices_beyond_the_range_of_float32(scale):
    """Products that vanish or overflow in float32, of either sign; a row of NaN and one of -inf name a token."""
    h, codebook, codes, _ = (t.detach() * scale if t.is_floating_point() else t for t in head())
    bias = testing.random_tensor(TOKENS, seed=3) * scale**2 if scale < 1 else None
    found = {}
    for backend in ("triton", "reference"):
        with fa.set_backend(backend):
            found[backend] = fa.vq_argmax(h, codebook, codes, bias=bias), fa.nearest_codes(h, codebook)
    assert torch.equal(found["triton"][0], found["reference"][0])
    assert torch.equal(found["triton"][1], found["reference"][1])
    h[2] = torch.nan
    none, nan = torch.full((TOKENS,), -torch.inf), torch.full((TOKENS,), torch.nan)
    with fa.set_backend("triton"):
        for bias in (None, none, nan):
            token, code = fa.vq_argmax(h, codebook, codes, bias=bias), fa.nearest_codes(h, codebook)
            assert 0 <= int(token.min()) <= int(token.max()) < TOKENS
            assert 0 <= int(code.min()) <= int(code.max()) < CODES


@pytest.mark.parametrize("with_bias", (False, True))
def test_samples_at_any_temperature(with_bias):
    """Close to 0 only the likeliest token is drawn; at a great one, none whose bias is -inf."""
    h, codebook, codes, _ = (t.detach() for t in head())
    bias = testing.random_tensor(TOKENS, seed=3) if with_bias else None
    if with_bias:
        bias[::3] = -torch.inf
    with fa.set_backend("triton"):
        likeliest = fa.vq_logits(h, codebook, codes, bias=bias).amax(1)
        for temperature in (1e-38, 1e-45, 5e-324, 1e45, 1e300):
            tokens = fa.vq_sample(h, codebook, codes, bias=bias, temperature=temperature)
            logits = fa.vq_logits(h, codebook, codes, bias=bias).gather(1, tokens[:, None])[:, 0]
            assert torch.equal(logits, likeliest) if temperature < 1 else logits.isfinite().all()


def test_sampling_at_the_ends():
    """Uniforms of 0 and just under 1 pick the first and the last token that has a weight; a row of NaN picks some token."""
    h, codebook, codes, _ = (t.detach() for t in head())
    h[3] = torch.nan
    below = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    for uniform in (0.0, float(below)):
        drawn = torch.full((ROWS, 2), uniform, dtype=torch.float64)
        ours, theirs = (
            torch.ops.fastattn.vq_sample(h, codebook, codes, None, drawn, 1.0, backend)
            for backend in ("triton", "reference")
        )
        number = torch.arange(ROWS) != 3
        assert torch.equal(ours[number], theirs[number])
        assert 0 <= int(ours[3]) < TOKENS


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_large_logits(reduction, nan_outputs):
    for size in large_logits.SIZES:
        for dtype in testing.LOW_DTYPES:
            large_logits.check(large_logits.shared(size, dtype), reduction, "triton", rounded_gradients=True)
        large_logits.check(large_logits.shared(size, biased=True), reduction, "triton")
