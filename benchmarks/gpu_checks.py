"""What gpu_check holds to the reference on a device: every kernel's outputs and gradients, repeatability, graph capture."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention.scores import SCORES
from fastattn.ops.hrm_step import workload as decode_workload
from fastattn.ops.rowwise import reference as recurrence_reference
from fastattn.ops.rowwise import rotary_append
from fastattn.runtime import tuning as _config
from fastattn.runtime.examples import Example, examples

Check = Callable[[], None]

MASKS = {
    "full": lambda n: None,
    "causal": lambda n: fa.Mask(causal=True),
    "window": lambda n: fa.Mask(window=(n // 3, n // 5)),
    "packed_prefix": lambda n: fa.Mask(
        cu_seqlens_q=torch.tensor([0, n // 3, n // 3, n]), prefix_lengths=torch.tensor([n // 9, 0, n // 4])
    ),
}


def attention_checks(device: str, length: int, head_dim: int, dtypes) -> dict[str, Check]:
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
    assert_repeats(run("triton"), inputs)


def assert_repeats(fn: Callable, inputs: tuple, times: int = 3) -> None:
    """Outputs and gradients are bitwise the same in every run."""
    first = testing.differentiate(fn, inputs)
    for _ in range(times):
        again = testing.differentiate(fn, inputs)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b), "two runs differ"


def assert_captured(fn: Callable, inputs: tuple) -> None:
    """Forward and backward in a CUDA graph give what the plain call gave."""
    outputs, gradients = testing.differentiate(fn, inputs)
    grads = [g.to(o) for o, g in zip(outputs, testing.output_gradients(outputs), strict=True)]
    leaves = [t for t in inputs if t.requires_grad]
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = testing.as_tuple(fn(*inputs))
        found_gradients = torch.autograd.grad(found, leaves, grads) if leaves else ()
    captured.replay()
    torch.cuda.synchronize()
    for a, b in zip((*found, *found_gradients), (*outputs, *gradients), strict=True):
        assert torch.equal(a, b), "the graph's result differs"


def other_checks(device: str) -> dict[str, Check]:
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
        assert_repeats(run("triton"), inputs)

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

    def balance():
        cuts = torch.tensor([0, 30, 30, 67], device=device)
        for causal in (False, True):
            for options in ({}, {"cu_seqlens": cuts}):
                fn = functools.partial(fa.sinkhorn, causal=causal, iterations=3, temperature=0.3, **options)
                pair(fn, (made(1, 70, 8, seed=1),), 9 * 78)

    def products():
        x, gate, residual = made(70, 64, seed=1), made(70, 2, 32, seed=3), made(70, 24, seed=4)
        weight, wide = made(24, 64, seed=2), made(48, 64, seed=2)
        _config.tunings()  # what is overridden has to be declared
        tiles = {"product": "native", "block_m": 32, "block_n": 32, "block_k": 32}
        for values in (tiles, {"product": "library"}):
            with _config.override({("fused_linear", "triton"): values}):
                pair(functools.partial(fa.fused_linear, norm_eps=1e-6, swiglu=True), (x, wide), 70)
                pair(
                    lambda x, w, r, backend: fa.fused_linear(x, w, residual=r, backend=backend),
                    (x, weight, residual),
                    70,
                )
                heads = made(70, 2, 32, seed=1)
                pair(
                    lambda x, w, g, backend: fa.fused_linear(x, w, gate=g, backend=backend),
                    (heads, weight, gate),
                    70,
                )

    def sampled():
        h, codebook = made(300, 32, seed=1).detach(), made(50, 32, seed=2).detach()
        tokens = torch.arange(200, device=device) % 50
        uniform = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
            device
        )
        for bias in (None, made(200, seed=3).detach()):
            ours, theirs = (
                torch.ops.fastattn.vq_sample(h, codebook, tokens, bias, uniform, 0.7, backend)
                for backend in ("triton", "reference")
            )
            # a uniform within float32 rounding of a boundary may fall on its other side: 300 of them, 1e-5 wide
            assert int((ours != theirs).sum()) <= 1

    def cached():
        q, k, v = (made(2, heads, 3, 32, seed=heads).detach() for heads in (4, 2, 2))
        positions = torch.tensor([[4, 5, 6], [0, 1, 2]], device=device)

        def run(append):
            caches = torch.zeros(2, 2, 2, 9, 32, device=device)
            return append(q, k, v, positions, positions, *caches, **options), caches

        options = {"theta": 1e4}
        with fa.set_backend("triton"):
            ours = run(rotary_append)
        theirs = run(recurrence_reference.rotary_append)
        # sines and cosines of angles up to 6 to two ulps, then two products and a sum of values up to 5
        assert all(
            testing.max_error(a, b) < 16 * 5 * testing.EPS32 for a, b in zip(ours, theirs, strict=True)
        )

    return {
        "split-key decoding": decoding,
        "recurrence pieces": recurrence,
        "vocabulary losses": losses,
        "softplus attention": softplus,
        "grouped attention": grouped,
        "gated attention": gated,
        "heads of shared rows": codes,
        "sampling from shared rows": sampled,
        "sinkhorn": balance,
        "fused products": products,
        "rotary with the cache's write": cached,
    }


def example_checks(device: str, dtypes) -> dict[str, Check]:
    """Every op's examples that its Triton kernels serve."""
    checks: dict[str, Check] = {}
    for dtype in dtypes:
        for name, example in examples(dtype, device).items():
            if example.refusal("triton") is None:
                checks[f"{name} {str(dtype).removeprefix('torch.')}"] = lambda e=example: one_example(e)
    return checks


