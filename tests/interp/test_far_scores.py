"""Triton attention of scores far from 0, in the interpreter: weights that a float32 log-sum-exp has no bits for, or that underflow.

Products of the largest scores are exact: numpy, which forms them here, rounds others by the shapes of its operands, forward and
backward apart, where a GPU adds in one order.
"""

import math

import pytest
import torch

import fastattn as fa
from fastattn import testing

SHAPES = {
    "decoded": {"batch": 1, "heads": 4, "kv_heads": 2, "q_len": 1, "k_len": 90},
    "tiled": {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": 20, "k_len": 37},
}


TERMS = 128


def compare(inputs, exponent=0.0, **options):
    """exponent: the size of scores whose products are rounded."""

    def op(backend):
        def fn(*x):
            found = {n: b.to(x[0].dtype) if isinstance(b, torch.Tensor) else b for n, b in options.items()}
            return fa.attention(*x, backend=backend, return_lse=True, **found)

        return fn

    magnitudes = testing.far_magnitudes(*inputs)
    if exponent:
        # A score sums 16 products: it is off by (4 + sqrt(16)) eps of its size, a weight e^s by as much of itself, and so is what
        # a weight contributes to the gradients of k and v. check_op counts (4 + sqrt(TERMS)) eps of a magnitude.
        _, gradients = testing.differentiate(op("reference"), testing.to_float64(inputs))
        share = exponent * (4 + math.sqrt(16)) / (4 + math.sqrt(TERMS))
        magnitudes = (magnitudes[0], *(share * testing.max_finite(g) for g in gradients[1:3]))
    testing.check_op(op("triton"), op("reference"), inputs, terms=TERMS, magnitudes=magnitudes)


@pytest.mark.parametrize("size", (-44_000.0, 300.0))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softmax(nan_outputs, shape, size):
    compare(testing.far_attention_inputs(size, exact=True, head_dim=16, **shape))


@pytest.mark.parametrize("scale", (-0.25, 0.0))
def test_softmax_of_any_scale(nan_outputs, scale):
    compare(
        testing.far_attention_inputs(-3_000.0, exact=True, head_dim=16, **SHAPES["tiled"]),
        scale=scale,
        bias=-1.5,
    )


@pytest.mark.parametrize("size", (-44_000.0, -104.0, -50.0, -44.0))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softplus(nan_outputs, shape, size):
    # exact products leave no error to the eager run, whose exponents of -50 are rounded as ours are
    exact = size < -1000
    inputs = testing.far_attention_inputs(size, exact=exact, head_dim=16, **shape)
    compare(inputs, exponent=0.0 if exact else -size, score="softplus")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softplus_with_rows_and_keys_of_both_kinds(nan_outputs, shape):
    inputs = testing.attention_inputs(head_dim=16, **shape)
    bias = torch.zeros(1, 1, shape["q_len"], shape["k_len"])
    bias[:, :, ::2] = -400.0
    bias[..., 5:9] = -1e5
    bias[..., -3:] = -torch.inf
    compare(inputs, score="softplus", bias=bias)
    compare(inputs, score="softplus", bias=bias, mask=fa.Mask(causal=True, window=(30, None)))
    compare(inputs, score="softplus", bias=-200.0, scale=-0.3)


def test_softplus_parts_of_both_kinds(nan_outputs):
    """Decoding: the first parts of the keys underflow, a later one does not; then the reverse; then all do."""
    from fastattn.runtime import tuning as _config

    inputs = testing.attention_inputs(1, 2, 1, 1, 200, 16)
    with _config.override({("attention_decode", "triton"): {"keys_per_split": 32}}):
        for low in (slice(0, 150), slice(100, 200), slice(0, 200)):
            bias = torch.zeros(1, 1, 1, 200)
            bias[..., low] = -300.0
            compare(inputs, score="softplus", bias=bias)


def test_grouped(nan_outputs):
    inputs = testing.far_attention_inputs(
        -44_000.0, exact=True, batch=1, heads=2, kv_heads=1, q_len=45, head_dim=16
    )
    groups = torch.ones(1, 45, dtype=torch.int64)
    groups[:, 20:] = 2
    testing.check_op(
        lambda *x: fa.grouped_attention(*x, groups, window=3, backend="triton"),
        lambda *x: fa.grouped_attention(*x, groups, window=3, backend="reference"),
        inputs,
        terms=128,
        magnitudes=testing.far_magnitudes(*inputs),
    )
