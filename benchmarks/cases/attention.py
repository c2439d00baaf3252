"""Attention on the CPU: every score against torch's own attention, and what a mask saves."""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, share_of_peak, time_at_most
from fastattn import masks, testing

BF16, FP32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 16  # queries of each head that the float64 definition is computed for
BOTH = "forward+backward"


def _sample(length):
    """Query rows to check, the first and the last among them."""
    return torch.linspace(0, length - 1, min(length, CHECKED_ROWS)).long()


def _weights(q, k, score, scale, allowed):
    s = scale * (q @ k.mT)
    if score == "sigmoid":
        weights = torch.sigmoid(s - math.log(k.shape[2]))
        return weights if allowed is None else weights.masked_fill(~allowed, 0)
    if allowed is not None:
        s = s.masked_fill(~allowed, -math.inf)
    wide = s.double() if s.dtype == torch.float64 else s.float()
    return (wide.softmax(-1) if score == "softmax" else F.normalize(F.softplus(wide), p=1, dim=-1)).to(
        s.dtype
    )


def _rows_of(mask, q, k, rows):
    """The mask as bool (B or 1, H or 1, rows, Lk)."""
    if mask is None:
        return None
    arguments = mask.args("attention", q, k)
    return masks.dense_allowed(q.shape[2], k.shape[2], q.device, arguments)[:, :, rows]


def _flex(mask_mod):
    """FlexAttention, compiled at the first call; softmax only (it normalises every score)."""

    torch.compiler.reset()  # past a few shapes the compiler would give up and run it uncompiled
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call(q, k, v):
        block_mask = None
        if mask_mod is not None:
            block_mask = _block_mask(mask_mod, q.shape[2], k.shape[2])
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return call


@functools.cache
def _block_mask(mask_mod, lq, lk):
    return flex.create_block_mask(mask_mod, None, None, lq, lk, device="cpu")


def _pairs(mask, lq, lk):
    """Query-key pairs that a mask lets through: what a kernel has to compute."""
    if mask is None:
        return lq * lk
    q, k = torch.empty(1, 1, lq, 1), torch.empty(1, 1, lk, 1)
    causal, left, right, prefix, *_ = mask.args("attention", q, k)
    i = torch.arange(lq) + lk - lq
    end = i + 1 if causal else torch.full_like(i, lk)
    if prefix is not None:
        end = torch.maximum(end, prefix[:1])
    if right >= 0:
        end = torch.minimum(end, i + right + 1)
    start = (i - left).clamp(min=0) if left >= 0 else torch.zeros_like(i)
    return int((end.clamp(max=lk) - start).clamp(min=0).sum())


