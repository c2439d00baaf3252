"""The calls with which gated attention's kernels are tuned: grouped attention's, with an assignment in place of groups."""

from __future__ import annotations

import torch

from ..grouped.workload import GROUPS, attention_inputs, workloads
from . import gated_attention


def _inputs(shape: dict, device: torch.device, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape["batch"], shape["length"], GROUPS, generator=generator)
    assignment = scores.softmax(-1).to(device)
    return *attention_inputs(shape, device, seed), assignment.requires_grad_(True)


def _calls(backend: str):
    def call(shape: dict, q, k, v, assignment):
        return gated_attention(q, k, v, assignment, window=shape["window"], backend=backend)

    return call


WORKLOADS = workloads("gated_attention", _inputs, _calls)
