"""The calls that softplus attention's kernels are tuned by."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ... import Mask
from . import softplus_attention

_CHECKED = 150  # length at which a candidate is compared with the reference: several tiles, and odd


def _shapes(effort: str, target) -> list[dict]:
    # neither the mask nor the power is in the key: a winner has to do well with any
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
            "power": power,  # 0: none
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


def _workload(op: str, timed: str) -> Workload:
    return Workload(
        op,
        "cpu",
        shapes=_shapes,
        inputs=_inputs,
        call=_call("cpu"),
        reference=_call("reference"),
        timed=timed,
        terms=lambda shape: shape["length"],
        check_shape=lambda shape: {**shape, "heads": 2, "kv_heads": 2, "length": _CHECKED},
    )


WORKLOADS = (
    _workload("softplus_attention", "forward"),
    _workload("softplus_attention_backward", "backward"),
)
