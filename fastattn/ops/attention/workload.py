"""The calls that attention's kernels are tuned by."""

from __future__ import annotations

import itertools

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ... import Mask
from . import attention

_CHECKED = 150  # length at which a candidate is compared with the reference: several tiles, and odd


def _shape(dtype: str, score: str, head_dim: int, length: int, **fields) -> dict:
    shape = {"batch": 1, "heads": 8, "kv_heads": 8, "length": length, "head_dim": head_dim}
    return {**shape, "dtype": dtype, "score": score, "causal": True, **fields}


def _shapes(effort: str, target) -> list[dict]:
    dtypes, scores = ("float32", "bfloat16"), ("softmax", "sigmoid")
    if effort == "quick":
        return [
            _shape(dtype, score, 64, length)
            for length, dtype, score in itertools.product((1024, 256), dtypes, scores)
        ]
    shapes = [
        _shape(dtype, score, head_dim, length, causal=causal)
        for head_dim, length, dtype, score, causal in itertools.product(
            (64, 128, 96, 32), (1024, 256, 4096), dtypes, scores, (True, False)
        )
    ]
    for dtype, score in itertools.product(dtypes, scores):  # odd lengths, grouped heads, a batch
        shapes.append(_shape(dtype, score, 64, 1000))
        shapes.append(_shape(dtype, score, 64, 1024, kv_heads=2))
        shapes.append(_shape(dtype, score, 64, 512, batch=8))
    return shapes


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    return testing.attention_inputs(
        shape["batch"],
        shape["heads"],
        shape["kv_heads"],
        shape["length"],
        head_dim=shape["head_dim"],
        dtype=getattr(torch, shape["dtype"]),
        seed=seed,
        device=device,
    )


def _call(backend: str):
    def call(shape: dict, q, k, v):
        mask = Mask(causal=True) if shape["causal"] else None
        return attention(q, k, v, score=shape["score"], mask=mask, backend=backend)

    return call


def _check_shape(shape: dict) -> dict:
    heads = 2 if shape["heads"] == shape["kv_heads"] else shape["heads"] // shape["kv_heads"]
    kv_heads = heads if shape["heads"] == shape["kv_heads"] else 1
    length = min(shape["length"], _CHECKED)
    return {**shape, "batch": 1, "heads": heads, "kv_heads": kv_heads, "length": length}


WORKLOADS = (
    Workload(
        "attention",
        "cpu",
        shapes=_shapes,
        inputs=_inputs,
        call=_call("cpu"),
        reference=_call("reference"),
        terms=lambda shape: shape["length"],
        check_shape=_check_shape,
    ),
)
