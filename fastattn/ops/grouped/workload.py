"""The calls that grouped and gated attention's kernels are tuned by."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import gated_attention, grouped_attention, sinkhorn

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


def _gpu_shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    lengths = (4096,) if effort == "quick" else (4096, 16384, 65536)
    heads = {"batch": 1, "heads": 16, "kv_heads": 16, "head_dim": 128, "window": 128}
    return [{**heads, "dtype": dtype, "length": length} for dtype in dtypes for length in lengths]


def _sinkhorn_shapes(effort: str, target) -> list[dict]:
    lengths = (8192,) if effort == "quick" else (1024, 8192, 65536)
    return [
        {"batch": 1, "length": length, "groups": groups, "dtype": "bfloat16"}
        for groups in ((8,) if effort == "quick" else (8, 16))
        for length in lengths
    ]


def _sinkhorn_inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    sizes = shape["batch"], shape["length"], shape["groups"]
    return (testing.random_tensor(*sizes, dtype=getattr(torch, shape["dtype"]), seed=seed).to(device),)


def _sinkhorn(backend: str):
    def call(shape: dict, scores):
        return sinkhorn(scores, backend=backend)

    return call


def _workload(op: str, inputs, call, timed: str, backend: str, shapes, device: str) -> Workload:
    return Workload(
        op,
        backend,
        shapes=shapes,
        inputs=inputs,
        call=call(backend),
        reference=call("reference"),
        timed=timed,
        terms=lambda shape: shape["length"],
        check_shape=_check_shape,
        devices=(device,),
    )


WORKLOADS = tuple(
    _workload(*row, *rest)
    for rest in (("cpu", _shapes, "cpu"), ("triton", _gpu_shapes, "cuda"))
    for row in (
        ("grouped_attention", _grouped_inputs, _grouped, "forward"),
        ("grouped_attention_backward", _grouped_inputs, _grouped, "backward"),
        ("gated_attention", _gated_inputs, _gated, "forward"),
        ("gated_attention_backward", _gated_inputs, _gated, "backward"),
    )
)
WORKLOADS += tuple(
    Workload(
        "sinkhorn",
        backend,
        shapes=_sinkhorn_shapes,
        inputs=_sinkhorn_inputs,
        call=_sinkhorn(backend),
        reference=_sinkhorn("reference"),
        terms=lambda shape: shape["length"],
        devices=("cuda",),
    )
    for backend in ("triton", "cuda")
)
