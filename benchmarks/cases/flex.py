"""flex_attention on the CPU: what a function of the score costs beside plain attention, and torch's compiled FlexAttention beside it."""

import math

import torch
from torch.nn.attention import flex_attention as flex

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = "forward+backward"
CAP = 20.0


def cap_and_alibi(heads):
    slopes = 2.0 ** -torch.arange(1, heads + 1)

    def score_mod(s, b, h, q, k):
        return CAP * torch.tanh(s / CAP) + slopes[h] * (k - q)

    return score_mod


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q >= k) & (q - k <= 256)


def documents(length):
    of = torch.arange(length) // 300

    def mask_mod(b, h, q, k):
        return (of[q] == of[k]) & (q >= k)

    return mask_mod


def masks(name, length):
    """(a mask function, the same as a fastattn.Mask)."""
    starts = torch.tensor([*range(0, length, 300), length])
    return {
        "causal": (causal, fa.Mask(causal=True)),
        "window": (window, fa.Mask(causal=True, window=(256, None))),
        "documents": (documents(length), fa.Mask(causal=True, cu_seqlens_q=starts)),
    }[name]


def _compiled(score_mod, mask_mod):
    torch.compiler.reset()  # past a few shapes the compiler would give up and run it uncompiled
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    block_mask = None

    def call(q, k, v):
        nonlocal block_mask
        if mask_mod is not None and block_mask is None:
            block_mask = flex.create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
        return compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)

    return call


def _problem(dtype, H, L, D, score_mod, mask_mod, peers, yardsticks=()):
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    return Problem(
        inputs=(q, k, v),
        contenders={"fastattn": lambda *t: fa.flex_attention(*t, score_mod, mask_mod), **peers},
        yardsticks=yardsticks,
        reference=lambda *t: fa.flex_attention(*t, score_mod, mask_mod, backend="reference"),
        terms=L,
    )


def score_problem(dtype, H, L, D, compiled):
    """Beside plain softmax attention, which computes something else."""
    score_mod = cap_and_alibi(H)
    peers = {"plain": fa.attention, **({"flex": _compiled(score_mod, None)} if compiled else {})}
    return _problem(dtype, H, L, D, score_mod, None, peers, ("plain",))


def mask_problem(dtype, H, L, D, mask):
    mask_mod, ours = masks(mask, L)
    return _problem(dtype, H, L, D, None, mask_mod, {"mask": lambda *t: fa.attention(*t, mask=ours)})


def nothing_problem(dtype, H, L, D):
    return _problem(dtype, H, L, D, None, None, {"plain": fa.attention})


def learned_bias_problem(dtype, H, L, D):
    """A bias by distance that is learned, against eager torch."""
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    table = testing.random_tensor(H, 2 * L - 1, dtype=dtype, requires_grad=True)
    at = torch.arange(L)[:, None] - torch.arange(L) + L - 1

    def ours(q, k, v, table):
        return fa.flex_attention(q, k, v, lambda s, b, h, i, j: s + table[h, i - j + L - 1])

    def eager(q, k, v, table):
        return torch.softmax(q @ k.mT / math.sqrt(D) + table[:, at], -1) @ v

    return Problem(
        inputs=(q, k, v, table), contenders={"fastattn": ours, "eager": eager}, reference=eager, terms=L
    )


def _sigmoid(x, row, b, h, q, k):
    return torch.sigmoid(x - torch.log(row.count))


def _exponential(x, row, b, h, q, k):
    return torch.exp(x - row.max)


def _softplus(x, row, b, h, q, k):
    return torch.nn.functional.softplus(x)


# what is built in, written as a function
WRITTEN = {
    "sigmoid": fa.Score.from_function(_sigmoid, normalise=None, statistics=("count",)),
    "softplus": fa.Score.from_function(_softplus, normalise="sum"),
    "softmax": fa.Score.from_function(_exponential, normalise="sum", statistics=("max",)),
}


def written_problem(dtype, H, L, D, score):
    """A built-in score that is written as a function, beside its own kernel."""
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)

    def own(*t):
        return fa.attention(*t, score=score)

    return Problem(
        inputs=(q, k, v),
        contenders={"fastattn": lambda *t: fa.attention(*t, score=WRITTEN[score]), "own": own},
        reference=lambda *t: fa.attention(*t, score=score, backend="reference"),
        terms=L,
    )


SHAPE = {"H": 8, "L": 2048, "D": 64}
CASES = [
    *(
        Case(
            "flex",
            "soft cap and ALiBi",
            score_problem,
            SHAPE,
            dtype,
            direction,
            bars,
            options={"compiled": compiled},
        )
        for dtype, direction, compiled, bars in (
            (FP32, "forward", True, (time_at_most("plain", 1.15), faster_than("flex", 1.8))),
            (FP32, "backward", False, (time_at_most("plain", 1.15),)),
            (BF16, "forward", False, (time_at_most("plain", 1.35),)),
            (BF16, "backward", False, (time_at_most("plain", 1.3),)),
        )
    ),
    Case("flex", "no function", nothing_problem, SHAPE, FP32, "forward", (time_at_most("plain", 1.03),)),
    *(
        Case(
            "flex",
            f"{mask} as a function",
            mask_problem,
            SHAPE,
            FP32,
            direction,
            (time_at_most("mask", 1.1),),
            options={"mask": mask},
        )
        for mask in ("causal", "window", "documents")
        for direction in ("forward", "backward")
    ),
    *(
        Case(
            "flex",
            f"{score} as a function",
            written_problem,
            SHAPE,
            FP32,
            direction,
            (),
            options={"score": score},
        )
        for score in WRITTEN
        for direction in ("forward", "backward")
    ),
    Case(
        "flex",
        "learned bias by distance",
        learned_bias_problem,
        {"H": 8, "L": 1024, "D": 64},
        FP32,
        BOTH,
        (faster_than("eager", 5.0),),
    ),
]
