"""Row kernels of a recurrence step against eager torch: norm with residual, SwiGLU, gate, rotary
embedding."""

import torch
import torch.nn.functional as F

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing
from fastattn.ops.matvec import matvec

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _norm(x, residual):
    total = x + residual
    wide = _wide(total)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype), total


def _torch_norm(x, residual):
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], eps=EPS), total


def rms_norm(dtype, rows, width, moved):
    """`moved` counts the tensors of the result's size that cross memory in the case's direction."""
    x, residual = (
        testing.random_tensor(rows, width, dtype=dtype, seed=i, requires_grad=True) for i in (1, 2)
    )
    return Problem(
        inputs=(x, residual),
        contenders={
            "fastattn": lambda x, r: fa.rms_norm(x, residual=r, eps=EPS),
            "eager": _norm,
            "torch rms_norm": _torch_norm,
        },
        reference=_norm,
        bytes=moved * x.nbytes,
        terms=width,
    )


def _swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(dtype, rows, width, moved):
    x = testing.random_tensor(rows, 2 * width, dtype=dtype, seed=3, requires_grad=True)
    return Problem(
        inputs=(x,),
        contenders={"fastattn": fa.swiglu, "eager": _swiglu},
        reference=_swiglu,
        bytes=moved * x.nbytes / 2,
    )


def _gated(x, gate):
    return torch.sigmoid(gate) * x


def gated(dtype, rows, width, moved):
    x, gate = (testing.random_tensor(rows, width, dtype=dtype, seed=i, requires_grad=True) for i in (4, 5))
    return Problem(
        inputs=(x, gate),
        contenders={"fastattn": fa.gated, "eager": _gated},
        reference=_gated,
        bytes=moved * x.nbytes,
    )


