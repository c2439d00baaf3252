"""16-bit attention that the definitions serve: computed in float32, rounded once, no worse than torch's math backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn as fa
from fastattn import testing

HALF = (torch.bfloat16, torch.float16)
SHAPES = {
    "(1, H, Lq, Lk)": (1, 4, 33, 47),
    "(B, 1, Lq, Lk)": (2, 1, 33, 47),
    "(B, H, 1, Lk)": (2, 4, 1, 47),
    "(1, H, 1, 1)": (1, 4, 1, 1),
}


def assert_rounded_once(actual, truth, terms):
    """Half a unit in the last place, and float32's roundings of `terms` terms: `testing.rounding_band` derives it."""
    testing.assert_close_to_truth(actual, truth, None, terms=terms)


def attend(q, k, v, bias, **options):
    return fa.attention(q, k, v, bias=bias, **options)


def by_torch(q, k, v, bias):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@pytest.mark.parametrize("scale", (1.0, 4.0))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", HALF)
def test_a_bias_that_needs_a_gradient(dtype, shape, scale):
    q, k, v = testing.attention_inputs(2, 4, 2, 33, 47, 16, dtype=dtype, scale=scale)
    bias = testing.random_tensor(*shape, dtype=dtype, seed=9, requires_grad=True)
    inputs = (q, k, v, bias)
    found, gradients = testing.differentiate(attend, inputs)
    truth, true_gradients = testing.differentiate(attend, testing.to_float64(inputs))
    peer, peer_gradients = testing.differentiate(by_torch, inputs)
    for mine, true, theirs in zip(
        (*found, *gradients), (*truth, *true_gradients), (*peer, *peer_gradients), strict=True
    ):
        if shape == SHAPES["(1, H, 1, 1)"] and mine.shape == shape:
            # a constant of a row changes nothing: its gradient is what is left of sums of 47 * 33 * 2 terms
            assert mine.abs().max() <= 2 * math.sqrt(47 * 33 * 2) * 47 * testing.EPS32 * scale
            continue
        # sums of 47 keys over 16 products, of 33 * 2 * 2 rows for a key, of 33 * 4 for a bias
        assert_rounded_once(mine, true, terms=16 + 47 + 33 * 4)
        # Theirs is at least |round(true) - true|. With mine = round(true + e), the 16-bit number nearest to true + e,
        # |mine - true| <= |mine - true - e| + |e| <= |round(true) - true - e| + |e| <= theirs + 2 |e|.
        e = testing.max_finite(true) * (4 + math.sqrt(200)) * testing.EPS32
        assert testing.max_error(mine, true) <= testing.max_error(theirs, true) + 2 * e


@pytest.mark.parametrize("score", ("softmax", "sigmoid", "softplus"))
@pytest.mark.parametrize("dtype", HALF)
def test_scores(dtype, score):
    inputs = testing.attention_inputs(1, 4, 2, 33, 47, 16, dtype=dtype, scale=2.0)

    def op(*qkv):
        return fa.attention(*qkv, score=score, mask=fa.Mask(causal=True), backend="reference")

    check(op, inputs, terms=16 + 47 + 66)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("power", (None, 1, 3.5))
def test_lssa(dtype, power):
    inputs = testing.attention_inputs(1, 4, 2, 33, 33, 16, dtype=dtype, scale=2.0)

    def op(*qkv):
        return fa.softplus_attention(*qkv, power=power, mask=fa.Mask(causal=True), backend="reference")

    # the exponent of a power multiplies the relative error of what it is of
    check(op, inputs, terms=(16 + 33 + 66) * 16)


