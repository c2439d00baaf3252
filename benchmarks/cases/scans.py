"""Scans and short convolutions against transformers' torch functions, which a CPU has without us, and a loop over tokens."""

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, share_of_peak
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32


def random(*shape, seed, dtype=FP32):
    return testing.random_tensor(*shape, seed=seed, dtype=dtype, requires_grad=True)


def causal_conv1d(dtype, L, D, K):
    """As a layer calls it: a view (B, D, L) of a projection's (B, L, D)."""
    x, weight = random(1, L, D, seed=1, dtype=dtype), random(D, K, seed=2, dtype=dtype)

    def ours(x, weight, backend=None):
        return fa.causal_conv1d(x, weight, activation="silu", backend=backend)

    def transformers(x, weight):
        from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

        return causal_conv1d_fn(x.transpose(1, 2), weight, activation="silu").transpose(1, 2)

    return Problem(
        inputs=(x, weight),
        contenders={"fastattn": ours, "transformers": transformers},
        reference=lambda *t: ours(*t, backend="reference"),
        bytes=2 * x.nbytes,
        terms=L,
    )


def linear_scan(dtype, L, D):
    a, b = random(1, L, D, seed=1, dtype=dtype), random(1, L, D, seed=2, dtype=dtype)
    a = a.detach().sigmoid().requires_grad_()

    def loop(a, b):
        h, out = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            out.append(h)
        return torch.stack(out, 1)

    return Problem(
        inputs=(a, b),
        contenders={"fastattn": fa.linear_scan, "loop": loop},
        reference=lambda a, b: fa.linear_scan(a, b, backend="reference"),
        bytes=3 * b.nbytes,
        terms=L,
    )


def selective_scan(dtype, L, E, N):
    u, dt, z = (random(1, L, E, seed=i, dtype=dtype) for i in (1, 2, 3))
    B, C = (random(1, L, N, seed=i, dtype=dtype) for i in (4, 5))
    A = (-random(E, N, seed=6).detach().abs()).requires_grad_()
    D = random(E, seed=7, dtype=dtype)

    def ours(u, dt, A, B, C, D, z, backend=None):
        return fa.selective_scan(u, dt, A, B, C, D=D, z=z, backend=backend)

    def transformers(u, dt, A, B, C, D, z):
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        u, dt, B, C, z = (t.transpose(1, 2) for t in (u, dt, B, C, z))
        out = mamba_selective_scan(u, dt, A, B, C, D=D, z=z, delta_softplus=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Problem(
        inputs=(u, dt, A, B, C, D, z),
        contenders={"fastattn": ours, "transformers": transformers},
        reference=lambda *t: ours(*t, backend="reference"),
        terms=L * N,
    )


TAPS, WIDTH, MAMBA = {"L": 512, "D": 8192, "K": 4}, {"L": 2048, "D": 1024}, {"E": 1536, "N": 16}
BOTH = "forward+backward"

CASES = [
    Case("scans", "causal_conv1d", causal_conv1d, TAPS, FP32, bars=(faster_than("transformers", 15.0),)),
    Case("scans", "causal_conv1d", causal_conv1d, TAPS, FP32, BOTH, (faster_than("transformers", 15.0),)),
    Case("scans", "causal_conv1d", causal_conv1d, TAPS, BF16, quick=True),
    Case("scans", "causal_conv1d", causal_conv1d, TAPS, BF16, BOTH),
    Case("scans", "linear_scan", linear_scan, WIDTH, FP32, bars=(faster_than("loop", 15.0), share_of_peak(0.75)),
         quick=True),
    Case("scans", "linear_scan", linear_scan, WIDTH, FP32, BOTH, (faster_than("loop", 250.0),)),
    Case("scans", "selective_scan", selective_scan, {"L": 2048, **MAMBA}, FP32,
         bars=(faster_than("transformers", 40.0),)),
    Case("scans", "selective_scan", selective_scan, {"L": 256, **MAMBA}, FP32, BOTH,
         (faster_than("transformers", 80.0),)),
]  # fmt: skip
