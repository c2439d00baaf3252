"""Peak memory of gated attention and Sinkhorn, forward and backward, is linear in the length."""

import pytest

_GATED = """
def problem(L, gate):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, L, 16, generator=g, requires_grad=True) for _ in range(3))
    a = torch.randn(1, L, 8, generator=g).softmax(-1).requires_grad_()
    return q, k, v, a, torch.tensor(2.0, requires_grad=True), gate


def run(q, k, v, a, sharpness, gate):
    fa.gated_attention(q, k, v, a, window=64, sharpness=sharpness, gate=gate).sum().backward()
"""

_SINKHORN = """
def problem(L, causal):
    return torch.randn(1, L, 8, generator=torch.Generator().manual_seed(0), requires_grad=True), causal


def run(scores, causal):
    fa.sinkhorn(scores, causal=causal).square().sum().backward()
"""


@pytest.mark.parametrize(
    ("case", "length", "option"),
    [
        (_GATED, 6144, "multiply"),
        (_GATED, 6144, "log"),
        (_SINKHORN, 2**18, False),
        (_SINKHORN, 2**18, True),
    ],
    ids=["gated multiply", "gated log", "sinkhorn whole", "sinkhorn causal"],
)
def test_twice_the_length_takes_twice_the_memory(peak_bytes, case, length, option):
    """Linear growth makes the ratio 2 or, beside a constant part, less; pairs of tokens would make it 4."""
    once, twice = (peak_bytes(case, (100, option), (n, option)) for n in (length, 2 * length))
    assert twice < 2.5 * once
    assert twice < length**2 * 4  # one float32 for a quarter of the pairs of one head