def _rotary(q, k, positions):
    half = q.shape[-1] // 2
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    inverse = 10000.0 ** (-torch.arange(half, dtype=wide) / half)
    angle = positions.to(wide)[:, None] * inverse
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        first, second = x.to(wide).chunk(2, -1)
        return (x.to(wide) * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return rotate(q), rotate(k)


def rotary(dtype, H, L, D, moved):
    q, k, _ = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
    positions = torch.arange(L)
    return Problem(
        inputs=(q, k, positions),
        contenders={"fastattn": fa.rotary, "eager": _rotary},
        reference=_rotary,
        bytes=moved * 2 * q.nbytes,
    )


def swiglu_block(dtype, rows, width, inner):
    """x + W_down swiglu(W_gate_up rms(x))"""
    x = testing.random_tensor(rows, width, dtype=dtype, seed=8, requires_grad=True)
    gate_up = testing.random_tensor(
        2 * inner, width, dtype=dtype, seed=9, scale=width**-0.5, requires_grad=True
    )
    down = testing.random_tensor(width, inner, dtype=dtype, seed=10, scale=inner**-0.5, requires_grad=True)

    def ours(x, gate_up, down):
        hidden = fa.fused_linear(x, gate_up, norm_eps=EPS, swiglu=True)
        return fa.fused_linear(hidden, down, residual=x)

    def eager(x, gate_up, down):
        wide = _wide(x)
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return x + F.linear(_swiglu(F.linear(normed, gate_up)), down)

    def row_kernels(x, gate_up, down):
        return x + F.linear(fa.swiglu(F.linear(fa.rms_norm(x, eps=EPS), gate_up)), down)

    return Problem(
        inputs=(x, gate_up, down),
        contenders={"fastattn": ours, "eager": eager, "row kernels, torch's products": row_kernels},
        reference=eager,
        terms=max(rows, inner),
    )


def few_rows(dtype, rows, K, N):
    """A linear layer as decoding calls it: bound by reading the weight, or by the call itself."""
    x = testing.random_tensor(rows, K, dtype=dtype, seed=8)
    weight = testing.random_tensor(N, K, dtype=dtype, seed=9)
    return Problem(
        inputs=(x, weight),
        contenders={"fastattn": matvec, "torch": F.linear},
        reference=F.linear,
        bytes=weight.nbytes,
        bandwidth="read",
        terms=K,
    )


def alternation(dtype, rows, width):
    """A torch op and one of ours taking turns, against each on its own: what two thread pools would cost."""
    x = testing.random_tensor(rows, width, dtype=dtype, seed=6)
    gate_up = testing.random_tensor(rows, 2 * width, dtype=dtype, seed=7)
    turns = 8

    def in_turn(x, gate_up):
        for _ in range(turns):
            y = torch.sigmoid(x)
            z = fa.swiglu(gate_up)
        return y, z

    def apart(x, gate_up):
        for _ in range(turns):
            y = torch.sigmoid(x)
        for _ in range(turns):
            z = fa.swiglu(gate_up)
        return y, z

    return Problem(
        inputs=(x, gate_up),
        contenders={"fastattn": in_turn, "each alone": apart},
        reference=lambda x, gate_up: (torch.sigmoid(x), _swiglu(gate_up)),
    )


NORM, WIDE = {"rows": 2048, "width": 1536}, {"rows": 2048, "width": 4096}
HEADS = {"H": 12, "L": 2048, "D": 128}
BLOCK = {"rows": 2048, "width": 512, "inner": 1536}
BOTH = "forward+backward"

# tensors moved: the forward reads its inputs and writes its outputs; the backward reads them and the output
# gradients again and writes one gradient an input
CASES = [
    Case("recurrence", "rms_norm+residual", rms_norm, NORM, BF16, bars=(faster_than("eager", 2.5),), quick=True,
         options={"moved": 4}),
    Case("recurrence", "rms_norm+residual", rms_norm, NORM, BF16, BOTH, (faster_than("eager", 1.5),), True,
         options={"moved": 4 + 4}),
    Case("recurrence", "rms_norm+residual", rms_norm, NORM, FP32, options={"moved": 4}),
    Case("recurrence", "rms_norm+residual", rms_norm, NORM, FP32, BOTH, options={"moved": 4 + 4}),
    Case("recurrence", "swiglu", swiglu, WIDE, BF16, bars=(faster_than("eager", 5.0),), quick=True,
         options={"moved": 3}),
    Case("recurrence", "swiglu", swiglu, WIDE, BF16, BOTH, (faster_than("eager", 1.5),), True,
         options={"moved": 3 + 5}),
    Case("recurrence", "swiglu", swiglu, WIDE, FP32, options={"moved": 3}),
    Case("recurrence", "swiglu", swiglu, WIDE, FP32, BOTH, options={"moved": 3 + 5}),
    Case("recurrence", "gated", gated, NORM, BF16, options={"moved": 3}),
    Case("recurrence", "gated", gated, NORM, BF16, BOTH, options={"moved": 3 + 5}),
    Case("recurrence", "rotary", rotary, HEADS, BF16, options={"moved": 2}),
    Case("recurrence", "rotary", rotary, HEADS, BF16, BOTH, options={"moved": 2 + 2}),
    Case("recurrence", "swiglu block", swiglu_block, BLOCK, FP32, bars=(faster_than("eager", 2.2),)),
    Case("recurrence", "swiglu block", swiglu_block, BLOCK, FP32, BOTH),
    Case("recurrence", "swiglu block", swiglu_block, {**BLOCK, "rows": 256}, BF16),
    Case("recurrence", "swiglu block", swiglu_block, {**BLOCK, "rows": 64}, BF16, BOTH),
    *(
        Case("recurrence", "few-row product", few_rows, {"rows": rows, "K": 512, "N": 3072}, BF16)
        for rows in (1, 8)
    ),
    Case("recurrence", "alternation", alternation, {"rows": 64, "width": 512}, FP32,
         bars=(time_at_most("each alone", 1.10),), quick=True),
    Case("recurrence", "alternation", alternation, NORM, BF16, bars=(time_at_most("each alone", 1.10),)),
]  # fmt: skip
