"""The vocabulary row kernel, run on the host, against the definition."""

import math

import large_logits
import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.cross_entropy import reference
from fastattn.runtime import cuda as _cuda
from fastattn.runtime import tuning as _config

IGNORED = -100


def defined(stablemax, softcap, z_loss, target, reduction="none"):
    """(loss, largest logit, sum of weights, gradient of the logits, gradient of the temperature): with the identity as weight, h is the logits."""
    options = (None, int(stablemax), softcap, z_loss, 0.0, IGNORED, reduction)

    def run(logits, bias, temperature, grad):
        weight = torch.eye(logits.shape[1], dtype=logits.dtype)
        arguments = logits, weight, bias, target, temperature, *options
        loss, statistics, _ = reference.linear_cross_entropy(*arguments)
        found = reference.linear_cross_entropy_gradients(grad, None, *arguments)
        return (loss, *statistics, found[0]) + (() if temperature is None else (found[3],))

    return run


def rows_of(count, classes, stride):
    wide = torch.full((count, stride), math.nan)
    wide[:, :classes] = testing.random_tensor(count, classes, seed=1, scale=3.0)
    return wide[:, :classes]


def check(host, *, stablemax, softcap=0.0, z_loss=0.0, classes=30, stride=None, extras=True, threads=256):
    target = torch.tensor([3, IGNORED, classes - 1, 0, 7])
    rows = len(target)
    logits = rows_of(rows, classes, stride or classes)
    bias = testing.random_tensor(classes, seed=2) if extras else None
    temperature = testing.random_tensor(rows, seed=3).abs() + 0.5 if extras else None
    grad = testing.random_tensor(rows, seed=4)
    x = rows_of(rows, classes, stride or classes)
    loss, largest, total = torch.empty(3, rows)
    dtau = torch.empty(rows) if extras else None
    _cuda.vocab_rows(
        x, bias, target, temperature, grad, loss, largest, total, dtau,
        stablemax=stablemax, softcap=softcap, z_loss=z_loss, ignore_index=IGNORED, threads=threads,
    )  # fmt: skip
    testing.assert_within_budget(
        (loss, largest, total, x) + (() if dtau is None else (dtau,)),
        defined(stablemax, softcap, z_loss, target),
        (logits, bias, temperature, grad),
        terms=classes,
    )
    beyond = x.as_strided((rows, stride - classes), (stride, 1), classes) if stride else x[:0]
    assert beyond.isnan().all()  # what lies between the rows is not touched
    return x


@pytest.mark.parametrize("stablemax", (False, True))
@pytest.mark.parametrize(("softcap", "z_loss"), ((0.0, 0.0), (3.0, 0.01)))
def test_loss_and_gradients(host, stablemax, softcap, z_loss):
    check(host, stablemax=stablemax, softcap=softcap, z_loss=z_loss)
    assert host.launches == ["vocab_rows"]


@pytest.mark.parametrize("seed", (1, 2))
def test_in_any_order_with_strides_and_more_classes_than_threads(host, seed):
    host.schedule(seed)
    check(host, stablemax=False, z_loss=0.1, classes=300, stride=311)
    check(host, stablemax=True, classes=77, stride=80, extras=False, threads=64)
    check(host, stablemax=False, classes=150, threads=64)
    assert host.launches == ["vocab_rows", "vocab_rows<true, 64>", "vocab_rows<false, 64>"]


@pytest.mark.parametrize("stablemax", (False, True))
def test_several_rows_a_block(host, stablemax):
    """As where there are more rows than a launch may have blocks."""
    host.most_blocks = 2
    check(host, stablemax=stablemax, threads=64)
    host.schedule(1)
    check(host, stablemax=stablemax, threads=64, extras=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("transform", (None, "stablemax"))
def test_linear_cross_entropy(host, transform, dtype):
    """The op's backend: the products around the row kernel, in chunks."""
    h = testing.random_tensor(5, 8, seed=1, dtype=dtype)
    weight = testing.random_tensor(30, 8, seed=2, dtype=dtype)
    bias, target = testing.random_tensor(30, seed=3, dtype=dtype), torch.tensor([3, IGNORED, 29, 0, 7])
    options = {"transform": transform, "softcap": 3.0, "z_loss": 0.01}

    def run(h, weight, bias, backend):
        return fa.linear_cross_entropy(h, weight, target, bias=bias, **options, backend=backend)

    with torch.no_grad():
        loss = run(h, weight, bias, "cuda")
    assert host.launches == ["vocab_rows"]
    testing.assert_within_budget(loss, lambda *a: run(*a, "reference"), (h, weight, bias), terms=30)


def test_linear_cross_entropy_gradients(host):
    from fastattn.ops.cross_entropy import cuda

    h, weight = testing.random_tensor(5, 8, seed=1), testing.random_tensor(30, 8, seed=2)
    bias, target = testing.random_tensor(30, seed=3), torch.tensor([3, IGNORED, 29, 0, 7])
    options = (0, 3.0, 0.01, 0.0, IGNORED, "mean")

    def run(h, weight, bias):
        tensors = (h, weight, bias, target, None, None)
        loss, statistics, _, *first = cuda.linear_cross_entropy(*tensors, *options, False, 7)
        again = cuda.linear_cross_entropy_backward(torch.ones(()), None, *tensors, statistics, *options, 7)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        return (loss, *first[:3])

    def by_definition(h, weight, bias):
        arguments = (h, weight, bias, target, None, None, *options)
        found = reference.linear_cross_entropy_gradients(torch.ones((), dtype=h.dtype), None, *arguments)
        return (reference.linear_cross_entropy(*arguments)[0], *found[:3])

    testing.assert_within_budget(run(h, weight, bias), by_definition, (h, weight, bias), terms=30)


def test_the_configuration_names_the_kernel(host):
    with torch.no_grad(), _config.override({("vocab_rows", "cuda"): {"threads": 64}}):
        fa.linear_cross_entropy(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 2]), backend="cuda")
    assert host.launches == ["vocab_rows<false, 64>"]


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_large_logits(host, reduction):
    for size in large_logits.SIZES:
        for dtype in testing.LOW_DTYPES:
            problem = large_logits.dense(size, 150, dtype)
            large_logits.check(problem, reduction, "cuda", rounded_gradients=True)
        large_logits.check(large_logits.dense(size, 150, biased=True), reduction, "cuda")


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("z_loss", (0.0, 1e-4))
def test_logits_that_a_temperature_makes_large(host, z_loss, reduction):
    large_logits.check(large_logits.heated(150, z_loss), reduction, "cuda")


@pytest.mark.parametrize("value", (1e4, 1e8, -1e30, 2e38))
def test_stablemax_of_equal_logits(host, value):
    h, weight = torch.full((2, 1), value), torch.ones(70, 1)
    target = torch.tensor([0, 69])
    loss = fa.linear_cross_entropy(h, weight, target, transform="stablemax", backend="cuda")
    torch.testing.assert_close(loss, torch.tensor(70.0).log(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("target", (-1, 30, 1 << 40))
def test_a_target_of_no_class_makes_its_loss_nan(host, target):
    from fastattn.ops.cross_entropy import cuda

    h, weight = testing.random_tensor(2, 8, seed=1), testing.random_tensor(30, 8, seed=2)
    targets = torch.tensor([3, target])
    options = (0, 0.0, 0.0, 0.0, IGNORED, "none", False)
    loss, *_ = cuda.linear_cross_entropy(h, weight, None, targets, None, None, *options, 3)
    assert loss[0].isfinite() and loss[1].isnan()
