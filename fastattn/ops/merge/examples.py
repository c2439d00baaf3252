"""Typical calls of the op."""

import torch

from ...runtime.checks import statistics_dtype
from ...runtime.examples import Example, Make
from . import merge


def two_parts(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge of two parts."""
    wide = statistics_dtype(first)
    return merge([(first, first_lse.to(wide)), (second, second_lse.to(wide))], backend=backend)


def examples(make: Make) -> dict[str, Example]:
    L = make.length(9)
    parts = {
        "first": make.normal(1, 2, L, 12),
        "first_lse": make.normal(1, 2, L),
        "second": make.normal(1, 2, L, 12),
        "second_lse": make.normal(1, 2, L),
    }
    return {"merge, two parts": Example(two_parts, parts)}
