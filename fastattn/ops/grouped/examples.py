"""Typical calls of this op."""

from ...runtime.examples import Example, Make
from . import grouped_attention


def examples(make: Make) -> dict[str, Example]:
    heads = {"q": make.normal(1, 4, 21, 12), "k": make.normal(1, 2, 21, 12), "v": make.normal(1, 2, 21, 10)}
    groups = {"groups": make.whole(8, 1, 21), "key_groups": make.whole(8, 1, 21)}
    return {"grouped_attention": Example(grouped_attention, heads | groups, {"window": 4})}