@pytest.mark.parametrize("dtype", HALF)
def test_grouped(dtype):
    inputs = testing.attention_inputs(1, 4, 2, 33, 33, 16, dtype=dtype, scale=2.0)
    groups = torch.randint(0, 8, (1, 33), generator=torch.Generator().manual_seed(0))
    check(
        lambda *qkv: fa.grouped_attention(*qkv, groups, window=3, backend="reference"),
        inputs,
        terms=16 + 33 + 66,
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gate", ("multiply", "log"))
def test_gated(dtype, gate):
    inputs = testing.attention_inputs(1, 4, 2, 33, 33, 16, dtype=dtype, scale=2.0)
    a = testing.random_tensor(1, 33, 5, dtype=dtype, seed=5).softmax(-1).detach().requires_grad_()
    check(
        lambda *x: fa.gated_attention(*x, window=3, sharpness=2.0, gate=gate, backend="reference"),
        (*inputs, a),
        terms=16 + 33 + 4 * 66,
    )


def check(op, inputs, terms):
    found, gradients = testing.differentiate(op, inputs)
    truth, true_gradients = testing.differentiate(op, testing.to_float64(inputs))
    for mine, true in zip((*found, *gradients), (*truth, *true_gradients), strict=True):
        assert_rounded_once(mine, true, terms)


@pytest.mark.parametrize("backend", (None, "reference"))
def test_products_over_the_range_of_float16(backend):
    """q.k = 147,456 before its scale, at a head dim of 512 that the reference serves and one of 256 that kernels do."""
    for dim, size in ((512, 17.0), (256, 24.0)):
        q = torch.full((1, 1, 3, dim), size, dtype=torch.float16)
        k = q.clone()
        k[:, :, 1:] = size / 2
        v = testing.random_tensor(1, 1, 3, dim, dtype=torch.float16)
        inputs = tuple(t.requires_grad_() for t in (q, k, v))

        def op(*qkv):
            return fa.attention(*qkv, scale=2.0**-16, backend=backend)

        assert (
            float(q[0, 0, 0].detach().double() @ k[0, 0, 0].detach().double())
            > torch.finfo(torch.float16).max
        )
        found, gradients = testing.differentiate(op, inputs)
        truth, true_gradients = testing.differentiate(op, testing.to_float64(inputs))
        for mine, true in zip((*found, *gradients), (*truth, *true_gradients), strict=True):
            # sums over the head dim and over three keys; kernels round weights too
            testing.assert_close_to_truth(mine, true, None, factor=0, terms=dim, magnitude=1.0)


def test_every_op_of_attention_serves_products_over_the_range_of_float16():
    """As above by each op, reference and kernels: equal to float64 to the roundings of the result and of its weights."""
    size = 24.0
    q = torch.full((1, 1, 40, 256), size, dtype=torch.float16)
    k = q * (1 - torch.arange(40)[:, None] / 80).half()
    v = testing.random_tensor(1, 1, 40, 256, dtype=torch.float16)
    groups = torch.ones(1, 40, dtype=torch.int64)
    a = torch.full((1, 40, 2), 0.5, dtype=torch.float16)
    ops = {
        "sigmoid": lambda *x, **o: fa.sigmoid_attention(*x, scale=2.0**-16, **o),
        "softplus": lambda *x, **o: fa.attention(*x, score="softplus", scale=2.0**-16, **o),
        "lssa": lambda *x, **o: fa.softplus_attention(*x, **o),
        "lssar": lambda *x, **o: fa.softplus_attention(*x, power=3, **o),
        "grouped": lambda *x, **o: fa.grouped_attention(*x, groups, window=3, scale=2.0**-16, **o),
        "gated": lambda *x, **o: fa.gated_attention(
            *x, a.to(x[0].dtype), window=3, sharpness=1.0, scale=2.0**-16, **o
        ),
    }
    for name, op in ops.items():
        truth = op(*(t.double() for t in (q, k, v)))
        for backend in (None, "reference"):
            found = op(q, k, v, backend=backend)
            assert testing.max_error(found, truth) <= torch.finfo(torch.float16).eps * 4 * testing.max_finite(
                v
            ), (name, backend)
