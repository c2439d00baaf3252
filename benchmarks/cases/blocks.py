"""Block lists against own attention over every key, in the same run."""

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 64
BOTH = "forward+backward"


def _gathered(q, k, v, blocks, block):
    """One head (1, 1, L, D) over lists of as many blocks each: every query block against the keys that it lists."""
    keys, values = (t.unflatten(2, (-1, block))[0, 0, blocks].flatten(1, 2) for t in (k, v))
    rows = q[0, 0].unflatten(0, (blocks.shape[0], -1))
    weights = (rows @ keys.mT / q.shape[3] ** 0.5).softmax(-1)
    return (weights @ values).flatten(0, 1)[None, None]


def lists(dtype, *, H, L, D, block, density, backward=False):
    """Random lists of one length, a list a block and head, without another mask."""
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    count = L // block
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(1, H, count, count, generator=generator).argsort(-1)[..., : int(count * density)]
    blocks = fa.Blocks.from_indices(indices, block=(block, block), q_length=L, k_length=L)
    mask = fa.Mask(blocks=blocks)

    def one_head(q, k, v):
        return _gathered(q[:, :1], k[:, :1], v[:, :1], indices[0, 0], block)

    return Problem(
        inputs=(q, k, v),
        contenders={
            "fastattn": lambda q, k, v: fa.attention(q, k, v, mask=mask),
            "own full attention": fa.attention,
        },
        reference=one_head,
        select=lambda x: x[:, :1],
        yardsticks=("own full attention",),
        flops=(3.5 if backward else 1) * 4 * H * L * L * D * density,
        terms=L + D,
    )


def moba(dtype, *, H, L, D, block, top):
    """MoBA's lists a token under a causal mask, the lists given."""
    q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype, requires_grad=False)
    mask = fa.Mask(causal=True, blocks=fa.blocks.moba(q, k, block=block, top=top))
    rows = torch.linspace(0, L - 1, CHECKED_ROWS).long()
    number = torch.arange(L)
    allowed = mask.blocks.table()[:, :, rows][..., number // block] & (number <= rows[:, None])

    def definition(q, k, v):
        s = (q[:, :, rows] @ k.mT / D**0.5).masked_fill(~allowed, -torch.inf)
        return s.softmax(-1) @ v

    return Problem(
        inputs=(q, k, v),
        contenders={
            "fastattn": lambda q, k, v: fa.attention(q, k, v, mask=mask),
            "own causal attention": lambda q, k, v: fa.attention(q, k, v, mask=fa.Mask(causal=True)),
        },
        reference=definition,
        select=lambda x: x[:, :, rows],
        yardsticks=("own causal attention",),
        terms=L + D,
    )


def _row(op, build, shape, dtype, *bars, direction="forward", **options):
    return Case("blocks", op, build, shape, dtype, direction, bars, True, options=options)


LONG = {"H": 2, "L": 8192, "D": 128, "block": 64}
EIGHTH, EVERY = {**LONG, "density": 0.125}, {**LONG, "density": 1.0}
PLAIN = "own full attention"
CASES = [
    *(_row("block lists", lists, EIGHTH, dtype, faster_than(PLAIN, 6)) for dtype in (FP32, BF16)),
    *(
        _row("block lists", lists, EIGHTH, dtype, faster_than(PLAIN, 5), direction=BOTH, backward=True)
        for dtype in (FP32, BF16)
    ),
    _row("full block lists", lists, EVERY, FP32, time_at_most(PLAIN, 1.03)),
    _row("MoBA, lists given", moba, {"H": 2, "L": 16384, "D": 64, "block": 512, "top": 3}, FP32),
]
