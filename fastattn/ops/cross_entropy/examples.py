"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import linear_cross_entropy, stablemax_cross_entropy


def examples(make: Make) -> dict[str, Example]:
    h, weight, bias, target = make.normal(9, 16), make.normal(30, 16), make.normal(30), make.whole(30, 9)
    temperature = make.shares(9, 2)[:, 0] + 0.5
    return {
        "linear_cross_entropy": Example(
            linear_cross_entropy,
            {"h": h, "weight": weight, "target": target, "bias": bias},
            {"reduction": "none"},
        ),
        "linear_cross_entropy, stablemax": Example(
            linear_cross_entropy,
            {"h": h, "weight": weight, "target": target, "temperature": temperature},
            {"transform": "stablemax"},
        ),
        "stablemax_cross_entropy": Example(
            stablemax_cross_entropy, {"logits": make.normal(9, 30), "target": target}
        ),
    }
