"""LSSA and LSSAR against the published equation in plain torch and against own softmax attention."""

import math

import torch
import torch.nn.functional as F

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 16
BOTH = "forward+backward"
EAGER_SCORES = 8 * 2048**2  # what eager torch is given at most: beyond, its scores are gigabytes


def _published(q, k, v, rows, power):
    """The equation as printed, for some rows of a causal sequence."""
    allowed = torch.arange(k.shape[2]) <= rows[:, None]
    n = (rows + 1)[:, None].to(q.dtype)
    c = math.log(q.shape[3]) * n.log()
    s = F.softplus(c * (F.normalize(q[:, :, rows], dim=-1) @ F.normalize(k, dim=-1).mT))
    s = s.masked_fill(~allowed, 0)
    weights = s / s.sum(-1, keepdim=True)
    if power is not None:
        weights = torch.relu(weights * n - (n > 3).to(n.dtype)).masked_fill(~allowed, 0) ** power
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def lssa(dtype, *, H, L, D, power=None, backward=False):
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    mask, everything = fa.Mask(causal=True), torch.arange(L)
    rows = torch.linspace(0, L - 1, CHECKED_ROWS).long()
    contenders = {
        "fastattn": lambda q, k, v: fa.lssa_attention(q, k, v, power=power, mask=mask),
        "own softmax": lambda q, k, v: fa.attention(q, k, v, mask=mask),
    }
    if H * L * L <= EAGER_SCORES:
        contenders["eager"] = lambda q, k, v: _published(q, k, v, everything, power)

    def one_head(q, k, v):
        return _published(q[:, :1], k[:, :1], v[:, :1], everything, power)

    return Problem(
        inputs=(q, k, v),
        contenders=contenders,
        reference=one_head if backward else lambda q, k, v: _published(q, k, v, rows, power),
        select=(lambda x: x[:, :1]) if backward else (lambda x: x[:, :, rows]),
        yardsticks=("own softmax",),
        flops=(3.5 if backward else 1) * 2 * H * L * L * D,
        terms=L + D,
    )


def decoding(dtype, *, H, L, D, power):
    """One new token against L keys."""
    q, k, v = testing.attention_inputs(1, H, H, 1, L, D, dtype=dtype, requires_grad=False)
    last = torch.tensor([L - 1])

    def definition(q, k, v):
        return _published(q.expand(-1, -1, L, -1), k, v, last, power)

    return Problem(
        inputs=(q, k, v),
        contenders={
            "fastattn": lambda q, k, v: fa.lssa_attention(q, k, v, power=power),
            "own softmax": fa.attention,
            "eager": definition,
        },
        reference=definition,
        yardsticks=("own softmax",),
        bytes=k.nbytes + v.nbytes,
        terms=L + D,
    )


def _row(op, build, shape, dtype, *bars, direction="forward", **options):
    return Case("reweighted", op, build, shape, dtype, direction, bars, True, options=options)


SMALL, LONG = {"H": 8, "L": 2048, "D": 64}, {"H": 8, "L": 4096, "D": 64}
CASES = [
    _row("LSSAR p=15", lssa, SMALL, FP32, faster_than("eager", 10), power=15),
    _row("LSSAR p=15", lssa, SMALL, FP32, faster_than("eager", 12), direction=BOTH, power=15, backward=True),
    _row("LSSAR p=15", lssa, LONG, BF16, time_at_most("own softmax", 2.2), power=15),
    _row("LSSA", lssa, LONG, BF16, time_at_most("own softmax", 1.4)),
    _row("LSSA", lssa, SMALL, FP32, time_at_most("own softmax", 1.4)),
    *(_row("LSSAR p=15 decode", decoding, {"H": 8, "L": L, "D": 64}, BF16, power=15) for L in (16384, 65536)),
]
