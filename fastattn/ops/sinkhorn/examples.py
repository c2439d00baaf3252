"""Typical calls of this op."""

from ...runtime.examples import Example, Make
from . import sinkhorn


def examples(make: Make) -> dict[str, Example]:
    scores = make.normal(1, make.length(21), 4)
    packed = {"lengths": make.count(2) + 6, "cu_seqlens": make.count(3) * 10}
    return {
        "sinkhorn": Example(sinkhorn, {"scores": scores}),
        "sinkhorn, causal": Example(sinkhorn, {"scores": scores}, {"causal": True}),
        "sinkhorn, prefix": Example(
            sinkhorn, {"scores": scores, "prefix_lengths": make.count(1) + 13}, {"causal": True}
        ),
        "sinkhorn, packed": Example(sinkhorn, {"scores": scores} | packed),
    }
