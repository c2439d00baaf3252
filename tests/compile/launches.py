"""Launches of every op's Triton kernels, recorded on the meta device for a target."""

from dataclasses import replace

import torch

from fastattn import testing
from fastattn.masks import MaskArgs
from fastattn.ops.attention.scores import SCORES, has_residual
from fastattn.runtime import registry
from fastattn.runtime import triton as _triton
from fastattn.runtime.examples import examples

# What fast tests compile for; the slow ones take every target.
SAMPLED = ("sm_80", "sm_90", "sm_100", "gfx942")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(n: int) -> torch.Tensor:
    return empty(n, dtype=torch.int32)


def attention_arguments(
    score: str = "softmax",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    v_dim: int | None = None,
    *,
    heads: int = 16,
    kv_heads: int = 4,
    q_length: int = 4096,
    k_length: int = 4096,
    mask: str = "packed",
    window: int = 512,
    bias: bool | tuple[int, ...] = False,
    sink: bool = False,
    softcap: float | None = None,
    dropped: int = 0,
) -> tuple:
    """The forward op's arguments less the backend. bias: its shape, True for that of the scores. window: of the mask "window", keys before the query's own."""
    packed, dense = mask == "packed", mask == "dense"
    v_dim = head_dim if v_dim is None else v_dim
    return (
        empty(1, heads, q_length, head_dim, dtype=dtype),
        empty(1, kv_heads, k_length, head_dim, dtype=dtype),
        empty(1, kv_heads, k_length, v_dim, dtype=dtype),
        empty(*(bias if isinstance(bias, tuple) else (1, heads, q_length, k_length)), dtype=dtype)
        if bias
        else None,
        empty(heads, dtype=dtype) if sink else None,
        SCORES[score].code,
        0.1,
        None if SCORES[score].log_n_bias else 0.0,
        softcap,
        dropped,
        empty(2, dtype=torch.int64) if dropped else None,
        MaskArgs(
            packed or mask == "causal",
            window if mask == "window" else -1,
            0 if mask == "window" else -1,
            indices(5) if packed else None,
            indices(6) if packed else None,
            indices(6) if packed else None,
            q_length,
            k_length,
            None,
            empty(1, 1, q_length, k_length, dtype=torch.bool) if dense else None,
        ),
    )


def attention(target: str, **options) -> list[_triton.Launch]:
    from fastattn.ops.attention.triton import attention

    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        attention(*attention_arguments(**options))
    return launches


def attention_backward(target: str, **options) -> list[_triton.Launch]:
    from fastattn.ops.attention.triton_backward import attention_backward

    q, k, v, bias, sink, score, *rest = attention_arguments(**options)
    out = empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    normalised = next(row for row in SCORES.values() if row.code == score).normalised
    lse = empty(*(q.shape[:3] if normalised else (0,)), dtype=torch.float32)
    state = empty(*((*q.shape[:3], 2) if normalised else (0,)), dtype=torch.float32)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        wanted = (bias is not None) + 2 * (sink is not None)
        residual = out if has_residual(q.dtype, score) else empty(0, dtype=q.dtype)
        attention_backward(out, None, q, k, v, bias, sink, out, lse, state, residual, score, *rest, wanted)
    return launches


def _on_cpu(op: registry.Op, backend: registry.Backend) -> registry.Backend:
    return replace(backend, devices=("cpu",)) if backend.name == "triton" else backend


