"""The calls with which attention's kernels are tuned."""

from __future__ import annotations

import itertools

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from ... import Mask
from . import attention

# length at which a candidate is compared with the reference: several tiles, and no multiple of any
_CHECKED = 150
_SCORES = ("softmax", "sigmoid")


def _shape(dtype: str, score: str, length: int, *, causal: bool = True, **fields) -> dict:
    """`length` counts keys; queries too unless `queries` is given."""
    shape = {"batch": 1, "heads": 8, "kv_heads": 8, "length": length, "head_dim": 64}
    return {**shape, "dtype": dtype, "score": score, "causal": causal, **fields}


def _cpu_shapes(effort: str, target) -> list[dict]:
    kinds = [(dtype, score) for score in _SCORES for dtype in ("float32", "bfloat16")]
    # the key has no mask kind: a configuration must do well with and without a mask
    near = [((448, True), (640, False))]
    if effort == "quick":
        return [_shape(*kind, length, causal=causal) for kind in kinds for length, causal in near[0]]
    near += [((120, True), (144, False)), ((1900, True), (2048, False)), ((6000, True),)]
    shapes = [
        _shape(*kind, length, causal=causal, head_dim=head_dim)
        for head_dim, pair, kind in itertools.product((64, 128, 96, 32), near, kinds)
        for length, causal in pair
    ]
    for kind in kinds:  # grouped heads, a batch
        shapes += [_shape(*kind, 1024, heads=16, kv_heads=2), _shape(*kind, 512, batch=8)]
    return shapes


def _cpu_forward_shapes(effort: str, target) -> list[dict]:
    shapes = _cpu_shapes(effort, target)
    if effort != "quick":
        shapes += [
            _shape(dtype, "softmax", length, queries=1, heads=16, kv_heads=kv_heads)
            for dtype in ("float32", "bfloat16")
            for length in (1000, 4000)
            for kv_heads in (16, 4)
        ]
    return shapes


def _gpu_shapes(effort: str, target) -> list[dict]:
    fields = {"batch": 2, "heads": 16, "kv_heads": 16}
    if effort == "quick":
        kinds = [("bfloat16", score, 128, causal) for score, causal in (("softmax", True), ("sigmoid", True))]
        lengths = (4000,)
    else:
        kinds = itertools.product(("bfloat16", "float16", "float32"), _SCORES, (64, 128), (True, False))
        lengths = (4000, 1024, 16384)
    return [
        _shape(dtype, score, length, causal=causal, head_dim=head_dim, **fields)
        for (dtype, score, head_dim, causal), length in itertools.product(kinds, lengths)
    ]


def _decode_shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16")
    lengths = (4000,) if effort == "quick" else (1000, 4000, 32000)
    fields = {"queries": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return [_shape(dtype, "softmax", length, **fields) for dtype in dtypes for length in lengths]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    return testing.attention_inputs(
        shape["batch"],
        shape["heads"],
        shape["kv_heads"],
        shape.get("queries", shape["length"]),
        shape["length"],
        shape["head_dim"],
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
    """The shape with fewer heads and a shorter length, grouped as before."""
    grouped = shape["heads"] // shape["kv_heads"]
    kv_heads = 2 if grouped == 1 else 1
    smaller = {"batch": 1, "heads": kv_heads * grouped, "kv_heads": kv_heads}
    return {**shape, **smaller, "length": min(shape["length"], _CHECKED)}


def _workload(op: str, backend: str, shapes, device: str) -> Workload:
    return Workload(
        op,
        backend,
        shapes=shapes,
        inputs=_inputs,
        call=_call(backend),
        reference=_call("reference"),
        timed="backward" if op == "attention_backward" else "forward",
        terms=lambda shape: shape["length"],
        check_shape=_check_shape,
        devices=(device,),
        worth=3,
    )


WORKLOADS = (
    _workload("attention", "cpu", _cpu_forward_shapes, "cpu"),
    _workload("attention_backward", "cpu", _cpu_shapes, "cpu"),
    _workload("attention", "triton", _gpu_shapes, "cuda"),
    _workload("attention_backward", "triton", _gpu_shapes, "cuda"),
    _workload("attention_decode", "triton", _decode_shapes, "cuda"),
)
