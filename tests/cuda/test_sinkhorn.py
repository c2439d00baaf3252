"""The Sinkhorn kernel, run on the host, against the definition."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.sinkhorn import reference
from fastattn.runtime import cuda as _cuda
from fastattn.runtime import tuning as _config


def check(host, scores, lengths=None, temperature=0.1, iterations=2, threads=256):
    with torch.no_grad(), _config.override({("sinkhorn", "cuda"): {"threads": threads}}):
        actual = fa.sinkhorn(
            scores,
            lengths=lengths,
            temperature=temperature,
            iterations=iterations,
            return_potentials=True,
            backend="cuda",
        )
    testing.assert_within_budget(
        actual,
        lambda s: reference.sinkhorn(s, lengths, None, None, temperature, iterations, False),
        (scores,),
        terms=scores.shape[1],
    )
    return actual[0]


def test_lengths_beyond_the_scores_count_as_all(host):
    """On a GPU no call waits to look at them."""
    scores = testing.random_tensor(2, 20, 8)
    found, expected = (_cuda.sinkhorn(scores, torch.tensor(n), 0.1, 2)[0] for n in ([99, -3], [20, 0]))
    assert torch.equal(found, expected)


def test_strided_lengths(host):
    check(host, testing.random_tensor(2, 20, 8), torch.tensor([[13, 0], [7, 0]], dtype=torch.int32)[:, 0])


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("lengths", (None, [0, 13]))
def test_padded_sequences_in_any_order(host, lengths, seed):
    """20 tokens leave some warps of the two blocks without one."""
    host.schedule(seed)
    scores = testing.random_tensor(2, 20, 8)
    lengths = None if lengths is None else torch.tensor(lengths)
    assignment = check(host, scores, lengths)
    if lengths is not None:
        assert not assignment[0].any() and not assignment[1, 13:].any()


@pytest.mark.parametrize(
    ("groups", "dtype"), ((4, torch.float32), (16, torch.float16), (32, torch.bfloat16), (8, torch.bfloat16))
)
def test_built_kernels(host, groups, dtype):
    check(host, testing.random_tensor(1, 70, groups, dtype=dtype), iterations=1, temperature=1.0)
    assert host.launches == ["sinkhorn"]


def test_kernels_compiled_at_run_time(host):
    """Groups that are no power of two, and more than the lanes of a warp."""
    check(host, testing.random_tensor(1, 33, 6, dtype=torch.float32), iterations=10, threads=64)
    check(host, testing.random_tensor(2, 9, 40, dtype=torch.bfloat16), threads=128)
    assert host.launches == ["sinkhorn<float, 6, 64>", "sinkhorn<fastattn::cuda::bf16, 40, 128>"]


def test_scores_with_strides(host):
    check(host, testing.random_tensor(2, 8, 20).transpose(1, 2))
