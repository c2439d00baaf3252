"""The loss of rows with several right classes: against loops and linear_cross_entropy, and the CPU against the definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import check_low_precision, compare, dense_problem

import fastattn as fa
from fastattn import testing
from fastattn.ops.cross_entropy import chunked


@pytest.fixture
def small_chunks(monkeypatch):
    """MiB become KiB, so that a small problem has several chunks."""
    monkeypatch.setattr(chunked, "_MIB", 1 << 8)


def lists(n, v, p, seed, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    positives = torch.randint(v, (n, p), generator=g, dtype=dtype)
    return positives.masked_fill(torch.rand(n, p, generator=g) < 0.4, -100)


def test_is_the_sum_over_positives_by_hand():
    h, weight, bias = (
        testing.random_tensor(*s, seed=len(s), dtype=torch.float64) for s in ((4, 3), (6, 3), (6,))
    )
    positives = torch.tensor([[1, 4, -100], [-100, -100, -100], [5, -100, 0], [2, 2, -100]])
    loss = fa.multi_label_cross_entropy(h, weight, positives, bias=bias, reduction="none")
    for i, row in enumerate(positives.tolist()):
        x = [float(h[i] @ weight[c] + bias[c]) for c in range(6)]
        own = [p for p in row if p >= 0]
        negatives = [math.exp(x[c]) for c in range(6) if c not in own]
        expected = sum(math.log(1 + sum(negatives) / math.exp(x[p])) for p in own)
        assert abs(float(loss[i]) - expected) <= 1e-12 * max(1, expected)
    for reduction, expected in (("sum", loss.sum()), ("mean", loss.sum() / 3)):
        found = fa.multi_label_cross_entropy(h, weight, positives, bias=bias, reduction=reduction)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_positive_is_the_cross_entropy(backend):
    h, weight, bias, _, target, _ = dense_problem(9, 30, 6, 3, 0.3)
    one = fa.multi_label_cross_entropy(h, weight, target[:, None], bias=bias, backend=backend)
    other = fa.linear_cross_entropy(h, weight, target, bias=bias, backend=backend)
    leaves = (h, weight, bias)
    for a, b in zip(
        (one, *torch.autograd.grad(one, leaves)), (other, *torch.autograd.grad(other, leaves)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_all_classes_positive_is_a_loss_of_zero(backend):
    h, weight, bias, *_ = dense_problem(3, 5, 4, 1, 0)
    positives = torch.arange(5).expand(3, 5).contiguous()
    positives[1, 0] = -100  # one negative class
    positives[2] = -100
    loss = fa.multi_label_cross_entropy(h, weight, positives, bias=bias, reduction="none", backend=backend)
    assert loss[0].item() == 0 and loss[1].item() > 0 and loss[2].item() == 0
    dh, dweight, dbias = torch.autograd.grad(loss.sum(), (h, weight, bias))
    assert not dh[0].any() and dh[1].any() and not dh[2].any()
    assert dweight.isfinite().all() and dbias.isfinite().all()
    none = fa.multi_label_cross_entropy(h, weight, positives[:, :0], backend=backend)
    assert none.item() == 0 and not any(g.any() for g in torch.autograd.grad(none, (h, weight)))


def test_gradcheck():
    h, weight, bias = (
        testing.random_tensor(*s, seed=len(s), dtype=torch.float64, requires_grad=True)
        for s in ((4, 3), (6, 3), (6,))
    )
    positives = torch.tensor([[1, 4, -100], [-100, -100, -100], [5, -100, 0], [2, 2, -100]])
    assert torch.autograd.gradcheck(
        lambda h, w, b: fa.multi_label_cross_entropy(h, w, positives, bias=b, reduction="none"),
        (h, weight, bias),
    )


@given(
    n=st.integers(0, 30),
    v=st.integers(1, 300),
    d=st.integers(1, 40),
    p=st.integers(0, 6),
    index=st.sampled_from([torch.int32, torch.int64]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cpu(isa, nan_outputs, small_chunks, n, v, d, p, index, reduction, biased, seed):
    h, weight, bias, _, _, upstream = dense_problem(n, v, d, seed, 0)
    positives = lists(n, v, p, seed, index)

    def op(h, weight, bias=None, *, backend):
        return fa.multi_label_cross_entropy(
            h, weight, positives, bias=bias, reduction=reduction, backend=backend
        )

    # as of one positive's loss (`vocabulary.compare`), of which a row has p
    grad = (upstream if reduction == "none" else torch.tensor(1.7)) * max(1, p)
    compare(op, (h, weight, bias) if biased else (h, weight), grad)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_low_precision(isa, nan_outputs, small_chunks, dtype):
    h, weight, bias, _, _, upstream = dense_problem(23, 150, 17, 5, 0, dtype)
    positives = lists(23, 150, 4, 5)

    def op(h, weight, bias, backend):
        return fa.multi_label_cross_entropy(
            h, weight, positives, bias=bias, reduction="none", backend=backend
        )

    check_low_precision(op, (h, weight, bias), upstream)


def test_equal_large_logits_keep_their_digits():
    h, weight = torch.tensor([[1e8]]), torch.ones(4, 1)
    for backend in ("cpu", "reference"):
        loss = fa.multi_label_cross_entropy(h, weight, torch.tensor([[0, 2]]), backend=backend)
        torch.testing.assert_close(loss, 2 * torch.tensor(3.0).log())


def test_opcheck():
    h, weight, bias, *_ = dense_problem(5, 9, 4, 1, 0)
    positives = lists(5, 9, 3, 2)
    torch.library.opcheck(torch.ops.fastattn.multi_label_cross_entropy, (h, weight, bias, positives, ""))
    detached = (h.detach(), weight.detach(), bias.detach(), torch.ones(2, 5), positives, 7, "")
    torch.library.opcheck(torch.ops.fastattn.multi_label_cross_entropy_backward, (torch.ones(5), *detached))


def test_compiles():
    h, weight, bias, *_ = dense_problem(5, 9, 4, 1, 0)
    positives = lists(5, 9, 3, 2)

    def step(h):
        return fa.multi_label_cross_entropy(h, weight, positives, bias=bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(*((f(h), *torch.autograd.grad(f(h), (h,))) for f in (step, compiled)), strict=True):
        assert torch.equal(a, b)


def test_refusals_name_the_argument():
    h, weight, bias, *_ = dense_problem(5, 9, 4, 1, 0)
    positives = lists(5, 9, 3, 2)
    call = fa.multi_label_cross_entropy
    for wrong, error, message in (
        (lambda: call(h, weight, positives.float()), TypeError, "positives must be int32 or int64"),
        (lambda: call(h, weight, positives[:3]), ValueError, r"positives must have shape \(5x3\)"),
        (lambda: call(h, weight, positives + 9), ValueError, r"positives must lie in \[0, 9\) or -100"),
        (lambda: call(h, weight[:, 1:], positives), ValueError, "h must have a last dim of 3"),
        (lambda: call(h, weight, positives, bias=bias[1:]), ValueError, "bias must have shape"),
        (lambda: call(h, weight, positives, reduction="max"), ValueError, "reduction must be one of"),
    ):
        with pytest.raises(error, match=message):
            wrong()
