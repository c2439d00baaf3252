"""The CPU losses over dense logits against their definitions in float64, over shapes, dtypes, options and instruction sets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import check_low_precision, compare, dense_problem

import fastattn as fa
from fastattn import testing
from fastattn.ops.cross_entropy import cpu_products
from fastattn.runtime import tuning


@pytest.fixture
def small_chunks(monkeypatch):
    """MiB become KiB, so that a small problem has several chunks and tiles."""
    monkeypatch.setattr(cpu_products, "_MIB", 1 << 8)
    for name in ("_TILE_ROWS", "_PAIRS_TILE_ROWS", "_STRIP_ROWS"):
        monkeypatch.setattr(cpu_products, name, 8)
    monkeypatch.setattr(cpu_products, "_WIDENED", 1 << 8)


def use(product):
    return tuning.override({("linear_cross_entropy", "cpu"): {"product": product}})


@given(
    n=st.integers(0, 40),
    v=st.integers(1, 600),
    d=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    transform=st.sampled_from([None, "stablemax"]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    extras=st.tuples(st.booleans(), st.booleans()),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_linear_cross_entropy(
    isa,
    nan_outputs,
    small_chunks,
    n,
    v,
    d,
    ignored,
    reduction,
    transform,
    softcap,
    z_loss,
    extras,
    index,
    seed,
):
    h, weight, bias, tau, target, upstream = dense_problem(n, v, d, seed, ignored, index=index)
    leaves = (h, weight, *([bias] if extras[0] else []), *([tau] if extras[1] else []))

    def op(h, weight, *rest, backend):
        rest = list(rest)
        return fa.linear_cross_entropy(
            h,
            weight,
            target,
            bias=rest.pop(0) if extras[0] else None,
            temperature=rest.pop(0) if extras[1] else None,
            transform=transform,
            softcap=softcap,
            z_loss=z_loss,
            reduction=reduction,
            backend=backend,
        )

    grad = upstream if reduction == "none" else torch.tensor(1.7)
    _, gradients = compare(op, leaves, grad)
    assert not gradients[0][target == -100].any()


@given(
    n=st.integers(0, 9),
    v=st.integers(1, 200),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    layout=st.sampled_from(["contiguous", "odd"]),
    seed=st.integers(0, 99),
)
def test_stablemax(isa, nan_outputs, n, v, scale, layout, seed):
    logits = testing.random_tensor(n, v, seed=seed, scale=scale, layout=layout, requires_grad=True)
    *_, target, upstream = dense_problem(n, v, 1, seed, 0.3)

    def op(logits, backend):
        return fa.stablemax_cross_entropy(logits, target, reduction="none", backend=backend)

    compare(op, (logits,), upstream)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_stablemax_gradient_of_sure_targets(isa, dtype):
    """At the target it is a difference of nearly equal numbers: rounded once, after they are subtracted."""
    sure = torch.tensor([[1000.0, -1000.0, 0.5], [300.0, -40.0, -7.0], [2.0, -900.0, -800.0]], dtype=dtype)
    logits = sure.requires_grad_()
    true = sure.detach().double().requires_grad_()
    target = torch.zeros(3, dtype=torch.int64)
    fa.stablemax_cross_entropy(logits, target, reduction="sum", backend="cpu").backward()
    fa.stablemax_cross_entropy(true, target, reduction="sum", backend="reference").backward()
    # one rounding to dtype, and two numbers below 1 / (1 + x) to a few float32 roundings each, subtracted; float16 has
    # values down to 2^-24
    error = (logits.grad.double() - true.grad).abs()
    slope = 1 / (1 + true.detach().abs())
    limit = torch.finfo(dtype).eps / 2 * true.grad.abs() + 8 * testing.EPS32 * slope
    assert bool((error <= limit + (2.0**-25 if dtype == torch.float16 else 0)).all())
    alone = torch.tensor([[-0.3]], dtype=dtype).requires_grad_()
    fa.stablemax_cross_entropy(alone, target[:1], backend="cpu").backward()
    assert float(alone.grad.abs()) <= 8 * testing.EPS32


@pytest.mark.parametrize(
    ("dtype", "product"),
    [*((dtype, "library") for dtype in testing.LOW_DTYPES), (torch.bfloat16, "native")],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_low_precision(isa, nan_outputs, small_chunks, dtype, product, reduction):
    h, weight, bias, tau, target, upstream = dense_problem(23, 150, 17, 5, 0.3, dtype)
    grad = upstream if reduction == "none" else torch.tensor(1.0)

    def linear(h, weight, bias, tau, backend):
        return fa.linear_cross_entropy(
            h,
            weight,
            target,
            bias=bias,
            temperature=tau,
            transform="stablemax",
            reduction=reduction,
            backend=backend,
        )

    def stable(logits, backend):
        return fa.stablemax_cross_entropy(logits, target % 17, reduction=reduction, backend=backend)

    with use(product):
        check_low_precision(linear, (h, weight, bias, tau), grad, rounded=product == "native")
    check_low_precision(stable, (h,), grad)


@given(
    n=st.integers(0, 40),
    v=st.integers(1, 600),
    d=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    softcap=st.sampled_from([None, 2.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_bfloat16(
    isa, nan_outputs, small_chunks, n, v, d, ignored, reduction, softcap, biased, seed
):
    h, weight, bias, _, target, upstream = dense_problem(n, v, d, seed, ignored, torch.bfloat16)

    def op(h, weight, bias=None, *, backend):
        return fa.linear_cross_entropy(
            h, weight, target, bias=bias, softcap=softcap, z_loss=0.01, reduction=reduction, backend=backend
        )

    grad = upstream if reduction == "none" else torch.tensor(1.7)
    with use("native"):
        gradients = check_low_precision(op, (h, weight, bias) if biased else (h, weight), grad, rounded=True)
    assert not gradients[0][target == -100].any()


def test_infinite_bias_leaves_a_class_out(isa):
    h, weight, bias, *_ = dense_problem(6, 30, 5, 2, 0)
    bias = bias.detach()
    bias[[3, 29]] = -math.inf
    target = torch.tensor([0, 1, 2, 4, 5, 6])
    tau = torch.full((6,), 1.3, requires_grad=True)
    rest = [i for i in range(30) if i not in (3, 29)]
    place = torch.tensor([rest.index(int(t)) for t in target])
    for transform in (None, "stablemax"):
        loss = fa.linear_cross_entropy(h, weight, target, bias=bias, temperature=tau, transform=transform)
        found = torch.autograd.grad(loss, (h, weight, tau))
        without = fa.linear_cross_entropy(
            h, weight[rest], place, bias=bias[rest], temperature=tau, transform=transform
        )
        for a, b in zip(found, torch.autograd.grad(without, (h, weight, tau)), strict=True):
            torch.testing.assert_close(a, b)


def test_bad_contents_are_refused_when_compiled():
    """Index tensors are checked where their contents are seen: in the op, compiled or not."""
    h, weight, *_ = dense_problem(4, 10, 3, 1, 0)
    step = torch.compile(
        lambda target: fa.linear_cross_entropy(h.detach(), weight.detach(), target),
        fullgraph=True,
        backend="aot_eager",
    )
    step(torch.tensor([0, 1, 2, 9]))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 10\) or -100, given 10"):
        step(torch.tensor([0, 1, 2, 10]))


def test_repeats_bitwise():
    h, weight, bias, _, target, _ = dense_problem(64, 500, 24, 3, 0.2)
    runs = []
    for _ in range(2):
        loss = fa.linear_cross_entropy(h, weight, target, bias=bias)
        runs.append((loss, *torch.autograd.grad(loss, (h, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_explains():
    h, weight, *_ = dense_problem(4, 10, 3, 1, 0)
    found = fa.explain("linear_cross_entropy", h, weight, torch.zeros(4, dtype=torch.int64))
    assert found.backend == "cpu" and set(found.config) == {"product", "chunk_mib", "tile_mib"}
    found = fa.explain("linear_cross_entropy", h.double(), weight.double(), torch.zeros(4, dtype=torch.int64))
    assert found.backend == "reference" and "float64" in found.ruled_out["cpu"]
