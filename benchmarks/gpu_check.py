"""python -m benchmarks.gpu_check: hold every GPU kernel to its reference on this device, then time the rows of group gpu.

Checks: outputs and gradients in float32, float16 and bfloat16 at the suite's error budgets; repeatability bit by bit;
capture of forward and backward in a CUDA graph; the CUDA C++ kernels that are built; compute-sanitizer over the small
shapes where it is installed. Writes <out>/<device>/check.json and exits 1 when a check failed. `--device cpu` with
TRITON_INTERPRET=1 rehearses the checks, not the timings.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import fastattn as fa
from benchmarks import registry, report, runner
from fastattn import _device, testing
from fastattn.ops.decode import workload as decode_workload
from fastattn.scores import SCORES

MASKS = {
    "full": lambda n: None,
    "causal": lambda n: fa.Mask(causal=True),
    "window": lambda n: fa.Mask(window=(n // 3, n // 5)),
    "packed_prefix": lambda n: fa.Mask(
        cu_seqlens_q=torch.tensor([0, n // 3, n // 3, n]), prefix_lengths=torch.tensor([n // 9, 0, n // 4])
    ),
}


def attention_checks(device: str, length: int, head_dim: int, dtypes) -> dict[str, Callable[[], None]]:
    checks = {}
    for score in SCORES:
        for kind, make in MASKS.items():
            for dtype in dtypes:
                name = f"attention {score} {kind} {str(dtype).removeprefix('torch.')} L={length} D={head_dim}"
                checks[name] = lambda s=score, m=make, d=dtype: one_attention(
                    device, length, head_dim, s, m, d
                )
    return checks


def one_attention(device: str, length: int, head_dim: int, score: str, make, dtype: torch.dtype) -> None:
    inputs = testing.attention_inputs(1, 4, 2, length, length, head_dim, dtype=dtype, device="cpu")
    inputs = tuple(t.detach().to(device).requires_grad_() for t in inputs)
    mask = make(length)

    def run(backend):
        return lambda q, k, v: fa.attention(q, k, v, score=score, mask=mask, backend=backend)

    testing.check_op(run("triton"), run("reference"), inputs, terms=length)
    first = testing.differentiate(run("triton"), inputs)
    for _ in range(3):
        again = testing.differentiate(run("triton"), inputs)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b), "two runs differ"


def other_checks(device: str) -> dict[str, Callable[[], None]]:
    def made(*shape, seed):
        return testing.random_tensor(*shape, seed=seed).to(device).requires_grad_()

    def decoding():
        q, k, v = (t.detach().to(device) for t in testing.attention_inputs(2, 8, 2, 1, 300, 64))
        testing.assert_within_budget(
            fa.attention(q, k, v, backend="triton"),
            lambda q, k, v: fa.attention(q, k, v, backend="reference"),
            (q, k, v),
            terms=300,
        )

    def recurrence():
        x, r = made(6, 130, seed=1), made(6, 130, seed=2)

        def run(name, backend):
            def fn(*args):
                with fa.set_backend(backend):
                    if name == "rms_norm":
                        return fa.rms_norm(args[0], residual=args[1])
                    return getattr(fa, name)(*args)

            return fn

        for name in ("swiglu", "gated", "rms_norm"):
            args = (x,) if name == "swiglu" else (x, r)
            testing.check_op(run(name, "triton"), run(name, "reference"), args, terms=130)

    def losses():
        h, weight = made(7, 32, seed=1), made(500, 32, seed=2)
        target = torch.arange(7, device=device)
        for transform in (None, "stablemax"):

            def run(backend, transform=transform):
                return lambda h, w: fa.linear_cross_entropy(
                    h, w, target, transform=transform, backend=backend
                )

            testing.check_op(run("triton"), run("reference"), (h, weight), terms=500)

    def pair(fn, inputs, terms):
        def run(backend):
            return lambda *args: fn(*args, backend=backend)

        testing.check_op(run("triton"), run("reference"), inputs, terms=terms)

    def qkv(length=70):
        inputs = testing.attention_inputs(1, 4, 2, length, length, 32)
        return tuple(t.detach().to(device).requires_grad_() for t in inputs)

    def softplus():
        for power in (None, 3.0):
            pair(functools.partial(fa.softplus_attention, power=power, mask=fa.Mask(causal=True)), qkv(), 70)

    def grouped():
        groups = torch.randint(1, 256, (1, 70), generator=torch.Generator().manual_seed(0)).to(device)
        pair(functools.partial(fa.grouped_attention, groups=groups, window=5), qkv(), 70)

    def gated():
        pair(functools.partial(fa.gated_attention, window=5), (*qkv(), made(1, 70, 8, seed=3)), 1024)

    def codes():
        tokens = torch.arange(200, device=device) % 50
        target = torch.arange(7, device=device)
        options = {"codes": tokens, "target": target}
        pair(
            functools.partial(fa.vq_cross_entropy, **options),
            (made(7, 32, seed=1), made(50, 32, seed=2)),
            200,
        )

    return {
        "split-key decoding": decoding,
        "recurrence pieces": recurrence,
        "vocabulary losses": losses,
        "softplus attention": softplus,
        "grouped attention": grouped,
        "gated attention": gated,
        "heads of shared rows": codes,
    }


def cuda_checks() -> dict[str, Callable[[], None]]:
    from fastattn import _cuda

    def sinkhorn():
        scores = testing.random_tensor(2, 5000, 8).cuda()
        testing.assert_within_budget(
            fa.sinkhorn(scores, backend="cuda"),
            lambda s: fa.sinkhorn(s, backend="reference"),
            (scores,),
            terms=5000,
        )

    def decode():
        for dtype, dim, cached in (("bfloat16", 128, 200), ("float16", 64, 1), ("float32", 160, 65)):
            shape = {"hidden": 256, "heads": 2, "head_dim": dim, "inner": 500, "layers": 2, "cached": cached}
            shape["dtype"] = dtype
            inputs = decode_workload.inputs(shape, torch.device("cuda"), 0)
            run = functools.partial(decode_workload.call("cuda"), shape)
            first = run(*inputs)
            testing.assert_within_budget(
                first,
                lambda *a, shape=shape: decode_workload.call("reference")(shape, *a),
                inputs,
                terms=16 * 512,
            )
            assert all(torch.equal(run(*inputs), first) for _ in range(20)), "two runs differ"

    def rows():
        h, weight = (testing.random_tensor(*shape).cuda() for shape in ((300, 64), (5000, 64)))
        target = torch.arange(300, device="cuda")
        for transform in (None, "stablemax"):

            def run(backend, transform=transform):
                return lambda *a: fa.linear_cross_entropy(
                    *a, target, transform=transform, z_loss=0.01, backend=backend
                )

            inputs = h.requires_grad_(), weight.requires_grad_()
            testing.check_op(run("cuda"), run("reference"), inputs, terms=5000)

    def graph():
        q, k, v = testing.attention_inputs(1, 4, 2, 256, 256, 64, dtype=torch.bfloat16, device="cuda")
        expected = testing.differentiate(lambda *a: fa.attention(*a, backend="triton"), (q, k, v))
        grad = testing.output_gradients(expected[0])[0].to(q)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = fa.attention(q, k, v, backend="triton")
            grads = torch.autograd.grad(out, (q, k, v), grad)
        captured.replay()
        torch.cuda.synchronize()
        for a, b in zip((out, *grads), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(a, b), "the graph's result differs"

    checks: dict[str, Callable[[], None]] = {"CUDA graph of forward and backward": graph}
    if _cuda.missing() is None:
        checks |= {
            "CUDA C++ sinkhorn": sinkhorn,
            "CUDA C++ decode step": decode,
            "CUDA C++ rows of a loss": rows,
        }
    return checks


def timings() -> dict:
    """The rows of group "gpu", as `python -m benchmarks gpu` writes them."""
    results = [runner.run(case, {}, quick=True) for case in registry.select("gpu")]
    return report.as_json("gpu", report.environment(), {}, results)


def sanitize() -> str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_check", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return "clean" if done.returncode == 0 else f"exit {done.returncode}: {done.stdout[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="one small shape a kernel, nothing timed or written"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("gpu_check: there is no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1")
    dtypes = (torch.float32,) if options.small else testing.LOW_DTYPES
    checks = attention_checks(options.device, 40, 16, dtypes) | other_checks(options.device)
    if on_gpu and not options.small:
        checks |= attention_checks("cuda", 1000, 128, (torch.bfloat16,)) | cuda_checks()
    results = {}
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc(limit=3)
        print(f"{results[name].splitlines()[-1][:100]:>10}  {name}  {time.perf_counter() - started:.1f} s")
    failed = sum(result != "passed" for result in results.values())
    if on_gpu and not options.small:
        target = _device.target("cuda")
        record = {
            "device": target.describe(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "checks": results,
            "sanitizer": sanitize(),
            "benchmarks": timings() if not failed else {},
        }
        path = options.out / target.slug / "check.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path)
        print(f"wrote {path}")
        failed += record["sanitizer"] not in ("clean", "not installed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
