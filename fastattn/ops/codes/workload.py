"""The calls with which the loss over codes is tuned: a training step's loss and its gradients."""

from __future__ import annotations

import torch

from fastattn import testing

from ..cross_entropy.workload import workload
from . import vq_cross_entropy


def _shapes(effort: str, target) -> list[dict]:
    dtypes = ("float32",) if effort == "quick" else ("float32", "bfloat16")
    sizes = ((2048, 1024),) if effort == "quick" else ((2048, 1024), (8192, 4096))
    return [
        {"rows": rows, "codes": codes, "width": 256, "tokens": 8 * codes, "dtype": dtype}
        for dtype in dtypes
        for rows, codes in sizes
    ]


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    options = {"dtype": getattr(torch, shape["dtype"]), "requires_grad": True, "device": device}
    h = testing.random_tensor(shape["rows"], shape["width"], seed=seed, **options)
    codebook = testing.random_tensor(shape["codes"], shape["width"], seed=seed + 1, scale=0.05, **options)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(shape["codes"], (shape["tokens"],), generator=generator).to(device)
    target = torch.randint(shape["tokens"], (shape["rows"],), generator=generator).to(device)
    return h, codebook, codes, target


def _calls(backend: str):
    def call(shape: dict, h, codebook, codes, target):
        return vq_cross_entropy(h, codebook, codes, target, backend=backend)

    return call


WORKLOADS = (workload("vq_cross_entropy", _shapes, _inputs, _calls, "codes"),)
