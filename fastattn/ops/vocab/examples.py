"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import (
    linear_cross_entropy,
    nearest_codes,
    stablemax_cross_entropy,
    vq_argmax,
    vq_cross_entropy,
    vq_logits,
    vq_sample,
)


def examples(make: Make) -> dict[str, Example]:
    h, weight, codebook = make.normal(9, 16), make.normal(30, 16), make.normal(7, 16)
    bias, target = make.normal(30), make.whole(30, 9)
    head = {"h": h, "codebook": codebook, "codes": make.whole(7, 30)}
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
        "vq_logits": Example(vq_logits, head),
        "vq_logits, bias": Example(vq_logits, head | {"bias": bias}),
        "vq_cross_entropy": Example(vq_cross_entropy, head | {"target": target, "bias": bias}),
        "vq_cross_entropy, shadow": Example(
            vq_cross_entropy, head | {"target": target, "bias": bias, "shadow": make.normal(30, 16)}
        ),
        "vq_argmax": Example(vq_argmax, head | {"bias": bias}, gradients=False),
        "vq_sample": Example(vq_sample, head | {"bias": bias}, gradients=False),
        "nearest_codes": Example(nearest_codes, {"x": h, "codebook": codebook}, gradients=False),
    }
