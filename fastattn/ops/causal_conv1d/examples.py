"""Typical calls of this op."""

from ...runtime.examples import Example, Make
from . import causal_conv1d


def examples(make: Make) -> dict[str, Example]:
    x, weight = make.normal(2, make.length(9), 20), make.normal(20, 4)
    packed = make.normal(1, make.length(21), 20)
    return {
        "causal_conv1d": Example(
            causal_conv1d, {"x": x, "weight": weight, "bias": make.normal(20)}, {"activation": "silu"}
        ),
        "causal_conv1d, state": Example(
            causal_conv1d,
            {"x": x, "weight": weight, "initial_state": make.normal(2, 3, 20)},
            {"return_state": True},
        ),
        "causal_conv1d, packed": Example(
            causal_conv1d,
            {"x": packed, "weight": weight, "cu_seqlens": make.count(3) * 10},
            {"activation": "silu"},
        ),
    }
