"""Typical calls of this op."""

from ...runtime.examples import Example, Make
from . import linear_scan


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    b = make.normal(2, L, 20)
    packed = {"a": make.shares(1, L, 20), "b": make.normal(1, L, 20), "cu_seqlens": make.count(3) * 10}
    return {
        "linear_scan": Example(
            linear_scan, {"a": make.shares(2, L, 20), "b": b, "initial": make.normal(2, 20)}
        ),
        "linear_scan, constants": Example(linear_scan, {"a": make.shares(20), "b": b}, {"reverse": True}),
        "linear_scan, shared": Example(
            linear_scan, {"a": -make.shares(2, L, 3)[..., :1], "b": b}, {"log_a": True}
        ),
        "linear_scan, packed": Example(linear_scan, packed),
    }