def of_examples(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    """What the typical calls of every op launch, forward and back, each result left as memory was."""
    with registry.replaced(_on_cpu), _triton.recorded(_triton.TARGETS[target][1]) as launches:
        for example in examples(dtype, large=True).values():
            if example.refusal("triton") is None:
                call, inputs = testing.example_call(example, "triton")
                testing.differentiate(call, inputs)
    return launches


def rowwise(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    from fastattn.ops.rowwise import triton as kernels

    x = empty(2, 100, 1536, dtype=dtype)
    weight = empty(1536, dtype=dtype)
    q, k = empty(2, 12, 100, 128, dtype=dtype), empty(2, 4, 100, 128, dtype=dtype)
    gates = empty(2, 100, 8192, dtype=dtype)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        _, total, rstd = kernels.rms_norm(x, x, weight, 1e-6, 0.0)
        kernels.rms_norm(x, None, None, 1e-6, 0.0)
        wide = empty(x.shape[-1], dtype=torch.float32)
        _, sums, rstd = kernels.rms_norm(x, x.float(), wide, 1e-6, 1.0)
        kernels.rms_norm_backward(x, sums, sums, wide, rstd, 1e-6, 1.0)
        kernels.rms_norm_backward(x, x, total, weight, rstd, 1e-6, 0.0)
        kernels.rms_norm_backward(x, None, total, None, rstd, 1e-6, 0.0)
        kernels.swiglu_backward(kernels.swiglu(gates), gates)
        kernels.gated_backward(kernels.gated(x, x), x, x)
        kernels.rotary(q, k, empty(100, dtype=torch.int64), 1e4, False, False)
        kernels.rotary(q, k, empty(100, dtype=torch.int64), 1e4, True, True)
        tables = empty(2, 100, q.shape[3], dtype=dtype)
        kernels.rotary_tables(q, k, tables, tables, True, True)
        kernels.rotary_tables(q, k, *[empty(1, 100, q.shape[3] // 2, dtype=torch.float32)] * 2, False, False)
        cache = empty(2, 4, 4096, 128, dtype=dtype)
        slots = empty(2, 100, dtype=torch.int64)
        kernels.rotary_append(q, k, k, slots, slots, cache, cache, 1e4)
    return launches


def cross_entropy(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    from fastattn.ops.cross_entropy import triton as kernels

    h, weight, bias = empty(100, 64, dtype=dtype), empty(32000, 64, dtype=dtype), empty(32000, dtype=dtype)
    labels, rows = empty(100, dtype=torch.int64), empty(100, dtype=torch.float32)
    logits = empty(100, 32000, dtype=dtype)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        kernels.linear_cross_entropy(
            h, weight, bias, labels, None, None, 0, 30.0, 0.1, 0.0, -100, "mean", False, 7
        )
        kernels.linear_cross_entropy(
            h, weight, None, labels, rows, None, 1, 0.0, 0.0, 0.0, -100, "none", False, 0
        )
        weighed = (h, weight, bias, labels, rows, bias)
        kernels.linear_cross_entropy(*weighed, 0, 0.0, 0.1, 0.1, -100, "mean", True, 15)
        kernels.linear_cross_entropy_backward(
            empty(), rows, *weighed, empty(2, 100, dtype=torch.float32), 0, 0.0, 0.1, 0.1, -100, "mean", 15
        )
        kernels.stablemax_cross_entropy_backward(
            rows, logits, empty(2, 100, dtype=torch.float32), labels, -100
        )
    return launches


def codes(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    from fastattn.ops.codes import triton as kernels

    h, shadow, bias = empty(100, 64, dtype=dtype), empty(32000, 64, dtype=dtype), empty(32000, dtype=dtype)
    labels, codebook = empty(100, dtype=torch.int64), empty(1024, 64, dtype=dtype)
    codes = empty(32000, dtype=torch.int64)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        kernels.vq_cross_entropy(h, codebook, codes, bias, shadow, labels, -100, "mean", 15)
        kernels.vq_logits_backward(kernels.vq_logits(h, codebook, codes, None), h, codebook, codes, None, 3)
        kernels.vq_argmax(h, codebook, codes, bias)
        kernels.nearest_codes(h, codebook)
        for biases in (None, bias):
            kernels.vq_sample(h, codebook, codes, biases, empty(100, 2, dtype=torch.float64), 0.7)
    return launches


def fused_linear(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    """The tile kernel at the largest tiles that the target has room for, with each thing before and after it."""
    from fastattn.ops.fused_linear.triton import fused_linear
    from fastattn.runtime import tuning as _config

    device = _triton.TARGETS[target][1]
    weight, residual = empty(8192, 1536, dtype=dtype), empty(1000, 4096, dtype=dtype)
    declaration = _config.tunings()["fused_linear", "triton"]
    launches = []
    for before, swiglu in (("norm", True), ("gate", False), (None, False)):
        x = empty(1000, *((12, 128) if before == "gate" else (1536,)), dtype=dtype)
        key = {"dtype": str(dtype).removeprefix("torch."), "swiglu": swiglu, "gated": before == "gate"}
        key |= {"rows": 1000, "inputs": 1536, "outputs": 8192}
        for m, n, k, warps, stages in (
            (128, 128, 64, 8, 3),
            (128, 64, 64, 8, 2),
            (64, 64, 32, 4, 2),
            (32, 32, 32, 4, 2),
        ):
            values = {"product": "native", "block_m": m, "block_n": n, "block_k": k, "num_warps": warps}
            values["num_stages"] = stages
            if declaration.refuses(values, key, device) is None:
                break
        with _config.override({("fused_linear", "triton"): values}), _triton.recorded(device) as recorded:
            fused_linear(
                x, weight, x if before == "gate" else None, residual if swiglu else None,
                1e-6 if before == "norm" else None, swiglu, swiglu,
            )  # fmt: skip
        launches += recorded
    return launches


def sinkhorn(target: str, dtype: torch.dtype = torch.bfloat16, groups: int = 8) -> list[_triton.Launch]:
    """Every launch that differs: the first, a middle and the last iteration, forward and back."""
    from fastattn.ops.sinkhorn import triton as kernels

    scores, cuts, prefixes = empty(1, 5000, groups, dtype=dtype), indices(4), indices(3)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        for causal, prefix in ((False, None), (True, None), (True, prefixes)):
            kernels.sinkhorn(scores, None, cuts, prefix, 0.1, 2, causal)
            kernels.sinkhorn_backward(scores, scores, None, cuts, prefix, 0.1, 2, causal)
    return launches


def lssa(
    target: str, dtype: torch.dtype = torch.bfloat16, power: float | None = 15.0
) -> list[_triton.Launch]:
    from fastattn.ops.lssa.triton import softplus_attention
    from fastattn.ops.lssa.triton_backward import softplus_attention_backward

    q, k, v, *_, mask = attention_arguments(dtype=dtype, head_dim=64)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, lse, statistics = softplus_attention(q, k, v, power, mask)
        grad_lse = lse if power is None else None
        softplus_attention_backward(out, grad_lse, q, k, v, out, statistics, power, mask)
    return launches


def grouped(target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> list[_triton.Launch]:
    from fastattn.ops.grouped import triton, triton_backward

    q, k, v, _, _, _, scale, *_, mask = attention_arguments(dtype=dtype, head_dim=head_dim)
    signatures = empty(1, q.shape[2], dtype=torch.int64)
    options = (signatures, signatures, 128, scale, mask)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, lse, state = triton.grouped_attention(q, k, v, *options)
        triton_backward.grouped_attention_backward(out, lse, q, k, v, out, state, *options)
    return launches


def gated(
    target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, gate: int = 0
) -> list[_triton.Launch]:
    from fastattn.ops.gated import triton as kernels

    q, k, v, _, _, _, scale, *_, mask = attention_arguments(dtype=dtype, head_dim=head_dim)
    assignment, sharpness = empty(1, q.shape[2], 8, dtype=torch.float32), empty(dtype=torch.float32)
    options = (128, gate, scale, mask)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, lse, state = kernels.gated_attention(q, k, v, assignment, sharpness, *options)
        kernels.gated_attention_backward(out, lse, q, k, v, assignment, sharpness, out, state, *options)
    return launches


def capped(cap: float):
    """A score function, and tables of a size that lengths decide, as `tests/flex_mods.py` has them."""
    return (
        lambda length: (torch.zeros(4, 2 * length - 1),),
        lambda table: lambda s, b, h, q, k: cap * torch.tanh(s / cap) + table[h, q - k + table.shape[1] // 2],
    )


def flex(
    target: str, score: str | tuple, mask: str | None, dtype: torch.dtype = torch.bfloat16, length: int = 128
) -> list[_triton.Launch]:
    """The kernels of a function of `tests/flex_mods.py`, forward and back."""
    from flex_mods import BATCH, HEADS, MASKS, SCORES

    from fastattn.ops.flex import flex_attention

    make, score_mod = SCORES[score] if isinstance(score, str) else score
    captured = [t.float() if t.is_floating_point() else t for t in make(length)]
    captured = [t.requires_grad_(t.is_floating_point()) for t in captured]
    mask_mod = None if mask is None else MASKS[mask](length)
    q, k, v = (
        torch.zeros(BATCH, heads, length, 64, dtype=dtype, requires_grad=True) for heads in (HEADS, 2, 2)
    )
    with registry.replaced(_on_cpu), _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out = flex_attention(q, k, v, score_mod(*captured), mask_mod, enable_gqa=True, backend="triton")
        out.float().sum().backward()
    return launches
