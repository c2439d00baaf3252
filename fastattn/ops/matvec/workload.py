"""The calls with which the few-row product is tuned: those of a decode step, whose weights come from memory."""

from __future__ import annotations

import itertools

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import matvec


def _shapes(effort: str, target) -> list[dict]:
    kinds = ("bfloat16",) if effort == "quick" else ("bfloat16", "float32")
    rows = (1,) if effort == "quick" else (1, 2, 8)
    shapes = ((8192, 1536),) if effort == "quick" else ((8192, 1536), (1536, 4096), (3072, 512))
    return [
        {"rows": count, "outputs": outputs, "inputs": inputs, "dtype": dtype}
        for dtype, count, (outputs, inputs) in itertools.product(kinds, rows, shapes)
    ]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    options = {"dtype": getattr(torch, shape["dtype"]), "device": device}
    x = testing.random_tensor(shape["rows"], shape["inputs"], seed=seed, **options)
    scale = shape["inputs"] ** -0.5
    return x, testing.random_tensor(shape["outputs"], shape["inputs"], seed=seed + 1, scale=scale, **options)


def _call(backend: str):
    def call(shape: dict, x, weight):
        return matvec(x, weight, backend=backend)

    return call


WORKLOADS = (
    Workload(
        "matvec",
        "cpu",
        shapes=_shapes,
        inputs=_inputs,
        call=_call("cpu"),
        reference=_call("reference"),
        terms=lambda shape: shape["inputs"],
        check_shape=lambda shape: {**shape, "outputs": 70},
        worth=1,
    ),
)
