"""Softplus attention with and without re-weighting (LSSA, LSSAR) against the definition in plain torch."""

import functools

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
BOTH = "forward+backward"


def softplus(dtype, H, L, D, power):
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    own = functools.partial(fa.softplus_attention, power=power, mask=fa.Mask(causal=True))
    eager = functools.partial(own, backend="reference")
    return Problem(
        inputs=(q, k, v), contenders={"fastattn": own, "eager": eager}, reference=eager, terms=L + D
    )


SHAPE = {"H": 8, "L": 2048, "D": 64}
CASES = [
    Case("reweighted", "softplus causal", softplus, {**SHAPE, "power": power}, dtype, direction,
         quick=dtype == FP32 and power == 15)
    for power in (None, 15)
    for dtype in (FP32, BF16)
    for direction in ("forward", BOTH)
]  # fmt: skip
