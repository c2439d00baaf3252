"""The calls with which the losses are tuned: a training step's loss and its gradients."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import linear_cross_entropy

_CHECKED = 70  # rows at which a candidate is compared with the reference


def _linear_shapes(effort: str, target) -> list[dict]:
    if effort == "quick":  # the smallest sizes from which a look-up still reaches a training step's
        return [
            {"rows": 512, "classes": 8192, "width": 512, "dtype": dtype} for dtype in ("bfloat16", "float32")
        ]
    return [
        {"rows": rows, "classes": classes, "width": 512, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for rows, classes in ((2048, 16384), (1024, 65536))
    ]


def _linear_inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    options = {"dtype": getattr(torch, shape["dtype"]), "requires_grad": True, "device": device}
    h = testing.random_tensor(shape["rows"], shape["width"], seed=seed, **options)
    weight = testing.random_tensor(shape["classes"], shape["width"], seed=seed + 1, scale=0.05, **options)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(shape["classes"], (shape["rows"],), generator=generator).to(device)
    return h, weight, target


def _linear(backend: str):
    def call(shape: dict, h, weight, target):
        return linear_cross_entropy(h, weight, target, backend=backend)

    return call


def _row_shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    sizes = ((8192, 32768),) if effort == "quick" else ((8192, 32768), (4096, 131072), (32768, 1024))
    return [
        {"rows": rows, "classes": classes, "width": 2048, "dtype": dtype}
        for dtype in dtypes
        for rows, classes in sizes
    ]


def workload(
    op: str, shapes, inputs, call, classes: str, backend: str = "cpu", device: str = "cpu"
) -> Workload:
    return Workload(
        op,
        backend,
        shapes=shapes,
        inputs=inputs,
        call=call(backend),
        reference=call("reference"),
        timed="both",
        terms=lambda shape: max(shape[classes], shape["width"], shape["rows"]),
        check_shape=lambda shape: {**shape, "rows": _CHECKED, classes: min(shape[classes], 500)},
        devices=(device,),
        worth=1,
    )


WORKLOADS = (
    workload("linear_cross_entropy", _linear_shapes, _linear_inputs, _linear, "classes"),
    workload("vocab_rows", _row_shapes, _linear_inputs, _linear, "classes", "triton", "cuda"),
    workload("vocab_rows", _row_shapes, _linear_inputs, _linear, "classes", "cuda", "cuda"),
)
