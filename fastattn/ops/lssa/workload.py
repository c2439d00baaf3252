"""The calls with which the kernels of LSSA and LSSAR are tuned."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ... import Mask
from . import softplus_attention

# length at which a candidate is compared with the reference: several tiles, and no multiple of any
_CHECKED = 150


def _shapes(effort: str, target) -> list[dict]:
    # the key has neither mask nor power: a configuration must do well with any
    kinds = [(448, True, 0.0), (640, False, 15.0)]
    if effort != "quick":
        kinds += [(120, True, 0.0), (144, False, 3.0), (1900, True, 15.0), (2048, False, 0.0)]
    head_dims = (64,) if effort == "quick" else (64, 128, 32)
    return [
        {
            "batch": 1,
            "heads": 8,
            "kv_heads": 8,
            "length": length,
            "head_dim": head_dim,
            "dtype": dtype,
            "power": power,  # 0: LSSA
            "causal": causal,
        }
        for head_dim in head_dims
        for dtype in ("float32", "bfloat16")
        for length, causal, power in kinds
    ]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    sizes = (shape["batch"], shape["heads"], shape["kv_heads"], shape["length"], shape["length"])
    dtype = getattr(torch, shape["dtype"])
    return testing.attention_inputs(*sizes, shape["head_dim"], dtype=dtype, seed=seed, device=device)


def _call(backend: str):
    def call(shape: dict, q, k, v):
        mask = Mask(causal=True) if shape["causal"] else None
        return softplus_attention(q, k, v, power=shape["power"] or None, mask=mask, backend=backend)

    return call


def _gpu_shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    lengths = (4000,) if effort == "quick" else (4000, 1024, 16384)
    heads = {"batch": 2, "heads": 16, "kv_heads": 16, "head_dim": 128, "causal": True, "power": 15.0}
    return [{**heads, "dtype": dtype, "length": length} for dtype in dtypes for length in lengths]


def _workload(op: str, timed: str, backend: str, shapes, device: str) -> Workload:
    return Workload(
        op,
        backend,
        shapes=shapes,
        inputs=_inputs,
        call=_call(backend),
        reference=_call("reference"),
        timed=timed,
        terms=lambda shape: shape["length"],
        check_shape=lambda shape: {**shape, "heads": 2, "kv_heads": 2, "length": _CHECKED},
        devices=(device,),
    )


WORKLOADS = tuple(
    _workload(op, timed, *place)
    for place in (("cpu", _shapes, "cpu"), ("triton", _gpu_shapes, "cuda"))
    for op, timed in (("softplus_attention", "forward"), ("softplus_attention_backward", "backward"))
)
