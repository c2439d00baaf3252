"""Typical calls of the op."""

import torch

from ...runtime.examples import Example, Make
from . import multi_label_cross_entropy
from .checks import PADDING


def examples(make: Make) -> dict[str, Example]:
    N = make.length(9)
    positives = make.whole(30, N, 3)
    padding = make.count(3)[None] > make.whole(4, N, 1)
    return {
        "multi_label_cross_entropy": Example(
            multi_label_cross_entropy,
            {
                "h": make.normal(N, 16),
                "weight": make.normal(30, 16),
                "positives": torch.where(padding, PADDING, positives),
                "bias": make.normal(30),
            },
            {"reduction": "none"},
        )
    }
