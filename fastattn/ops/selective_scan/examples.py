"""Typical calls of this op."""

from ...runtime.examples import Example, Make
from . import selective_scan


def examples(make: Make) -> dict[str, Example]:
    L = make.length(13)
    A = -make.shares(20, 4)

    def tokens(batch: int) -> dict:
        return {
            "u": make.normal(batch, L, 20),
            "dt": make.normal(batch, L, 20),
            "A": A,
            "B": make.normal(batch, L, 4),
            "C": make.normal(batch, L, 4),
        }

    optional = {"D": make.normal(20), "z": make.normal(2, L, 20), "dt_bias": make.normal(20)}
    return {
        "selective_scan": Example(selective_scan, tokens(2) | optional),
        "selective_scan, packed": Example(
            selective_scan, tokens(1) | {"cu_seqlens": make.count(3) * 6}, {"return_state": True}
        ),
    }
