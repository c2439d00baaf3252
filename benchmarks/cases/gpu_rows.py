"""Rows of one NVIDIA GPU beside the bars of cases/gpu.py: the ops between the products, and whole passes of HRM-Text XL.

Peers that are not installed (liger-kernel, flash-linear-attention, cut-cross-entropy, transformers) are named as such.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn as fa
from benchmarks.cases import models
from benchmarks.cases.recurrence import EPS, _norm, _swiglu, _torch_norm
from benchmarks.registry import Case, Problem, faster_than, milliseconds_at_most
from fastattn import testing
from fastattn.ops.fused_linear import fused_linear
from fastattn.ops.sinkhorn import reference as sinkhorn_reference

BF16 = torch.bfloat16
BOTH = "forward+backward"
DEVICE = "cuda"


def _made(*shape, seed, scale=1.0):
    return testing.random_tensor(
        *shape, seed=seed, scale=scale, dtype=BF16, device=DEVICE, requires_grad=True
    )


def rms_norm(dtype, rows, width):
    def liger(x, residual):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        weight = torch.ones(width, dtype=x.dtype, device=x.device)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    def linear_attention(x, residual):
        from fla.modules.layernorm import rms_norm

        return rms_norm(x, None, None, residual=residual, eps=EPS, prenorm=True)

    return Problem(
        (_made(rows, width, seed=1), _made(rows, width, seed=2)),
        {
            "fastattn": lambda x, r: fa.rms_norm(x, residual=r, eps=EPS),
            "eager": _norm,
            "torch rms_norm": _torch_norm,
            "liger": liger,
            "flash-linear-attention": linear_attention,
        },
        reference=_norm,
        bytes=8 * rows * width * 2,  # two read and two written, and as many back
        terms=width,
    )


def swiglu(dtype, rows, width):
    def liger(x):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(*(part.contiguous() for part in x.chunk(2, -1)))

    def linear_attention(x):
        from fla.modules.activations import swiglu

        return swiglu(*x.chunk(2, -1))

    return Problem(
        (_made(rows, 2 * width, seed=1),),
        {"fastattn": fa.swiglu, "eager": _swiglu, "liger": liger, "flash-linear-attention": linear_attention},
        reference=_swiglu,
        bytes=8 * rows * width * 2,
    )


def rotary(dtype, H, L, D):
    positions = torch.arange(L, device=DEVICE)

    def reference(q, k):
        return fa.rotary(q, k, positions, backend="reference")

    def liger(q, k):
        from liger_kernel.ops.rope import LigerRopeFunction

        angles = positions[:, None] / 1e4 ** (torch.arange(0, D, 2, device=DEVICE) / D)
        table = torch.cat([angles, angles], -1)[None].to(q.dtype)
        return LigerRopeFunction.apply(q, k, table.cos(), table.sin())

    return Problem(
        (_made(1, H, L, D, seed=1), _made(1, H, L, D, seed=2)),
        {"fastattn": lambda q, k: fa.rotary(q, k, positions), "eager": reference, "liger": liger},
        reference=reference,
        bytes=8 * H * L * D * 2,
        terms=4,
    )


def products(dtype, rows, width, inner):
    """The SwiGLU half of a block: the norm, the product, SwiGLU, the product back and the sum."""

    def ours(x, up, down):
        hidden = fused_linear(x, up, norm_eps=EPS, swiglu=True)
        return fused_linear(hidden, down, residual=x)

    def composed(x, up, down):
        return x + fa.swiglu(fa.rms_norm(x, eps=EPS) @ up.T) @ down.T

    def eager(x, up, down):
        return x + _swiglu(F.rms_norm(x, x.shape[-1:], eps=EPS) @ up.T) @ down.T

    x = _made(rows, width, seed=1)
    up = _made(2 * inner, width, seed=2, scale=width**-0.5)
    down = _made(width, inner, seed=3, scale=inner**-0.5)
    return Problem(
        (x, up, down),
        {"fastattn": ours, "row kernels": composed, "eager": eager, "torch.compile": torch.compile(eager)},
        reference=eager,
        flops=18 * rows * width * inner,
        terms=max(rows, inner),
    )


def sinkhorn(dtype, L, groups, causal):
    def run(backend):
        return lambda scores: fa.sinkhorn(scores, causal=causal, backend=backend)

    def eager(scores):
        return sinkhorn_reference.sinkhorn(scores, None, None, None, 0.1, 10, causal)[0]

    scores = _made(1, L, groups, seed=1)
    return Problem(
        (scores,),
        {"fastattn": run(None), "Triton": run("triton"), "eager": eager},
        reference=eager,
        terms=100 * (L + groups),
    )


def gated(dtype, H, L, groups):
    q, k, v = testing.attention_inputs(1, H, H, L, L, 128, dtype=BF16, device=DEVICE)
    small = 700

    def ours(backend, q, k, v, a):
        return fa.gated_attention(q, k, v, a, backend=backend)

    def causal(q, k, v, a):
        return fa.attention(q, k, v, mask=fa.Mask(causal=True)) + 0 * a.sum()  # so that a has a gradient

    def check():
        inputs = testing.attention_inputs(1, 2, 2, small, small, 128, dtype=BF16, device=DEVICE)
        inputs = (*inputs, _made(1, small, groups, seed=4))
        testing.check_op(
            lambda *a: ours(None, *a), lambda *a: ours("reference", *a), inputs, terms=small * groups
        )

    return Problem(
        (q, k, v, _made(1, L, groups, seed=4)),
        {"fastattn": lambda *a: ours(None, *a), "our causal": causal},
        check=check,
        yardsticks=("our causal",),
    )


def decoding(dtype, B, H, kv_heads, L):
    q, k, v = testing.attention_inputs(B, H, kv_heads, 1, L, 128, dtype=BF16, device=DEVICE)

    def sdpa(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call

    return Problem(
        (q, k, v),
        {
            "fastattn": fa.attention,
            "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "sdpa math": sdpa(SDPBackend.MATH),
        },
        reference=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        bytes=k.nbytes + v.nbytes,
        terms=L,
    )


def cross_entropy(dtype, N, d, V):
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def eager(h, weight):
        return F.cross_entropy((h @ weight.T).float(), target)

    def liger(h, weight):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, h, target)

    def cut(h, weight):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, weight, target)

    def linear_attention(h, weight):
        from fla.modules import FusedLinearCrossEntropyLoss

        return FusedLinearCrossEntropyLoss()(h, target, weight)

    def check():
        inputs = _made(700, 64, seed=1), _made(1000, 64, seed=2, scale=0.05)

        def run(backend):
            return lambda h, w: fa.linear_cross_entropy(h, w, target[:700] % 1000, backend=backend)

        testing.check_op(run(None), run("reference"), inputs, terms=1000)

    return Problem(
        (_made(N, d, seed=1), _made(V, d, seed=2, scale=0.05)),
        {
            "fastattn": lambda h, w: fa.linear_cross_entropy(h, w, target),
            "eager": eager,
            "liger": liger,
            "cut-cross-entropy": cut,
            "flash-linear-attention": linear_attention,
        },
        check=check,
        yardsticks=("eager", "liger", "cut-cross-entropy", "flash-linear-attention"),
    )


def _case(op, build, shape, direction=BOTH, bars=(), **options):
    return Case("gpu", op, build, shape, BF16, direction, bars, options=options, device="cuda")


XL = {"hidden": 1536, "layers": 16}

CASES = [
    _case("linear cross-entropy", cross_entropy, {"N": 8192, "d": 2048, "V": 32768}),
    _case("split-key decoding", decoding, {"B": 4, "H": 32, "kv_heads": 8, "L": 32768}, "forward"),
    _case("Sinkhorn", sinkhorn, {"L": 65536, "groups": 8, "causal": False}),
    _case("Sinkhorn", sinkhorn, {"L": 65536, "groups": 8, "causal": True}),
    _case("gated attention", gated, {"H": 16, "L": 8192, "groups": 8}),
    _case("add + rms_norm", rms_norm, {"rows": 16384, "width": 4096}, bars=(faster_than("eager", 1.0),)),
    _case("swiglu", swiglu, {"rows": 16384, "width": 4096}, bars=(faster_than("eager", 1.0),)),
    _case("rotary", rotary, {"H": 16, "L": 16384, "D": 128}, bars=(faster_than("eager", 1.0),)),
    _case("SwiGLU block", products, {"rows": 8192, "width": 1536, "inner": 4096}),
    _case("HRM-Text XL decode", functools.partial(models.decode, device=DEVICE), XL | {"batch": 1, "cached": 256}, "step", (milliseconds_at_most(3.0),)),
    _case("HRM-Text XL prefill", functools.partial(models.prefill, device=DEVICE), XL | {"tokens": 1024}, "step", (milliseconds_at_most(12.0),)),
]  # fmt: skip
