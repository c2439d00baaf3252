"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import linear_cross_entropy, stablemax_cross_entropy


def examples(make: Make) -> dict[str, Example]:
    N = make.length(9)
    h, weight, bias, target = make.normal(N, 16), make.normal(30, 16), make.normal(30), make.whole(30, N)
    temperature = make.shares(N, 2)[:, 0] + 0.5
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
        "linear_cross_entropy, weighed": Example(
            linear_cross_entropy,
            {"h": h, "weight": weight, "target": target},
            {"class_weight": make.shares(1, 30)[0] + 0.1, "label_smoothing": 0.1, "return_lse": True},
        ),
        "stablemax_cross_entropy": Example(
            stablemax_cross_entropy, {"logits": make.normal(N, 30), "target": target}
        ),
    }
