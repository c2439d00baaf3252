"""Losses over a vocabulary: fused with the product before them, and StableMax against float64 as HRM computes it."""

import torch
import torch.nn.functional as F

import fastattn as fa
from benchmarks.registry import Case, Problem
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
BOTH = "forward+backward"


def _targets(rows, vocabulary):
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(5))


def linear(dtype, rows, width, vocabulary):
    h = testing.random_tensor(rows, width, dtype=dtype, seed=1, requires_grad=True)
    weight = testing.random_tensor(
        vocabulary, width, dtype=dtype, seed=2, scale=width**-0.5, requires_grad=True
    )

    def eager(h, weight, target):
        return F.cross_entropy((h @ weight.T).to(torch.promote_types(h.dtype, FP32)), target)

    return Problem(
        inputs=(h, weight, _targets(rows, vocabulary)),
        contenders={"fastattn": fa.linear_cross_entropy, "eager": eager},
        reference=eager,
        terms=vocabulary + width,
    )


def stablemax(dtype, rows, vocabulary):
    logits = testing.random_tensor(rows, vocabulary, dtype=dtype, seed=3, requires_grad=True)

    def in_float64(logits, target):
        x = logits.double()
        s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        picked = (s / s.sum(-1, keepdim=True)).log().gather(-1, target[:, None])
        return -picked.mean()

    return Problem(
        inputs=(logits, _targets(rows, vocabulary)),
        contenders={"fastattn": fa.stablemax_cross_entropy, "eager float64": in_float64},
        reference=in_float64,
        terms=vocabulary,
    )


CASES = [
    Case("vocab", "linear_cross_entropy", linear, {"rows": 1024, "width": 512, "vocabulary": 16384}, dtype,
         direction, quick=dtype == FP32)
    for dtype in (FP32, BF16)
    for direction in ("forward", BOTH)
] + [
    Case("vocab", "stablemax_cross_entropy", stablemax, {"rows": 512, "vocabulary": 32000}, FP32, direction,
         quick=True)
    for direction in ("forward", BOTH)
]  # fmt: skip
