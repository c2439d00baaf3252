"""The calls with which the products are tuned: those of a recurrence step."""

from __future__ import annotations

import itertools

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import fused_linear

_CHECKED = 70  # rows at which a candidate is compared with the reference


def _shapes(effort: str, target) -> list[dict]:
    kinds = ("float32", "bfloat16")
    # a model's largest product, with the fewest rows from which a look-up still reaches a training step's
    if effort == "quick":
        return [
            {"rows": 512, "inputs": width, "outputs": 6 * width, "swiglu": True, "dtype": dtype}
            for dtype, width in (("float32", 512), ("bfloat16", 1024))
        ]
    shapes = []
    for dtype, rows, width in itertools.product(kinds, (64, 1024, 2048), (512, 1536)):
        for outputs, inputs, swiglu in (
            (6 * width, width, True),
            (4 * width, width, False),
            (width, width, False),
            (width, 3 * width, False),
        ):
            shape = {"rows": rows, "inputs": inputs, "outputs": outputs, "swiglu": swiglu, "dtype": dtype}
            shapes.append(shape)
    return shapes


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    options = {"dtype": getattr(torch, shape["dtype"]), "requires_grad": True, "device": device}
    x = testing.random_tensor(shape["rows"], shape["inputs"], seed=seed, **options)
    scale = shape["inputs"] ** -0.5
    weight = testing.random_tensor(shape["outputs"], shape["inputs"], seed=seed + 1, scale=scale, **options)
    return x, weight


def _call(backend: str):
    def call(shape: dict, x, weight):
        return fused_linear(x, weight, norm_eps=1e-6, swiglu=shape["swiglu"], backend=backend)

    return call


def _workload(op: str, backend: str = "cpu", device: str = "cpu") -> Workload:
    return Workload(
        op,
        backend,
        shapes=_shapes,
        inputs=_inputs,
        call=_call(backend),
        reference=_call("reference"),
        timed="backward" if op.endswith("backward") else "forward",
        terms=lambda shape: max(shape["rows"], shape["inputs"], shape["outputs"]),
        check_shape=lambda shape: {**shape, "rows": _CHECKED, "inputs": 96, "outputs": 136},
        devices=(device,),
        worth=2,
    )


WORKLOADS = (
    _workload("fused_linear"),
    _workload("fused_linear_backward"),
    _workload("fused_linear", "triton", "cuda"),
)
