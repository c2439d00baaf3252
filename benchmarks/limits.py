"""The machine's measured limits, which the share-of-peak column refers to. Best of several tries: a limit
is what the machine can do, so noise only ever lowers it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastattn.runtime import native as _native

COPY_BYTES = 256 << 20  # past any last-level cache
PEAK_ITERATIONS = 200_000  # a millisecond or less, so that some try is undisturbed
MATMUL = (256, 512, 1024, 2048)  # widths tried, the next one while a product takes under MATMUL_SECONDS
MATMUL_SECONDS = 0.02


def best(call: Callable[[], object], tries: int) -> float:
    call()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(quick: bool = False) -> dict[str, float]:
    """GFLOP/s for arithmetic, GB/s for memory; "bf16 dot" only where the machine has such an instruction."""
    tries = 5 if quick else 15
    limits = {"fp32 fma": arithmetic_peak(False, tries)}
    if dot := arithmetic_peak(True, tries):
        limits["bf16 dot"] = dot
    for name, dtype in (("torch matmul fp32", torch.float32), ("torch matmul bf16", torch.bfloat16)):
        limits[name] = _matmul(dtype, tries)
    source, target = (torch.zeros(COPY_BYTES // 4) for _ in range(2))
    limits["copy"] = 2 * COPY_BYTES / best(lambda: target.copy_(source), tries) / 1e9
    limits["read"] = COPY_BYTES / best(source.sum, tries) / 1e9
    return limits


def arithmetic_peak(bf16: bool, tries: int) -> float:
    """GFLOP/s of multiply-adds in registers on torch's threads; 0 without a bf16 dot instruction."""
    threads = torch.get_num_threads()
    sink, operations = torch.empty(threads), torch.empty(1, dtype=torch.int64)

    def run(iterations: int) -> None:
        _native.run(
            "peak",
            sink=sink,
            operations=operations,
            iterations=iterations,
            bf16=int(bf16),
            threads=threads,
        )

    run(1)
    seconds = best(lambda: run(PEAK_ITERATIONS), 8 * tries)
    return float(operations) * PEAK_ITERATIONS * threads / seconds / 1e9


def _matmul(dtype: torch.dtype, tries: int) -> float:
    fastest = 0.0
    for n in MATMUL:
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        seconds = best(lambda a=a, b=b: a @ b, tries)
        fastest = max(fastest, 2 * n**3 / seconds / 1e9)
        if seconds > MATMUL_SECONDS:
            break
    return fastest


def unit(name: str) -> str:
    return "GB/s" if name in ("copy", "read") else "GFLOP/s"
