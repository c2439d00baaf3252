"""Typical calls of these ops."""

from ...masks import Mask
from ...runtime.examples import Example, Make
from . import lssa_attention


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    heads = {"q": make.normal(1, 4, L, 12), "k": make.normal(1, 2, L, 12), "v": make.normal(1, 2, L, 10)}
    causal = {"mask": Mask(causal=True)}
    return {
        "lssa_attention": Example(lssa_attention, heads, causal | {"return_lse": True}),
        "lssa_attention, power": Example(lssa_attention, heads, causal | {"power": 3.0}),
        "lssa_attention, odd power": Example(lssa_attention, heads, causal | {"power": 2.5}),
    }
