"""Vocabulary losses of large logits on the reference and the CPU: see large_logits."""

import math

import large_logits
import pytest
import torch

import fastattn as fa
from fastattn.ops.codes import cpu as codes_cpu
from fastattn.ops.cross_entropy import ONE_PASS_CLASSES, cpu_products
from fastattn.runtime import tuning as _config

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")


@pytest.fixture(params=("whole", "pieces"))
def pieces(request, monkeypatch):
    """Several chunks of rows and, where gradients come later, tiles of classes, whose maxima and sums are merged."""
    if request.param == "pieces":
        monkeypatch.setattr(cpu_products, "_MIB", 1 << 4)
        monkeypatch.setattr(codes_cpu, "_MIB", 1 << 2)
        for name in ("_TILE_ROWS", "_PAIRS_TILE_ROWS", "_STRIP_ROWS"):
            monkeypatch.setattr(cpu_products, name, 2)


def use(product):
    return _config.override({("linear_cross_entropy", "cpu"): {"product": product}})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dense(isa, backend, reduction, pieces, nan_outputs):
    for size in large_logits.SIZES:
        for dtype in DTYPES:
            with use("library"):
                large_logits.check(large_logits.dense(size, 150, dtype), reduction, backend)
        large_logits.check(large_logits.dense(size, 150, biased=True), reduction, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_products_of_bfloat16(isa, reduction, pieces, nan_outputs):
    with use("native"):
        for size in large_logits.SIZES:
            problem = large_logits.dense(size, 150, torch.bfloat16)
            large_logits.check(problem, reduction, "cpu", rounded_gradients=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss", (0.0, 1e-4))
def test_temperature(isa, backend, reduction, z_loss, pieces, nan_outputs):
    large_logits.check(large_logits.heated(150, z_loss), reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_codes(isa, backend, reduction, pieces, nan_outputs):
    for size in large_logits.SIZES:
        for dtype in DTYPES:
            large_logits.check(large_logits.shared(size, dtype), reduction, backend)
        large_logits.check(large_logits.shared(size, biased=True), reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_more_classes_than_one_pass_takes(isa, backend, reduction):
    classes = ONE_PASS_CLASSES + 1000
    for size in large_logits.SIZES:
        large_logits.check(large_logits.dense(size, classes), reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (1e4, 1e8, -1e30, 3e38))
def test_stablemax_of_equal_logits(isa, backend, value):
    logits = torch.full((2, 3), value, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0, 0.0]]).repeat(3, 1)
    target = torch.tensor([0, 2])
    with fa.set_backend(backend):
        for loss in (
            fa.stablemax_cross_entropy(logits, target),
            fa.linear_cross_entropy(logits, weight, target, transform="stablemax"),
            fa.linear_cross_entropy(logits, weight, target, transform="stablemax", reduction="none")[1],
        ):
            # log 3 to a few roundings; exponentials of logarithms, as the reference takes them, of up to 89
            torch.testing.assert_close(loss.detach(), torch.tensor(math.log(3.0)), rtol=4e-7, atol=0)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.isfinite().all()
