"""Sinks, soft cap, dropout and biases with a gradient in the Triton kernels, against the definition."""

import itertools

import pytest
import torch
from attention_options import RNG, check, options
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import reference, scores
from fastattn.runtime import tuning as _config

SCORES = tuple(scores.SCORES)


@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=6)
@given(data=st.data(), bias=st.booleans())
def test_options_are_within_the_error_budget(score, data, bias):
    problem = data.draw(testing.attention_problems(max_len=40, head_dims=(1, 8, 17), max_heads=2))
    with testing.nan_filled_outputs():
        check("triton", score, torch.float32, problem, data.draw(options(score)), bias=bias)


@pytest.mark.parametrize("dims", tuple(itertools.product((False, True), repeat=4)))
@settings(max_examples=2)
@given(data=st.data(), score=st.sampled_from(SCORES))
def test_biases_of_every_shape_have_a_gradient(dims, data, score):
    problem = data.draw(testing.attention_problems(max_len=40, head_dims=(1, 8, 17), max_heads=2))
    given_options = data.draw(st.just(({}, False)) | options(score))
    with testing.nan_filled_outputs():
        check("triton", score, torch.float32, problem, given_options, bias_dims=dims)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=60)
@given(data=st.data(), bias=st.booleans())
def test_more_options(score, data, bias):
    problem = data.draw(testing.attention_problems(max_len=40))
    with testing.nan_filled_outputs():
        check("triton", score, torch.float32, problem, data.draw(options(score)), bias=bias)


def test_what_is_dropped_is_the_definitions():
    """Of tiles, of split keys and of packed documents, whose keys start anywhere."""
    q, k = torch.zeros(2, 4, 20, 16), torch.zeros(2, 2, 70, 16)
    v = torch.eye(70).expand(2, 2, -1, -1)  # an output is its row of weights
    rng = torch.tensor(RNG)
    call = {"dropout_p": 0.3, "rng": rng, "backend": "triton"}
    kept = reference.kept((2, 4, 20, 70), round(0.3 * 65536), rng)
    for tiles in ({"block_m": 16, "block_n": 16}, {"block_m": 32, "block_n": 64}):
        with _config.override({("attention", "triton"): tiles}):
            assert torch.equal(fa.attention(q, k, v, **call) != 0, kept)
    assert torch.equal(fa.attention(q[:, :, :1], k, v, **call) != 0, kept[:, :, :1])
    documents = fa.Mask(cu_seqlens_q=torch.tensor([0, 7, 20]), cu_seqlens_k=torch.tensor([0, 21, 70]))
    packed = fa.attention(q[:1], k[:1], v[:1], mask=documents, **call)
    within = (torch.arange(20) < 7)[:, None] == (torch.arange(70) < 21)
    assert torch.equal(packed != 0, kept[:1] & within)


@pytest.mark.parametrize("rows", (1, 20))
def test_the_residual_is_what_rounding_took(rows):
    q, k, v = (testing.random_tensor(1, 2, 70, 16, dtype=torch.float16, seed=i) for i in range(3))
    q = q[:, :, :rows]
    mask = fa.Mask().args("attention", q, k)
    options = (None, None, 0, 0.25, 0.0, None, 0, None, *mask)
    out, _, _, residual = torch.ops.fastattn.attention(q, k, v, *options, "triton")
    truth = fa.attention(q.double(), k.double(), v.double(), scale=0.25)
    # weights are rounded to float16 once, 2^-11 of each; out alone would be off by 2^-11 of itself more
    assert residual.any() and testing.max_error(out + residual, out) == 0
    assert testing.max_error(out.double() + residual.double(), truth) <= testing.absolute_bound(
        torch.float16, 70, testing.max_finite(v)
    )
