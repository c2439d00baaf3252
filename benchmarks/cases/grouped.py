"""Grouped sparse attention against dense causal attention, torch's and our own, and gated attention against plain torch."""

import torch
import torch.nn.functional as F

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 16
WINDOW = 128


def _rule(groups, rows, length):
    """allowed(i, j) of some rows, (1, 1, rows, L)."""
    j, i = torch.arange(length), rows[:, None]
    share = (groups[:, rows, None] & groups[:, None, :]) != 0
    return ((j <= i) & (share | (i - j <= WINDOW)))[:, None]


def grouped(dtype, *, H, L, D, G, top_k):
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype, requires_grad=False)
    scores = torch.rand(1, L, G, generator=torch.Generator().manual_seed(0))
    groups = fa.focus_groups(scores, top_k=top_k)
    rows = torch.linspace(0, L - 1, CHECKED_ROWS).long()

    def definition(q, k, v):
        s = q[:, :, rows] @ k.mT / D**0.5
        return s.masked_fill(~_rule(groups, rows, L), -torch.inf).softmax(-1) @ v

    return Problem(
        inputs=(q, k, v),
        contenders={
            "fastattn": lambda q, k, v: fa.grouped_attention(q, k, v, groups, window=WINDOW),
            "own causal": lambda q, k, v: fa.attention(q, k, v, mask=fa.Mask(causal=True)),
            "sdpa causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        },
        reference=definition,
        select=lambda x: x[:, :, rows],
        yardsticks=("own causal", "sdpa causal"),
        terms=L + D,
    )


def gated(dtype, *, H, L, D, G):
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    scores = testing.random_tensor(1, L, G)
    a = fa.sinkhorn(scores, temperature=1.0).requires_grad_()
    sharpness = torch.tensor(2.0, requires_grad=True)
    i = torch.arange(L)
    distance = i[:, None] - i

    def eager(q, k, v, a, sharpness):
        gate = torch.sigmoid(sharpness * (a @ a.mT))[:, None]
        s = (q @ k.mT) / D**0.5 * torch.where(distance <= WINDOW, 1.0, gate)
        return s.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v

    return Problem(
        inputs=(q, k, v, a, sharpness),
        contenders={
            "fastattn": lambda q, k, v, a, s: fa.gated_attention(q, k, v, a, window=WINDOW, sharpness=s),
            "eager": eager,
        },
        reference=eager,
        terms=L + D,
    )


def _top_1(H, L, *bars):
    return Case("grouped", "top-1 of 8", grouped, {"H": H, "L": L, "D": 64}, BF16, bars=bars, quick=True,
                series="top-1 of 8", options={"G": 8, "top_k": 1})  # fmt: skip


CASES = [
    _top_1(4, 2048, faster_than("own causal", 1)),
    _top_1(4, 8192, faster_than("sdpa causal", 10), faster_than("own causal", 3.5)),
    _top_1(1, 65536, faster_than("own causal", 5)),
    Case("grouped", "top-2 of 16", grouped, {"H": 4, "L": 8192, "D": 64}, BF16, quick=True,
         bars=(faster_than("own causal", 2),), options={"G": 16, "top_k": 2}),
    Case("grouped", "gated", gated, {"H": 4, "L": 2048, "D": 64, "G": 8}, FP32, "forward+backward",
         (faster_than("eager", 8),), True),
]  # fmt: skip
