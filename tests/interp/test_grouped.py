"""Triton grouped attention in the interpreter, against the reference: outputs and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.masks import Mask
from fastattn.runtime import tuning as _config


def signatures(length: int, groups: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """(1, length): top_k of the groups a token, one token in seven in none."""
    generator = torch.Generator().manual_seed(seed)
    found = fa.focus_groups(torch.rand(1, length, groups, generator=generator), top_k=top_k)
    return found.masked_fill(torch.arange(length) % 7 == 3, 0)


def check(inputs, groups, window, mask=None, key_groups=None, terms=64):
    def run(backend):
        return lambda q, k, v: fa.grouped_attention(
            q, k, v, groups, key_groups=key_groups, window=window, mask=mask, backend=backend
        )

    # a row of one key: dP and delta are two roundings of one sum, and the true gradients of q and k are 0
    q, k, v = (t.detach() for t in inputs)
    weights = testing.attention_weights(run("reference"), q, k, v)
    lone = testing.lone_key_magnitudes(weights, q, k, v, q.shape[-1] ** -0.5)
    testing.check_op(
        run("triton"), run("reference"), inputs, terms=terms, names=("q", "k", "v"), magnitudes=lone
    )


MASKS = {
    "none": lambda: None,
    "narrowed": lambda: Mask(window=(25, None), key_lengths=torch.tensor([37])),
    "packed": lambda: Mask(cu_seqlens_q=torch.tensor([0, 9, 9, 43])),  # the last tokens belong to no document
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("count", "top_k", "window"), [(4, 1, 3), (8, 2, 0), (60, 3, 50)])
def test_is_the_rule(kind, count, top_k, window, nan_outputs):
    inputs = testing.attention_inputs(1, 2, 1, 45, 45, 24, 12, layout="odd")
    check(inputs, signatures(45, count, top_k), window, MASKS[kind]())


def in_runs(length: int, run: int) -> torch.Tensor:
    """(1, length): the first group for `run` tokens, then the second, then the first again."""
    return (torch.arange(length) // run % 2 + 1)[None]


def test_whole_tiles_and_far_ones(nan_outputs):
    """Whole tiles, tiles of no common group, and more tiles than one look at their summaries."""
    inputs = testing.attention_inputs(1, 1, 1, 1100, 1100, 4, requires_grad=False)

    def run(backend):
        return lambda q, k, v: fa.grouped_attention(q, k, v, in_runs(1100, 300), window=2, backend=backend)

    with _config.override({("grouped_attention", "triton"): {"block_m": 128, "block_n": 16}}):
        out = run("triton")(*inputs)
    testing.assert_within_budget(out, run("reference"), inputs, terms=1100)


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32)])
def test_gradients_of_whole_tiles(block_m, block_n, nan_outputs):
    tiles = {"block_m": block_m, "block_n": block_n}
    with _config.override({("grouped_attention_backward", "triton"): tiles}):
        check(testing.attention_inputs(1, 1, 1, 210, 210, 8), in_runs(210, 60), window=2, terms=210)


def test_float16(nan_outputs):
    inputs = testing.attention_inputs(1, 2, 2, 40, 40, 16, dtype=torch.float16)
    check(inputs, signatures(40, 8, 2), 5)


def test_decoding(nan_outputs):
    """Few queries against a longer key side."""
    groups, key_groups = signatures(3, 8, 2), signatures(50, 8, 2, seed=1)
    check(testing.attention_inputs(1, 2, 1, 3, 50, 16), groups, 4, key_groups=key_groups)


@settings(max_examples=3)
@given(
    length=st.integers(1, 40), count=st.integers(1, 63), top_k=st.integers(1, 3), window=st.integers(0, 45)
)
@example(length=1, count=1, top_k=1, window=0)
def test_any_signatures(length, count, top_k, window):
    groups = signatures(length, count, min(top_k, count), seed=length)
    with testing.nan_filled_outputs():
        check(testing.attention_inputs(1, 1, 1, length, length, 8), groups, window)
