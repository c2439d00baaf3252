"""Typical calls of these ops."""

from ...masks import Mask
from ...runtime.examples import Example, Make
from . import softplus_attention


def examples(make: Make) -> dict[str, Example]:
    heads = {"q": make.normal(1, 4, 21, 12), "k": make.normal(1, 2, 21, 12), "v": make.normal(1, 2, 21, 10)}
    causal = {"mask": Mask(causal=True)}
    return {
        "softplus_attention": Example(softplus_attention, heads, causal),
        "softplus_attention, power": Example(softplus_attention, heads, causal | {"power": 3.0}),
        "softplus_attention, odd power": Example(softplus_attention, heads, causal | {"power": 2.5}),
    }
