"""linear_cross_entropy's class weights, label smoothing, probabilities, several losses a row and lse: against torch's functions in
float64, and the CPU kernels against the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import check_low_precision, compare, dense_problem

import fastattn as fa
from fastattn import testing
from fastattn.ops.cross_entropy import cpu_products
from fastattn.runtime import tuning

WEIGHTS = ("none", "random", "some zero")


@pytest.fixture
def small_chunks(monkeypatch):
    """MiB become KiB, so that a small problem has several chunks and tiles."""
    monkeypatch.setattr(cpu_products, "_MIB", 1 << 8)
    for name in ("_TILE_ROWS", "_PAIRS_TILE_ROWS", "_STRIP_ROWS"):
        monkeypatch.setattr(cpu_products, name, 8)
    monkeypatch.setattr(cpu_products, "_WIDENED", 1 << 8)


def class_weights(kind, v, seed=7):
    if kind == "none":
        return None
    weights = testing.random_tensor(v, seed=seed).abs() + 0.1
    if kind == "some zero":
        weights[::2] = 0
    return weights


def as_double(t):
    return None if t is None else t.double()


# --- the definition is torch's ---------------------------------------------------------------------------------------


def assert_same(ours, theirs, leaves):
    """Outputs and gradients, in float64: a few hundred roundings of numbers below 100."""
    grad = testing.random_tensor(*ours.shape, seed=11, dtype=torch.float64)
    found, true = (torch.autograd.grad(t, leaves, grad) for t in (ours, theirs))
    for a, b in zip((ours, *found), (theirs, *true), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("places", [(), (3,), (2, 2)])
@pytest.mark.parametrize("soft", [False, True])
def test_options_are_torchs(weighted, smoothing, places, soft):
    n, v, d = 5, 11, 4
    h, weight, bias = (
        testing.random_tensor(*shape, seed=i, dtype=torch.float64, requires_grad=True)
        for i, shape in enumerate(((n, d), (v, *places, d), (v, *places)))
    )
    by_class = as_double(class_weights(weighted, v))
    g = torch.Generator().manual_seed(3)
    leaves = [h, weight, bias]
    ignored = {}
    if soft:
        target = torch.rand(n, v, *places, generator=g, dtype=torch.float64).requires_grad_()
        leaves.append(target)
    else:
        target = torch.randint(v, (n, *places), generator=g)
        target[1] = 3
        ignored = {"ignore_index": 3}
    for reduction in ("none", "sum", "mean"):
        options = {"label_smoothing": smoothing, "reduction": reduction} | ignored
        ours = fa.linear_cross_entropy(h, weight, target, bias=bias, class_weight=by_class, **options)
        logits = torch.tensordot(h, weight, dims=([1], [weight.dim() - 1])) + bias
        theirs = F.cross_entropy(logits, target, weight=by_class, **options)
        if not soft and reduction == "mean" and by_class is not None:
            kept = target != 3
            if float(by_class[target[kept]].sum()) == 0:  # torch's is not a number there
                continue
        assert_same(ours, theirs, leaves)


@pytest.mark.parametrize("transform", [None, "stablemax"])
@pytest.mark.parametrize("soft", [False, True])
def test_all_options_by_hand(transform, soft):
    n, v, d = 6, 9, 4
    h, weight, bias = (
        testing.random_tensor(*shape, seed=i, dtype=torch.float64)
        for i, shape in enumerate(((n, d), (v, d), (v,)))
    )
    tau, by_class = (testing.random_tensor(k, seed=k).abs().double() + 0.5 for k in (n, v))
    g = torch.Generator().manual_seed(3)
    t = torch.rand(n, v, generator=g, dtype=torch.float64) if soft else torch.randint(v, (n,), generator=g)
    loss, lse = fa.linear_cross_entropy(
        h, weight, t, bias=bias, class_weight=by_class, label_smoothing=0.2, transform=transform, softcap=3.0, z_loss=0.01,
        temperature=tau, reduction="none", return_lse=True,
    )  # fmt: skip
    shares = t if soft else F.one_hot(t, v).double()
    for i in range(n):
        x = torch.stack([3 * torch.tanh((h[i] @ weight[c] + bias[c]) / 3) / tau[i] for c in range(v)])
        if transform:
            x = torch.where(x >= 0, x + 1, 1 / (1 - x)).log()
        own = torch.logsumexp(x, 0)
        expected = sum(
            by_class[c] * (0.8 * shares[i, c] + 0.2 / v) * (own - x[c] + 0.01 * own**2) for c in range(v)
        )
        torch.testing.assert_close(loss[i], expected)
        torch.testing.assert_close(lse[i], own)


def test_lse_of_ignored_rows_and_heads():
    h, weight = testing.random_tensor(4, 5, seed=1), testing.random_tensor(7, 2, 5, seed=2)
    target = torch.tensor([[0, 1], [-100, 2], [3, -100], [-100, -100]])
    loss, lse = fa.linear_cross_entropy(h, weight, target, reduction="none", return_lse=True)
    expected = torch.einsum("nd,vkd->nkv", h, weight).logsumexp(-1).masked_fill(target == -100, 0)
    torch.testing.assert_close(lse, expected)
    assert not loss[target == -100].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mean_over_nothing_is_zero(backend):
    h, weight = (testing.random_tensor(n, 5, seed=n, requires_grad=True) for n in (4, 7))
    nothing = torch.full((4,), -100)
    by_class = torch.zeros(7)
    for target, options in (
        (nothing, {"class_weight": by_class + 1, "label_smoothing": 0.1}),
        (torch.arange(4), {"class_weight": by_class}),
    ):
        loss = fa.linear_cross_entropy(h, weight, target, backend=backend, **options)
        assert loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(loss, (h, weight)))


def test_one_dimension():
    h, weight = testing.random_tensor(5, seed=1), testing.random_tensor(7, 5, seed=2)
    loss, lse = fa.linear_cross_entropy(h, weight, torch.tensor(3), return_lse=True, reduction="none")
    torch.testing.assert_close(lse, (weight @ h).logsumexp(0))
    torch.testing.assert_close(loss, lse - weight[3] @ h)


# --- the CPU kernels -------------------------------------------------------------------------------------------------


@given(
    n=st.integers(0, 30),
    v=st.integers(1, 300),
    d=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    weighted=st.sampled_from(WEIGHTS),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    transform=st.sampled_from([None, "stablemax"]),
    z_loss=st.sampled_from([0.0, 0.01]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_options_on_the_cpu(
    isa, nan_outputs, small_chunks, n, v, d, ignored, reduction, weighted, smoothing, transform, z_loss, extras, seed
):  # fmt: skip
    h, weight, bias, tau, target, upstream = dense_problem(n, v, d, seed, ignored)
    by_class = class_weights(weighted, v)
    smoothing = 0.0 if transform else smoothing
    leaves = (h, weight, *([bias] if extras[0] else []), *([tau] if extras[1] else []))

    def op(h, weight, *rest, backend):
        rest = list(rest)
        found = fa.linear_cross_entropy(
            h,
            weight,
            target,
            bias=rest.pop(0) if extras[0] else None,
            temperature=rest.pop(0) if extras[1] else None,
            class_weight=by_class if by_class is None or h.dtype == torch.float32 else by_class.double(),
            label_smoothing=smoothing,
            transform=transform,
            z_loss=z_loss,
            reduction=reduction,
            return_lse=extras[2],
            backend=backend,
        )
        return found[0] + 0.3 * (found[1] if reduction == "none" else found[1].sum()) if extras[2] else found

    grad = upstream if reduction == "none" else torch.tensor(1.7)
    _, gradients = compare(op, leaves, grad)
    assert not gradients[0][target == -100].any()


@pytest.mark.parametrize(
    ("dtype", "product"),
    [*((dtype, "library") for dtype in testing.LOW_DTYPES), (torch.bfloat16, "native")],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_low_precision(isa, nan_outputs, small_chunks, dtype, product, reduction):
    h, weight, bias, tau, target, upstream = dense_problem(23, 150, 17, 5, 0.3, dtype)
    by_class = class_weights("random", 150)
    grad = upstream if reduction == "none" else torch.tensor(1.0)

    def op(h, weight, bias, tau, backend):
        return fa.linear_cross_entropy(
            h, weight, target, bias=bias, temperature=tau, reduction=reduction, label_smoothing=0.1,
            class_weight=by_class if h.dtype != torch.float64 else by_class.double(), backend=backend,
        )  # fmt: skip

    with tuning.override({("linear_cross_entropy", "cpu"): {"product": product}}):
        check_low_precision(op, (h, weight, bias, tau), grad, rounded=product == "native")


def test_class_weights_keep_the_digits_of_large_logits():
    """Two equal logits of 1e8 are a loss of log 2."""
    h, weight = torch.tensor([[1e8], [-1e8]]), torch.ones(2, 1)
    for backend in ("cpu", "reference"):
        loss = fa.linear_cross_entropy(
            h, weight, torch.tensor([0, 1]), class_weight=torch.tensor([3.0, 1.0]), reduction="none", backend=backend
        )  # fmt: skip
        torch.testing.assert_close(loss, torch.tensor([3.0, 1.0]) * torch.tensor(2.0).log())


def test_explains_what_the_kernels_leave_to_the_definition():
    h, weight = testing.random_tensor(4, 3), testing.random_tensor(10, 3)
    target = torch.zeros(4, dtype=torch.int64)
    plain = {"class_weight": torch.ones(10), "label_smoothing": 0.1, "return_lse": True}
    assert fa.explain("linear_cross_entropy", h, weight, target, **plain).backend == "cpu"
    for options, reason in (
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing without softcap and transform"),
        ({"label_smoothing": 0.1, "transform": "stablemax"}, "label_smoothing without softcap and transform"),
        ({"target": torch.ones(4, 10)}, "class indices, not probabilities"),
    ):
        found = fa.explain("linear_cross_entropy", h, weight, **{"target": target} | options)
        assert found.backend == "reference" and reason in found.ruled_out["cpu"]


@pytest.mark.parametrize("soft", [False, True])
def test_compiles_and_repeats(soft):
    h, weight, _, _, target, _ = dense_problem(12, 30, 6, 3, 0.2)
    if soft:
        target = testing.random_tensor(12, 30, seed=4).softmax(-1)
    by_class = class_weights("random", 30)

    def step(h, weight):
        loss, lse = fa.linear_cross_entropy(
            h, weight, target, class_weight=by_class, label_smoothing=0.1, return_lse=True
        )
        return loss + lse.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    runs = [
        (loss, *torch.autograd.grad(loss, (h, weight)))
        for loss in (f(h, weight) for f in (step, step, compiled))
    ]
    for other in runs[1:]:
        for a, b in itertools.zip_longest(runs[0], other):
            assert torch.equal(a, b)
