"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import fused_linear


def examples(make: Make) -> dict[str, Example]:
    N = make.length(9)
    weight = make.normal(30, 16)
    heads = {"x": make.normal(N, 2, 8), "weight": weight, "gate": make.normal(N, 2, 8)}
    return {
        "fused_linear": Example(
            fused_linear, {"x": make.normal(N, 16), "weight": weight}, {"norm_eps": 1e-6}
        ),
        "fused_linear, gate": Example(fused_linear, heads | {"residual": make.normal(N, 30)}),
        "fused_linear, swiglu": Example(
            fused_linear, {"x": make.normal(N, 16), "weight": weight}, {"swiglu": True}
        ),
    }
