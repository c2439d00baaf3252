"""The calls with which the row-wise kernels are tuned: SwiGLU and its gradient, which move the most memory."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ...runtime.registry import set_backend
from . import swiglu


def _shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    max_rows = 2048 if target.kind == "cpu" else 8192
    sizes = ((max_rows, 4096),)
    if effort != "quick":
        sizes += ((max_rows, 1536), (max_rows // 8, 8192), (64, 4096), (64, 256))
    return [{"rows": rows, "columns": columns, "dtype": dtype} for dtype in dtypes for rows, columns in sizes]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    dtype = getattr(torch, shape["dtype"])
    size = (shape["rows"], 2 * shape["columns"])
    return (testing.random_tensor(*size, dtype=dtype, seed=seed, device=device, requires_grad=True),)


def _call(backend: str):
    def call(shape: dict, gate_up):
        with set_backend(backend):
            return swiglu(gate_up)

    return call


def _workload(backend: str, device: str) -> Workload:
    return Workload(
        "recurrence",
        backend,
        shapes=_shapes,
        inputs=_inputs,
        call=_call(backend),
        reference=_call("reference"),
        timed="both",
        check_shape=lambda shape: {**shape, "rows": min(shape["rows"], 64)},
        devices=(device,),
    )


WORKLOADS = (_workload("cpu", "cpu"), _workload("triton", "cuda"))