def one_example(example: Example) -> None:
    testing.check_example(example, "triton")
    assert_repeats(*testing.example_call(example, "triton"))


# examples whose call waits for the device or draws from its generator, so that no graph can hold it
NOT_CAPTURED = ("vq_sample",)


def captured_examples() -> dict[str, Check]:
    """Every example that Triton serves in a CUDA graph: its masks and other arguments are made beforehand."""
    checks: dict[str, Check] = {}
    for name, example in examples(torch.bfloat16, "cuda").items():
        if name not in NOT_CAPTURED and example.gradients and example.refusal("triton") is None:
            checks[f"CUDA graph: {name}"] = lambda e=example: assert_captured(*plain_call(e))
    return checks


def plain_call(example: Example) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    """(a function, its floating inputs), which does nothing but call the op: `testing.example_call` seeds generators."""
    names = tuple(example.floating)

    def call(*floating: torch.Tensor) -> tuple:
        given = example.arguments | dict(zip(names, floating, strict=True))
        outputs = testing.as_tuple(example.function(**given, backend="triton"))
        return tuple(o for o in outputs if o.is_floating_point())

    return call, tuple(t.detach().requires_grad_() for t in example.floating.values())


def captures() -> dict[str, Check]:
    """Repeatability at length: what needs a device."""

    def qkv():
        return testing.attention_inputs(1, 4, 2, 256, 256, 64, dtype=torch.bfloat16, device="cuda")

    def made(*shape, seed):
        return testing.random_tensor(
            *shape, seed=seed, dtype=torch.bfloat16, device="cuda", requires_grad=True
        )

    mask = fa.Mask(causal=True)
    groups = 1 << torch.randint(8, (1, 256), generator=torch.Generator().manual_seed(0)).cuda()
    calls = {
        "attention": (lambda *a: fa.attention(*a, mask=mask, backend="triton"), qkv),
        "softplus attention": (lambda *a: fa.softplus_attention(*a, power=15.0, mask=mask, backend="triton"), qkv),
        "grouped attention": (lambda *a: fa.grouped_attention(*a, groups, window=16, backend="triton"), qkv),
        "gated attention": (
            lambda *a: fa.gated_attention(*a, window=16, backend="triton"),
            lambda: (*qkv(), made(1, 256, 8, seed=4)),
        ),
        "sinkhorn": (lambda x: fa.sinkhorn(x, causal=True, backend="triton"), lambda: (made(2, 500, 8, seed=1),)),
        "fused product": (
            lambda x, w: fa.fused_linear(x, w, norm_eps=1e-6, swiglu=True, backend="triton"),
            lambda: (made(300, 128, seed=1), made(512, 128, seed=2)),
        ),
    }  # fmt: skip
    checks: dict[str, Check] = {}
    for name, (fn, inputs) in calls.items():
        checks[f"100 runs: {name}"] = lambda fn=fn, inputs=inputs: assert_repeats(fn, inputs(), 99)
    return checks


def cuda_checks() -> dict[str, Check]:
    from fastattn.runtime import cuda as _cuda

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

    if _cuda.missing() is not None:
        return {}
    return {
        "CUDA C++ sinkhorn": sinkhorn,
        "CUDA C++ decode step": decode,
        "CUDA C++ rows of a loss": rows,
    }


def all_checks(device: str, small: bool) -> dict[str, Check]:
    """By name. `small`: float32 at small shapes, what compute-sanitizer goes over."""
    dtypes = (torch.float32,) if small else testing.LOW_DTYPES
    checks = attention_checks(device, 40, 16, dtypes) | other_checks(device) | example_checks(device, dtypes)
    if device.startswith("cuda"):
        checks |= cuda_checks()
        if not small:
            checks |= (
                attention_checks(device, 1000, 128, (torch.bfloat16,)) | captures() | captured_examples()
            )
    return checks
