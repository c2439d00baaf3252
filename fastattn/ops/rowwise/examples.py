"""Typical calls of these ops."""

import torch

from ...runtime.examples import Example, Make
from . import gated, rms_norm, rotary, rotary_append, rotary_tables, swiglu


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    q, k, v = make.normal(1, 4, L, 12), make.normal(1, 2, L, 12), make.normal(1, 2, L, 10)
    caches = {
        name: torch.zeros(1, 2, L + 9, t.shape[3], dtype=make.dtype, device=make.device)
        for name, t in (("keys", k), ("values", v))
    }
    positions, N = make.count(L), make.length(9)
    return {
        "rms_norm": Example(
            rms_norm, {"x": make.normal(N, 16), "residual": make.normal(N, 16), "weight": make.normal(16)}
        ),
        "rms_norm, offset": Example(
            rms_norm, {"x": make.normal(N, 16), "weight": make.normal(16)}, {"weight_offset": 1.0}
        ),
        "swiglu": Example(swiglu, {"gate_up": make.normal(N, 46)}),
        "gated": Example(gated, {"x": make.normal(N, 23), "gate": make.normal(N, 23)}),
        "rotary": Example(rotary, {"q": q, "k": k, "positions": positions}),
        "rotary, pairs": Example(rotary, {"q": q, "k": k, "positions": positions}, {"interleaved": True}),
        "rotary_tables": Example(
            rotary_tables, {"q": q, "k": k}, {"cos": make.shares(1, L, 6), "sin": make.shares(1, L, 6)}
        ),
        "rotary_append": Example(
            rotary_append,
            {"q": q, "k": k, "v": v, "positions": positions, "slots": positions[None] + 2} | caches,
            gradients=False,
        ),
    }
