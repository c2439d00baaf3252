"""Typical calls of this op."""

import torch

from ...masks import Mask
from ...runtime.examples import Example, Make
from . import grouped_attention


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    heads = {"q": make.normal(1, 4, L, 12), "k": make.normal(1, 2, L, 12), "v": make.normal(1, 2, L, 10)}
    groups = {"groups": make.whole(8, 1, L), "key_groups": make.whole(8, 1, L)}
    prefix = {"window": 4, "mask": Mask(prefix_lengths=torch.tensor([15]))}
    return {
        "grouped_attention": Example(grouped_attention, heads | groups, {"window": 4}),
        "grouped_attention, prefix": Example(
            grouped_attention, heads | groups, prefix | {"return_lse": True}
        ),
    }
