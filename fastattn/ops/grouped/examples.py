"""Typical calls of these ops."""

import torch

from ...runtime.examples import Example, Make
from . import gated_attention, grouped_attention, sinkhorn


def examples(make: Make) -> dict[str, Example]:
    heads = {"q": make.normal(1, 4, 21, 12), "k": make.normal(1, 2, 21, 12), "v": make.normal(1, 2, 21, 10)}
    groups = {"groups": make.whole(8, 1, 21), "key_groups": make.whole(8, 1, 21)}
    gates = {
        "assignment": make.shares(1, 21, 4),
        "sharpness": torch.ones((), dtype=make.dtype, device=make.device),
    }
    scores = make.normal(1, 21, 4)
    packed = {"lengths": make.count(2) + 6, "cu_seqlens": make.count(3) * 10}
    return {
        "grouped_attention": Example(grouped_attention, heads | groups, {"window": 4}),
        "gated_attention": Example(gated_attention, heads | gates, {"window": 4}),
        "sinkhorn": Example(sinkhorn, {"scores": scores}),
        "sinkhorn, causal": Example(sinkhorn, {"scores": scores}, {"causal": True}),
        "sinkhorn, packed": Example(sinkhorn, {"scores": scores} | packed),
    }