def attention(
    dtype,
    *,
    H,
    L,
    D,
    B=1,
    Hkv=None,
    Lq=None,
    score="softmax",
    mask=None,
    mask_mod=None,
    yardsticks=(),
    passes=1.0,
):
    """`mask` makes the Mask for L. `yardsticks`: masks ("full", "causal") that our own time is also compared with.

    `passes`: matrix products in the direction over the forward's two.
    """
    lq = L if Lq is None else Lq
    q, k, v = testing.attention_inputs(B, H, Hkv, lq, L, D, dtype=dtype)
    mask = None if mask is None else mask(L)
    scale = 1 / math.sqrt(D)
    rows = _sample(lq)
    contenders = {"fastattn": lambda q, k, v: fa.attention(q, k, v, score=score, mask=mask)}

    def sdpa(q, k, v):
        options = {"enable_gqa": q.shape[1] != k.shape[1]}
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        if repr(mask) == "Mask(causal)":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return F.scaled_dot_product_attention(q, k, v, dense(), **options)

    @functools.cache
    def dense():
        return _rows_of(mask, q, k, torch.arange(lq))

    def eager(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return _weights(q, k, score, scale, None if mask is None else dense()) @ v

    # torch has no fused sigmoid or softplus: its softmax is the yardstick for their time
    if (
        mask is None or lq * L <= 8192**2 or repr(mask) == "Mask(causal)"
    ):  # its float mask is gigabytes beyond
        contenders["sdpa"] = sdpa
    if score != "softmax":
        yardsticks = (*yardsticks, "sdpa")
    elif mask_mod is not None or (mask is None and L == 2048):  # seconds of compilation each
        contenders["flex"] = _flex(mask_mod)
    if B * H * lq * L <= 8 * 1024 * 1024:  # the weights of larger ones are gigabytes
        contenders["eager"] = eager
    other = {"full": None, "causal": fa.Mask(causal=True)}
    for name in yardsticks:
        if name in other:
            contenders[name] = functools.partial(fa.attention, score=score, mask=other[name])

    # the definition, for the checked rows; gradients need every row, so there one head stands for all
    def definition(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return _weights(q[:, :, rows], k, score, scale, _rows_of(mask, q, k, rows)) @ v

    def first_head(q, k, v):
        allowed = _rows_of(mask, q, k, torch.arange(lq))
        return _weights(q[:1, :1], k[:1, :1], score, scale, allowed) @ v[:1, :1]

    def whole(x):
        return x[:1, :1]

    def sampled(x):
        return x[:, :, rows]

    forward = passes == 1
    return Problem(
        inputs=(q, k, v),
        contenders=contenders,
        reference=definition if forward else first_head,
        select=sampled if forward else whole,
        yardsticks=yardsticks,
        flops=passes * 4 * B * H * _pairs(mask, lq, L) * D,
        terms=L + D,
    )


def bias_gradient(dtype, *, B, H, L, D):
    """A bias of every head that all batch entries share and that has a gradient, as T5's and Swin's; "none" leaves it out."""
    q, k, v = testing.attention_inputs(B, H, H, L, L, D, dtype=dtype)
    bias = testing.random_tensor(1, H, L, L, dtype=dtype, seed=9, requires_grad=True)

    def none(q, k, v, bias):
        return (
            fa.attention(q, k, v) + 0 * bias[0, 0, 0, 0]
        )  # for the gradient of zeros that the runner asks for

    def definition(q, k, v, bias):
        return (q @ k.mT / math.sqrt(D) + bias).softmax(-1) @ v

    return Problem(
        inputs=(q, k, v, bias),
        contenders={
            "fastattn": lambda q, k, v, bias: fa.attention(q, k, v, bias=bias),
            "sdpa": F.scaled_dot_product_attention,
            "none": none,
        },
        reference=definition,
        yardsticks=("none",),
        flops=2.5 * 4 * B * H * L * L * D,
        terms=L + D,
    )


# masks by name, so that FlexAttention's block masks are cached by function
def _causal(b, h, i, j):
    return i >= j


def _window(b, h, i, j):
    return (i >= j) & (i - j <= 256)


def _half(n):
    def prefix(b, h, i, j):
        return (i >= j) | (j < n // 2)

    return prefix


def _row(
    op, dtype, H, L, D, direction="forward", bars=(), quick=False, score="softmax", series="", **options
):
    shape = {"H": H, "L": L, "D": D}
    shape |= {name: options.pop(name) for name in ("B", "Hkv", "Lq") if name in options}
    passes = {"forward": 1.0, "backward": 2.5, BOTH: 3.5}[direction]
    return Case("attention", op, attention, shape, dtype, direction, bars, quick, series,
                {"score": score, "passes": passes, **options})  # fmt: skip


def _scores():
    """Full attention: the bars hold at 2048 and 4096, the other lengths draw the picture."""
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        for D in (64, 128):
            for score in ("softmax", "sigmoid"):
                needed = {"bf16": {"softmax": 4.0, "sigmoid": 4.3}[score], "fp32": 2.3 if D == 64 else 2.2}[
                    name
                ]
                for L in (512, 1024, 2048, 4096):
                    bars = (faster_than("sdpa", needed),) if L >= 2048 else ()
                    if (name, D, L, score) == ("bf16", 128, 4096, "sigmoid"):
                        bars = (*bars, share_of_peak(0.80))
                    yield _row(score, dtype, 8, L, D, bars=bars, quick=(D, L) == (64, 1024), score=score,
                               series=f"{score} {name} D={D}")  # fmt: skip
    yield _row("softplus", FP32, 8, 2048, 64, score="softplus")
    yield _row("softplus", BF16, 8, 2048, 64, score="softplus")


def _masks():
    for dtype in (BF16, FP32):
        yield _row("causal", dtype, 8, 4096, 64, bars=(time_at_most("full", 0.56),), quick=dtype == FP32,
                   mask=lambda n: fa.Mask(causal=True), mask_mod=_causal, yardsticks=("full",))  # fmt: skip
        yield _row("half prefix", dtype, 8, 4096, 64, bars=(time_at_most("full", 0.70),),
                   mask=lambda n: fa.Mask(prefix_lengths=torch.tensor([n // 2])), mask_mod=_half(4096),
                   yardsticks=("full",))  # fmt: skip
        yield _row("window 256 causal", dtype, 4, 16384, 64, bars=(time_at_most("causal", 0.06),),
                   mask=lambda n: fa.Mask(causal=True, window=(256, None)), mask_mod=_window,
                   yardsticks=("causal",))  # fmt: skip


def _backward():
    for dtype in (BF16, FP32):
        for D in (64, 128):
            for score in ("softmax", "sigmoid"):
                bars = (faster_than("sdpa", 2.0),) if score == "softmax" else ()
                yield _row(score, dtype, 8, 2048, D, "backward", bars, (D, dtype) == (64, FP32), score)
        yield _row("causal", dtype, 8, 2048, 64, "backward", mask=lambda n: fa.Mask(causal=True),
                   yardsticks=("full",))  # fmt: skip
        yield Case("attention", "bias gradient", bias_gradient, {"B": 2, "H": 8, "L": 1024, "D": 64}, dtype, "backward",
                   (time_at_most("none", 1.5),))  # fmt: skip


def _small():
    for dtype in (BF16, FP32):
        yield _row("short", dtype, 8, 128, 64, bars=(faster_than("sdpa", 1.0),), quick=True, B=8)
    yield _row("decode", BF16, 32, 8192, 128, bars=(faster_than("sdpa", 1.5),), quick=True, B=4, Hkv=8, Lq=1)
    yield _row("decode", FP32, 32, 8192, 128, B=4, Hkv=8, Lq=1)


CASES = [*_scores(), *_masks(), *_backward(), *_small()]
