"""The calls that grouped and gated attention's kernels are tuned by."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import gated_attention, grouped_attention

_CHECKED = 150  # length at which a candidate is compared with the reference: several tiles, and odd
_GROUPS = 16


def _shapes(effort: str, target) -> list[dict]:
    quick = effort == "quick"
    return [
        {
            "batch": 1,
            "heads": 8,
            "kv_heads": 8,
            "length": length,
            "head_dim": head_dim,
            "window": 64,
            "dtype": dtype,
        }
        for head_dim in ((64,) if quick else (64, 128, 32))
        for dtype in (("float32",) if quick else ("float32", "bfloat16"))
        for length in ((500, 640) if quick else (500, 640, 2000, 8000))
    ]


def _qkv(shape: dict, device: torch.device, seed: int) -> tuple:
    sizes = (shape["batch"], shape["heads"], shape["kv_heads"], shape["length"], shape["length"])
    dtype = getattr(torch, shape["dtype"])
    return testing.attention_inputs(*sizes, shape["head_dim"], dtype=dtype, seed=seed, device=device)


def _grouped_inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(_GROUPS, (shape["batch"], shape["length"]), generator=generator)
    return *_qkv(shape, device, seed), (1 << bits).to(device)  # one group a token, as top_k=1 gives


def _grouped(backend: str):
    def call(shape: dict, q, k, v, groups):
        return grouped_attention(q, k, v, groups, window=shape["window"], backend=backend)

    return call


def _gated_inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape["batch"], shape["length"], _GROUPS, generator=generator)
    assignment = scores.softmax(-1).to(device)
    return *_qkv(shape, device, seed), assignment.requires_grad_(True)


def _gated(backend: str):
    def call(shape: dict, q, k, v, assignment):
        return gated_attention(q, k, v, assignment, window=shape["window"], backend=backend)

    return call


def _check_shape(shape: dict) -> dict:
    return {**shape, "heads": 2, "kv_heads": 2, "length": _CHECKED, "window": 16}


def _workload(op: str, inputs, call, timed: str) -> Workload:
    return Workload(
        op,
        "cpu",
        shapes=_shapes,
        inputs=inputs,
        call=call("cpu"),
        reference=call("reference"),
        timed=timed,
        terms=lambda shape: shape["length"],
        check_shape=_check_shape,
    )


WORKLOADS = (
    _workload("grouped_attention", _grouped_inputs, _grouped, "forward"),
    _workload("grouped_attention_backward", _grouped_inputs, _grouped, "backward"),
    _workload("gated_attention", _gated_inputs, _gated, "forward"),
    _workload("gated_attention_backward", _gated_inputs, _gated, "backward"),
)
