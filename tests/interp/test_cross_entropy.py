"""Triton vocabulary losses in the interpreter, against the reference."""

import large_logits
import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime import tuning as _config

OPTIONS = {
    "plain": {},
    "stablemax": {"transform": "stablemax"},
    "softcap": {"softcap": 3.0, "z_loss": 0.01},
    "stablemax_softcap": {"transform": "stablemax", "softcap": 5.0, "z_loss": 0.01},
}


def labels(rows: int, classes: int) -> torch.Tensor:
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(5))
    target[1] = -100
    return target


SHARES = {
    "class_weight": {"class_weight": True, "z_loss": 0.01},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"class_weight": True, "label_smoothing": 0.2, "z_loss": 0.01},
    "stablemax": {"class_weight": True, "transform": "stablemax", "softcap": 5.0, "z_loss": 0.01},
}


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("options", SHARES)
@pytest.mark.parametrize("with_lse", (False, True))
def test_class_weights_smoothing_and_lse(options, reduction, with_lse, nan_outputs, monkeypatch):
    from fastattn.ops.cross_entropy import chunked

    rows, width, classes = 5, 8, 150
    monkeypatch.setattr(chunked, "_MIB", 4 * classes * 2)  # two rows of logits a chunk
    h = testing.random_tensor(rows, width, seed=1, requires_grad=True)
    weight = testing.random_tensor(classes, width, seed=2, requires_grad=True)
    bias = testing.random_tensor(classes, seed=3, requires_grad=True)
    temperature = (testing.random_tensor(rows, seed=4).abs() + 0.5).requires_grad_()
    by_class = testing.random_tensor(classes, seed=6).abs() + 0.1
    target = labels(rows, classes)

    def run(backend):
        def fn(h, weight, bias, temperature):
            given = dict(SHARES[options])
            if "class_weight" in given:
                given["class_weight"] = by_class.to(h.dtype)
            return fa.linear_cross_entropy(
                h,
                weight,
                target,
                bias=bias,
                temperature=temperature,
                reduction=reduction,
                return_lse=with_lse,
                backend=backend,
                **given,
            )

        return fn

    testing.check_op(run("triton"), run("reference"), (h, weight, bias, temperature), terms=classes)


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_cross_entropy(options, reduction, nan_outputs):
    rows, width, classes = 5, 8, 150
    h = testing.random_tensor(rows, width, seed=1, requires_grad=True)
    weight = testing.random_tensor(classes, width, seed=2, requires_grad=True)
    bias = testing.random_tensor(classes, seed=3, requires_grad=True)
    temperature = (testing.random_tensor(rows, seed=4).abs() + 0.5).requires_grad_()
    target = labels(rows, classes)

    def run(backend):
        def fn(h, weight, bias, temperature):
            return fa.linear_cross_entropy(
                h,
                weight,
                target,
                bias=bias,
                temperature=temperature,
                reduction=reduction,
                backend=backend,
                **OPTIONS[options],
            )

        return fn

    testing.check_op(run("triton"), run("reference"), (h, weight, bias, temperature), terms=classes)


def test_without_bias_and_in_chunks(monkeypatch):
    from fastattn.ops.cross_entropy import chunked

    monkeypatch.setattr(chunked, "_MIB", 4 * 70 * 2)  # two rows of logits a chunk
    h = testing.random_tensor(5, 8, seed=1, requires_grad=True)
    weight = testing.random_tensor(70, 8, seed=2, requires_grad=True)
    target = labels(5, 70)

    def run(backend):
        return lambda h, weight: fa.linear_cross_entropy(h, weight, target, backend=backend)

    testing.check_op(run("triton"), run("reference"), (h, weight), terms=70)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_stablemax_cross_entropy(dtype, nan_outputs):
    logits = testing.random_tensor(4, 200, scale=30.0, dtype=dtype, layout="odd", requires_grad=True)
    target = labels(4, 200)

    def run(backend):
        return lambda logits: fa.stablemax_cross_entropy(logits, target, reduction="none", backend=backend)

    testing.check_op(run("triton"), run("reference"), (logits,), terms=200)


def test_strided_temperatures():
    h, weight = (testing.random_tensor(n, 8, seed=n) for n in (6, 30))
    target = torch.arange(6)
    temperature = torch.full((6, 2), torch.nan)
    temperature[:, 0] = torch.linspace(0.5, 2.0, 6)
    found, expected = (
        fa.linear_cross_entropy(h, weight, target, temperature=t, backend="triton")
        for t in (temperature[:, 0], temperature[:, 0].contiguous())
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_large_logits(reduction, nan_outputs):
    for size in large_logits.SIZES:
        for dtype in testing.LOW_DTYPES:
            problem = large_logits.dense(size, 150, dtype)
            large_logits.check(problem, reduction, "triton", rounded_gradients=True)
        large_logits.check(large_logits.dense(size, 150, biased=True), reduction, "triton")


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("z_loss", (0.0, 1e-4))
def test_logits_that_a_temperature_makes_large(z_loss, reduction, nan_outputs):
    large_logits.check(large_logits.heated(150, z_loss), reduction, "triton")


def test_large_logits_of_more_classes_than_one_pass_takes(nan_outputs):
    with _config.override({("vocab_rows", "triton"): {"block": 16384, "chunk_mib": 1, "num_warps": 4}}):
        large_logits.check(large_logits.dense(2.0**27, 66_000), "mean", "triton")


@pytest.mark.parametrize("value", (1e4, 1e8, -1e30, 3e38))
def test_stablemax_of_equal_logits(value):
    logits = torch.full((2, 70), value, requires_grad=True)
    loss = fa.stablemax_cross_entropy(logits, torch.tensor([0, 69]), backend="triton")
    torch.testing.assert_close(loss.detach(), torch.tensor(70.0).log(), rtol=4e-7, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


def test_a_large_softcap_changes_little():
    """cap * tanh(x / cap) keeps the digits of x."""
    h, weight = testing.random_tensor(5, 8, seed=1), testing.random_tensor(30, 8, seed=2)
    target = torch.arange(5)
    capped = fa.linear_cross_entropy(h, weight, target, softcap=1e6, reduction="none", backend="triton")
    plain = fa.linear_cross_entropy(h, weight, target, reduction="none", backend="triton")
    # a logit below 10 is off by 3 roundings of itself, and by (x / cap)^2 / 3 < 1e-10 of itself
    assert testing.max_error(capped, plain) <= 2 * 10 * 4 * testing.EPS32


@pytest.mark.parametrize("target", (-1, 30, 1 << 40))
def test_a_target_of_no_class_makes_its_loss_nan(target):
    from fastattn.ops.cross_entropy import triton

    h, weight = testing.random_tensor(2, 8, seed=1), testing.random_tensor(30, 8, seed=2)
    targets = torch.tensor([3, target])
    options = (0, 0.0, 0.0, 0.0, -100, "none", False)
    loss, *_ = triton.linear_cross_entropy(h, weight, None, targets, None, None, *options, 3)
    assert loss[0].isfinite() and loss[1].isnan()
