"""Typical calls of these ops."""

from ...runtime.examples import Example, Make
from . import matvec


def examples(make: Make) -> dict[str, Example]:
    return {"matvec": Example(matvec, {"x": make.normal(make.length(3), 16), "weight": make.normal(30, 16)})}
