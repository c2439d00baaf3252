"""The native CPU attention against its definition, on every instruction set this machine runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import _config, testing
from fastattn.ops.attention import tuning  # noqa: F401  declares what is overridden

# small tiles, so that short sequences cross many of their edges
TILES = {
    ("attention", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096, "chunk_k": 64},
    ("attention_backward", "cpu"): {"block_q": 24, "block_k": 32, "pack_kib": 4096},
}
SCORES = ("softmax", "sigmoid", "softplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles():
    with _config.override(TILES):
        yield


def run(backend, score, mask, **options):
    def op(q, k, v):
        return fa.attention(
            q, k, v, score=score, mask=mask, backend=backend, return_lse=score != "sigmoid", **options
        )

    return op


@given(problem=testing.attention_problems(), score=st.sampled_from(SCORES), dtype=st.sampled_from(DTYPES))
def test_forward_is_within_the_error_budget(isa, nan_outputs, problem, score, dtype):
    inputs = problem.inputs(dtype, requires_grad=False)
    mask = problem.mask()
    actual = run("cpu", score, mask)(*inputs)
    testing.assert_within_budget(
        actual, run("reference", score, mask), inputs, terms=problem.k_len + problem.head_dim
    )


@given(problem=testing.attention_problems(), score=st.sampled_from(SCORES), dtype=st.sampled_from(DTYPES))
def test_gradients_are_within_the_error_budget(isa, nan_outputs, problem, score, dtype):
    mask = problem.mask()
    testing.check_op(
        run("cpu", score, mask),
        run("reference", score, mask),
        problem.inputs(dtype),
        terms=problem.k_len * max(1, problem.heads // problem.kv_heads) + problem.q_len + problem.head_dim,
        names=("q", "k", "v"),
    )


@given(
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(DTYPES),
    q_len=st.integers(1, 3),
    k_len=st.integers(0, 300),
    group=st.integers(1, 3),
    head_dim=st.sampled_from((1, 5, 16, 33, 64)),
    v_dim=st.sampled_from((1, 7, 24, 64)),
    options=st.sampled_from(({}, {"causal": True}, {"window": (40, 0)}, {"key_lengths": [70, 3]})),
    layout=st.sampled_from(testing.LAYOUTS),
)
def test_decoding_merges_chunks_of_keys(
    isa, nan_outputs, score, dtype, q_len, k_len, group, head_dim, v_dim, options, layout
):
    if "key_lengths" in options:
        options = {"key_lengths": torch.tensor(options["key_lengths"]).clamp(max=k_len)}
    mask = fa.Mask(**options)
    inputs = testing.attention_inputs(
        2, 2 * group, 2, q_len, k_len, head_dim, v_dim, dtype=dtype, layout=layout, requires_grad=False
    )
    actual = run("cpu", score, mask)(*inputs)
    testing.assert_within_budget(actual, run("reference", score, mask), inputs, terms=k_len + head_dim)
