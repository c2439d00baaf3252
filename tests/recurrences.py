"""Comparing a layer in float64 with a loop over its tokens."""

import torch

from fastattn import testing


def random(*shape, seed=1):
    return testing.random_tensor(*shape, seed=seed, dtype=torch.float64, requires_grad=True)


def same(ours, definition, inputs):
    """Outputs and gradients, relative to the largest, to roundings of sums of a hundred float64 numbers."""
    (mine, slopes), (true, expected) = (testing.differentiate(f, inputs) for f in (ours, definition))
    for a, b in zip(mine + slopes, true + expected, strict=True):
        assert testing.max_error(a, b) < 1e-12 * (1 + testing.max_finite(b))
