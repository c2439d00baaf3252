"""Typical calls of this op."""

import torch

from ...masks import Mask
from ...runtime.examples import Example, Make
from . import gated_attention


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    heads = {"q": make.normal(1, 4, L, 12), "k": make.normal(1, 2, L, 12), "v": make.normal(1, 2, L, 10)}
    gates = {
        "assignment": make.shares(1, L, 4),
        "sharpness": torch.ones((), dtype=make.dtype, device=make.device),
    }
    prefix = {"window": 4, "mask": Mask(prefix_lengths=torch.tensor([15]))}
    return {
        "gated_attention": Example(gated_attention, heads | gates, {"window": 4}),
        "gated_attention, prefix": Example(gated_attention, heads | gates, prefix | {"return_lse": True}),
    }
