"""Scores far from 0: softmax weights whose log-sum-exp has no bits left for them, softplus weights that underflow."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastattn as fa
from fastattn import testing

SIZES = (-44_000.0, -300.0, 300.0, 44_000.0)
SHAPES = {  # few queries are decoded, more are tiled
    "decoded": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 1, "k_len": 150},
    "decoded by two": {"batch": 1, "heads": 4, "kv_heads": 4, "q_len": 2, "k_len": 90},
    "tiled": {"batch": 1, "heads": 4, "kv_heads": 2, "q_len": 40, "k_len": 150},
}
MASKS = {
    "full": lambda q, k: None,
    "causal": lambda q, k: fa.Mask(causal=True),
    "key_lengths": lambda q, k: fa.Mask(key_lengths=torch.full((q,), k - 7)),
}


def run(backend, **options):
    return lambda *x: fa.attention(*x, backend=backend, return_lse=True, **options)


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softmax(isa, nan_outputs, shape, size, exact):
    inputs = testing.far_attention_inputs(size, exact=exact, head_dim=16, **shape)
    testing.check_op(
        run("cpu"), run("reference"), inputs, terms=200, magnitudes=testing.far_magnitudes(*inputs)
    )


def test_a_row_that_becomes_large_has_its_maximum(isa, nan_outputs):
    """A row's weights may be relative to an earlier maximum, 43 here, when 47 comes. When a neighbour's maximum is raised, at a key
    where this row has 45, large scores begin (64 in units of ln 2, 44.4): they are relative to the true one, as backward takes it."""
    q, k = torch.zeros(1, 1, 40, 2), torch.zeros(1, 1, 200, 2)
    q[..., ::2, 0], q[..., 1::2, 1] = 1.0, 1.0
    k[..., (0, 70, 150), 0] = torch.tensor([43.0, 47.0, 45.0])
    k[..., 150, 1] = 80.0
    inputs = [t.requires_grad_() for t in (q, k, testing.random_tensor(1, 1, 200, 8))]
    testing.check_op(
        run("cpu", scale=1.0),
        run("reference", scale=1.0),
        inputs,
        terms=200,
        magnitudes=testing.far_magnitudes(*inputs),
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_softmax_under_masks(isa, nan_outputs, mask):
    for shape in SHAPES.values():
        inputs = testing.far_attention_inputs(-44_000.0, head_dim=16, **shape)
        options = {"mask": mask(shape["batch"], shape["k_len"])}
        testing.check_op(
            run("cpu", **options),
            run("reference", **options),
            inputs,
            terms=200,
            magnitudes=testing.far_magnitudes(*inputs),
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softmax_gradients_are_as_near_as_torchs(isa, shape):
    inputs = testing.far_attention_inputs(-44_000.0, head_dim=16, **shape)
    _, truth = testing.differentiate(
        lambda *x: fa.attention(*x, backend="reference"), testing.to_float64(inputs)
    )
    _, mine = testing.differentiate(lambda *x: fa.attention(*x, backend="cpu"), inputs)
    _, theirs = testing.differentiate(lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True), inputs)
    for a, b, t in zip(mine, theirs, truth, strict=True):
        # both round products of 44,000 in an order of their own: a few units of the same size
        assert testing.max_error(a, t) <= 4 * testing.max_error(b, t)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_biases_that_leave_a_float_few_bits(isa, nan_outputs, shape):
    """-1e9 and more for every key: the fast backward serves it, and only differences of the biases count."""
    q, k, v = testing.attention_inputs(head_dim=16, **shape)
    bias = torch.full((1, 1, shape["q_len"], shape["k_len"]), -1e9)
    bias[..., ::3] -= 128.0
    bias[..., 1::3] += 64.0  # the spacing of floats there
    inputs = (q * 2.0**-6, k, v)
    options = {"bias": bias}

    def op(backend):
        return lambda *x: fa.attention(*x, bias=bias.to(x[0].dtype), backend=backend)

    testing.check_op(op("cpu"), op("reference"), inputs, terms=200)
    assert fa.explain("attention", *inputs, **options).backend == "cpu"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_dtypes(isa, nan_outputs, dtype):
    """Weights of scores about -300 and -40 in 16 bits, forward and dv, which does not go through the rounded output."""
    for shape in SHAPES.values():
        q, k, v = testing.far_attention_inputs(
            -40.0 if dtype == torch.float16 else -300.0, head_dim=16, **shape
        )
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
        out, (_, _, dv) = testing.differentiate(lambda *x: fa.attention(*x, backend="cpu"), (q, k, v))
        truth, (_, _, true_dv) = testing.differentiate(
            lambda *x: fa.attention(*x, backend="reference"), testing.to_float64((q, k, v))
        )
        # weights become 16-bit before their product where the instruction set has one, and the result is
        for a, t in ((out[0], truth[0]), (dv, true_dv)):
            bound = testing.absolute_bound(
                dtype, 200, 2 * testing.max_finite(t) + testing.max_finite(v), roundings=2
            )
            assert testing.max_error(a, t) <= bound + 300 * 4 * testing.EPS32 * testing.max_finite(t)


def test_the_state_is_the_log_sum_exp_in_two(isa):
    q, k, v = (t.detach() for t in testing.far_attention_inputs(-44_000.0, head_dim=16, **SHAPES["tiled"]))
    options = (None, None, 0, 0.25, 0.0, None, 0, None, *fa.Mask().args("attention", q, k))
    _, lse, state, _ = torch.ops.fastattn.attention(q, k, v, *options, "cpu")
    top, log_sum = state.unbind(-1)
    products = q.double() @ k.double().repeat_interleave(2, 1).mT
    assert (
        torch.equal(top, (q @ k.repeat_interleave(2, 1).mT).amax(-1))
        or testing.relative_error(top, products.amax(-1)) < 16 * testing.EPS32
    )
    assert testing.max_error(0.25 * top.double() + log_sum.double(), lse) <= 44_000 * testing.EPS32


def test_grouped(isa, nan_outputs):
    inputs = testing.far_attention_inputs(-44_000.0, batch=1, heads=4, kv_heads=2, q_len=150, head_dim=16)
    groups = torch.ones(1, 150, dtype=torch.int64)
    groups[:, 70:] = 2

    def op(backend):
        return lambda *x: fa.grouped_attention(*x, groups, window=9, backend=backend)

    testing.check_op(
        op("cpu"), op("reference"), inputs, terms=200, magnitudes=testing.far_magnitudes(*inputs)
    )


@pytest.mark.parametrize("size", (-2_000.0, 300.0))
def test_gated_logarithm(isa, nan_outputs, size):
    """Gates that multiply spread such scores over their own size, and leave a row one key."""
    q, k, v = testing.far_attention_inputs(size, batch=1, heads=4, kv_heads=2, q_len=90, head_dim=16)
    a = fa.sinkhorn(testing.random_tensor(1, 90, 5), temperature=1.0)

    def op(backend):
        return lambda *x: fa.gated_attention(
            *x, a.to(x[0].dtype), window=9, sharpness=2.0, gate="log", backend=backend
        )

    testing.check_op(
        op("cpu"), op("reference"), (q, k, v), terms=200, magnitudes=testing.far_magnitudes(q, k, v)
    )


# --- softplus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (-44_000.0, -300.0, -104.0, -64.0, -50.0, -44.0))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softplus(isa, nan_outputs, shape, size):
    inputs = testing.far_attention_inputs(size, head_dim=16, **shape)
    testing.check_op(
        run("cpu", score="softplus"),
        run("reference", score="softplus"),
        inputs,
        terms=200,
        magnitudes=testing.far_magnitudes(*inputs),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softplus_with_rows_and_keys_of_both_kinds(isa, nan_outputs, shape):
    """A bias that sends some rows, and some keys of the others, below what a weight can be; a mask; a number."""
    inputs = testing.attention_inputs(head_dim=16, **shape)
    bias = torch.zeros(1, 1, shape["q_len"], shape["k_len"])
    bias[:, :, ::2] = -400.0
    bias[..., 5:9] = -1e5
    bias[..., -3:] = -torch.inf
    for extra in (
        {"bias": bias},
        {"bias": bias, "mask": fa.Mask(causal=True, window=(60, None))},
        {"bias": -200.0},
        {"bias": -200.0, "scale": -0.3},
    ):

        def op(backend, extra=extra):
            def fn(q, k, v):
                found = dict(extra)
                if isinstance(found["bias"], torch.Tensor):
                    found["bias"] = found["bias"].to(q.dtype)
                return fa.attention(q, k, v, score="softplus", return_lse=True, backend=backend, **found)

            return fn

        testing.check_op(op("cpu"), op("reference"), inputs, terms=200)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("queries", (1, 40))
def test_softplus_weights_that_are_small_beside_their_row(isa, nan_outputs, queries, backend):
    """Gradients of a value that one row in float32 weighs by e^(low - high). A weight may lose 2^-123 before it is divided by
    the row's sum, of which e^high is the most, and from 1e-20 on down is softmax's, divided by 1 and more; the definition
    takes softmax's from -38 on. Otherwise it is off by its score's roundings, 8 units of 2^-24 of both, and a dozen of its own."""
    for high in (0.0, -10.0, -30.0, -37.0, -40.0, -45.0, -47.0, -60.0):
        low = torch.tensor([high - far for far in (5.0, 25.0, 45.0, 60.0, 80.0)])
        k = torch.cat((torch.tensor([high]), low)).view(1, 1, -1, 1)
        q, v = torch.ones(1, 1, queries, 1), torch.zeros(1, 1, k.shape[2], 1, requires_grad=True)
        out = fa.attention(q, k, v, score="softplus", scale=1.0, backend=backend)
        grad = torch.zeros_like(out)
        grad[0, 0, 0] = 1.0
        out.backward(grad)
        # log1p, where softplus in float64 would be 0
        raw = torch.log1p(k.double().flatten().exp())
        true, total = raw / raw.sum(), float(raw.sum())
        least = 1.0 if total < (1e-20 if backend == "cpu" else math.exp(-38)) else total
        bound = true * 2.0**-24 * (8 * (k.flatten().abs() + abs(high)) + 24) + 2.0**-123 / min(least, 1.0)
        assert bool(((v.grad.double().flatten() - true).abs() <= bound).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_softplus_tends_to_softmax(dtype):
    """By the definition: weights of scores below -38, or -745 where float64's exponential ends, are those of softmax."""
    q, k, v = testing.attention_inputs(2, 4, 2, 5, 9, dtype=dtype)
    for bias in (-100.0, -2000.0):
        # a tensor: a number common to all scores is not added to those of softmax, whose rounding then differs
        options = {"bias": q.new_full((1, 1, 1, 1), bias), "return_lse": True, "backend": "reference"}
        softplus, softmax = (partial(fa.attention, score=name, **options) for name in ("softplus", "softmax"))
        found, gradients = testing.differentiate(softplus, (q, k, v))
        true, true_gradients = testing.differentiate(softmax, (q, k, v))
        for a, t in zip((*found, *gradients), (*true, *true_gradients), strict=True):
            assert a.isfinite().all()
            assert testing.max_error(a, t) <= 16 * torch.finfo(dtype).eps * max(1.0, testing.max_finite(t))


def test_the_definition_is_continuous():
    """Where it changes from weights to their limit, the two differ by less than float64's roundings."""
    q, k, v = (t.double() for t in testing.attention_inputs(1, 1, 1, 4, 6, requires_grad=False))
    from fastattn.ops.attention.reference import LIMIT_SCORE

    scores = (q @ k.mT / math.sqrt(q.shape[-1])).amax(-1)
    for step in (-1e-9, 1e-9):
        bias = (LIMIT_SCORE + step - scores)[..., None]
        out = fa.attention(q, k, v, score="softplus", bias=bias, backend="reference")
        true = fa.attention(q, k, v, bias=bias, backend="reference")
        assert testing.max_error(out, true) < 1e-14


def test_softplus_rows_with_nothing_are_still_zero(isa):
    q, k, v = testing.attention_inputs(1, 2, 2, 12, 20)
    mask = fa.Mask(dense=torch.zeros(12, 20, dtype=torch.bool))
    for backend in ("cpu", "reference"):
        (out, lse), gradients = testing.differentiate(
            lambda *x: run(backend, score="softplus", mask=mask)(*x),  # noqa: B023
            (q, k, v),
        )
        assert not out.any() and (lse == -torch.inf).all() and not any(g.any() for g in gradients)
