"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import nearest_codes, vq_argmax, vq_cross_entropy, vq_logits, vq_sample


def examples(make: Make) -> dict[str, Example]:
    N = make.length(9)
    h, codebook, bias = make.normal(N, 16), make.normal(7, 16), make.normal(30)
    head = {"h": h, "codebook": codebook, "codes": make.whole(7, 30)}
    target = make.whole(30, N)
    return {
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
