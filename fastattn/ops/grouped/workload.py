"""The calls with which grouped attention's kernels are tuned."""

from __future__ import annotations

import torch

from fastattn import testing
from fastattn.autotune.space import Workload

from . import grouped_attention

# length at which a candidate is compared with the reference: several tiles, and no multiple of any
_CHECKED = 150
GROUPS = 16


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


def attention_inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    sizes = (shape["batch"], shape["heads"], shape["kv_heads"], shape["length"], shape["length"])
    dtype = getattr(torch, shape["dtype"])
    return testing.attention_inputs(*sizes, shape["head_dim"], dtype=dtype, seed=seed, device=device)


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(GROUPS, (shape["batch"], shape["length"]), generator=generator)
    signatures = 1 << bits  # one group a token, as with top_k=1
    return *attention_inputs(shape, device, seed), signatures.to(device)


def _calls(backend: str):
    def call(shape: dict, q, k, v, groups):
        return grouped_attention(q, k, v, groups, window=shape["window"], backend=backend)

    return call


def _check_shape(shape: dict) -> dict:
    return {**shape, "heads": 2, "kv_heads": 2, "length": _CHECKED, "window": 16}


def _gpu_shapes(effort: str, target) -> list[dict]:
    dtypes = ("bfloat16",) if effort == "quick" else ("bfloat16", "float16", "float32")
    lengths = (4096,) if effort == "quick" else (4096, 16384, 65536)
    heads = {"batch": 1, "heads": 16, "kv_heads": 16, "head_dim": 128, "window": 128}
    return [{**heads, "dtype": dtype, "length": length} for dtype in dtypes for length in lengths]


def workloads(op: str, inputs, calls) -> tuple[Workload, ...]:
    """The workloads of an attention op with a window and of its backward: on the CPU, and in Triton on a GPU."""
    return tuple(
        Workload(
            name,
            backend,
            shapes=shapes,
            inputs=inputs,
            call=calls(backend),
            reference=calls("reference"),
            timed=timed,
            terms=lambda shape: shape["length"],
            check_shape=_check_shape,
            devices=(device,),
        )
        for backend, shapes, device in (("cpu", _shapes, "cpu"), ("triton", _gpu_shapes, "cuda"))
        for name, timed in ((op, "forward"), (f"{op}_backward", "backward"))
    )


WORKLOADS = workloads("grouped_attention", _inputs, _calls)
