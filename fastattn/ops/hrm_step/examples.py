"""Typical calls of these ops."""

import torch

from ...runtime.examples import Example, Make
from . import decode_step


def examples(make: Make) -> dict[str, Example]:
    shapes = ((64, 16), (16, 16), (6, 16), (16, 3))  # one layer in each of the two stacks
    state = make.normal(1, 16)
    caches = {
        name: torch.zeros(2, 1, 1, 2, make.length(4), 8, dtype=make.dtype, device=make.device)
        for name in ("k_cache", "v_cache")
    }
    weights = [make.normal(*shape) for shape in shapes * 2]
    return {
        "decode_step": Example(
            decode_step,
            {"z_h": state, "z_l": state, "position": make.count(1)} | caches,
            {"weights": weights, "h_cycles": 1, "l_cycles": 1},
            gradients=False,
        )
    }
