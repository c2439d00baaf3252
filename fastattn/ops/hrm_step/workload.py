"""The calls with which the decode step is tuned: one token in the sizes of HRM-Text."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import decode_step

_CYCLES = {"h_cycles": 2, "l_cycles": 3}
_CALLS = 8


def _shapes(effort: str, target) -> list[dict]:
    sizes = [(1536, 12, 4096)]  # hidden, heads, inner of XL
    if effort != "quick":
        sizes += [(1024, 8, 2816), (1280, 10, 3584), (1792, 14, 4864)]
    return [
        {"hidden": hidden, "heads": heads, "head_dim": 128, "inner": inner, "layers": 2, "cached": cached, "dtype": "bfloat16"}
        for hidden, heads, inner in sizes
        for cached in (256, 2048)
    ]  # fmt: skip


def inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    """(states, caches, weights). Tuning uses two layers a stack: with more, the time of a layer is the same."""
    options = {"dtype": getattr(torch, shape["dtype"]), "device": device}
    hidden, inner, heads, dim = (shape[name] for name in ("hidden", "inner", "heads", "head_dim"))
    states = [testing.random_tensor(1, hidden, seed=seed + i, **options) for i in range(2)]
    sizes = _CALLS, shape["layers"], 1, heads, shape["cached"], dim
    caches = [testing.random_tensor(*sizes, seed=seed + 2 + i, **options) for i in range(2)]
    shapes = ((4 * heads * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner))
    weights = [
        testing.random_tensor(*size, seed=seed + 4 + i, scale=size[1] ** -0.5, **options)
        for i, size in enumerate(shapes * 2 * shape["layers"])
    ]
    return *states, *caches, *weights


def call(backend: str):
    def step(shape: dict, z_h, z_l, k_cache, v_cache, *weights):
        position = shape["cached"] - 1
        return decode_step(z_h, z_l, weights, k_cache, v_cache, position, **_CYCLES, backend=backend)

    return step


WORKLOADS = (
    Workload(
        "decode_step",
        "cuda",
        shapes=_shapes,
        inputs=inputs,
        call=call("cuda"),
        reference=call("reference"),
        # the layers of all calls run one after the other, and each may add a rounding
        terms=lambda shape: _CALLS * shape["layers"] * shape["inner"],
        devices=("cuda",),
    ),
)
