"""The calls that the recurrence kernels are tuned by: SwiGLU and its gradient, which their block and warps decide most."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ..._registry import set_backend
from . import swiglu


def _shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    sizes = ((8192, 4096),) if effort == "quick" else ((8192, 4096), (8192, 1536), (1024, 8192), (64, 4096))
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


WORKLOADS = (
    Workload(
        "recurrence",
        "triton",
        shapes=_shapes,
        inputs=_inputs,
        call=_call("triton"),
        reference=_call("reference"),
        timed="both",
        check_shape=lambda shape: {**shape, "rows": min(shape["rows"], 64)},
        devices=("cuda",),
    ),
)
