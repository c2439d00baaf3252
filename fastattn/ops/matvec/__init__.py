"""A linear layer on a few rows, as in decoding, where reading the weights takes most of the time."""

import torch

from ...runtime.registry import call, requested
from . import cpu, schema  # noqa: F401  schema registers the op

MOST_ROWS = cpu.MOST_ROWS


def matvec(x: torch.Tensor, weight: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """x @ weight.T with sums in float32 and one rounding.

    x: (..., K); weight: (N, K), of x's dtype, floating. Returns (..., N) in x's dtype. Differentiable in both. The CPU kernel serves up
    to 8 rows. More rows, and GPUs, are served by the reference, torch's own product. Raises ValueError or TypeError naming the argument.
    """
    return call("matvec", x, weight, requested("matvec", backend))
