"""The calls with which Sinkhorn's kernels are tuned."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import sinkhorn


def _shapes(effort: str, target) -> list[dict]:
    lengths = (8192,) if effort == "quick" else (1024, 8192, 65536)
    return [
        {"batch": 1, "length": length, "groups": groups, "dtype": "bfloat16"}
        for groups in ((8,) if effort == "quick" else (8, 16))
        for length in lengths
    ]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    sizes = shape["batch"], shape["length"], shape["groups"]
    return (testing.random_tensor(*sizes, dtype=getattr(torch, shape["dtype"]), seed=seed).to(device),)


def _calls(backend: str):
    def call(shape: dict, scores):
        return sinkhorn(scores, backend=backend)

    return call


WORKLOADS = tuple(
    Workload(
        "sinkhorn",
        backend,
        shapes=_shapes,
        inputs=_inputs,
        call=_calls(backend),
        reference=_calls("reference"),
        terms=lambda shape: shape["length"],
        devices=("cuda",),
    )
    for backend in ("triton", "cuda")
)
