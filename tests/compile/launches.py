"""Launches of every op's Triton kernels, recorded on the meta device for a target."""

import torch

from fastattn import _triton
from fastattn.scores import SCORES

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
    bias: bool = False,
) -> tuple:
    """The forward op's arguments less the backend."""
    packed, dense = mask == "packed", mask == "dense"
    v_dim = head_dim if v_dim is None else v_dim
    return (
        empty(1, heads, q_length, head_dim, dtype=dtype),
        empty(1, kv_heads, k_length, head_dim, dtype=dtype),
        empty(1, kv_heads, k_length, v_dim, dtype=dtype),
        empty(1, heads, q_length, k_length, dtype=dtype) if bias else None,
        SCORES[score].code,
        0.1,
        None if SCORES[score].log_n_bias else 0.0,
        packed or mask == "causal",
        512 if mask == "window" else -1,
        0 if mask == "window" else -1,
        indices(5) if packed else None,
        indices(6) if packed else None,
        indices(6) if packed else None,
        q_length,
        k_length,
        None,
        empty(1, 1, q_length, k_length, dtype=torch.bool) if dense else None,
    )


def attention(target: str, **options) -> list[_triton.Launch]:
    from fastattn.ops.attention.triton import attention

    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        attention(*attention_arguments(**options))
    return launches


def attention_backward(target: str, **options) -> list[_triton.Launch]:
    from fastattn.ops.attention.triton_backward import attention_backward

    q, k, v, bias, score, *rest = attention_arguments(**options)
    out = empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    normalised = next(row for row in SCORES.values() if row.code == score).normalised
    lse = empty(*(q.shape[:3] if normalised else (0,)), dtype=torch.float32)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        attention_backward(out, None, q, k, v, bias, out, lse, bias is not None, score, *rest)
    return launches


def recurrence(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    from fastattn.ops.recurrence import triton as kernels

    x = empty(2, 100, 1536, dtype=dtype)
    weight = empty(1536, dtype=dtype)
    q, k = empty(2, 12, 100, 128, dtype=dtype), empty(2, 4, 100, 128, dtype=dtype)
    gates = empty(2, 100, 8192, dtype=dtype)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        _, total, rstd = kernels.rms_norm(x, x, weight, 1e-6)
        kernels.rms_norm(x, None, None, 1e-6)
        kernels.rms_norm_backward(x, x, total, weight, rstd, 1e-6)
        kernels.rms_norm_backward(x, None, total, None, rstd, 1e-6)
        kernels.swiglu_backward(kernels.swiglu(gates), gates)
        kernels.gated_backward(kernels.gated(x, x), x, x)
        kernels.rotary(q, k, empty(100, dtype=torch.int64), 1e4, False)
    return launches


def vocab(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    from fastattn.ops.vocab import triton as kernels
    from fastattn.ops.vocab import triton_codes

    h, weight, bias = empty(100, 64, dtype=dtype), empty(32000, 64, dtype=dtype), empty(32000, dtype=dtype)
    labels, lse = empty(100, dtype=torch.int64), empty(100, dtype=torch.float32)
    logits = empty(100, 32000, dtype=dtype)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        kernels.linear_cross_entropy(h, weight, bias, labels, None, 0, 30.0, 0.1, -100, "mean", 7)
        kernels.linear_cross_entropy(h, weight, None, labels, lse, 1, 0.0, 0.0, -100, "none", 0)
        kernels.stablemax_cross_entropy_backward(lse, logits, labels, lse, -100)
        codebook, codes = empty(1024, 64, dtype=dtype), empty(32000, dtype=torch.int64)
        triton_codes.vq_cross_entropy(h, codebook, codes, bias, weight, labels, -100, "mean", 15)
        triton_codes.vq_logits_backward(
            triton_codes.vq_logits(h, codebook, codes, None), h, codebook, codes, None, 3
        )
        triton_codes.vq_argmax(h, codebook, codes, bias)
        triton_codes.nearest_codes(h, codebook)
    return launches


def reweighted(
    target: str, dtype: torch.dtype = torch.bfloat16, power: float | None = 15.0
) -> list[_triton.Launch]:
    from fastattn.ops.reweighted.triton import softplus_attention
    from fastattn.ops.reweighted.triton_backward import softplus_attention_backward

    q, k, v, _, _, _, _, *mask = attention_arguments(dtype=dtype, head_dim=64)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, statistics = softplus_attention(q, k, v, power, *mask)
        softplus_attention_backward(out, q, k, v, out, statistics, power, *mask)
    return launches


def grouped(target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> list[_triton.Launch]:
    from fastattn.ops.grouped import triton, triton_backward

    q, k, v, _, _, scale, _, *mask = attention_arguments(dtype=dtype, head_dim=head_dim)
    signatures = empty(1, q.shape[2], dtype=torch.int64)
    options = (signatures, signatures, 128, scale, *mask)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, lse = triton.grouped_attention(q, k, v, *options)
        triton_backward.grouped_attention_backward(out, q, k, v, out, lse, *options)
    return launches


def gated(
    target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, gate: int = 0
) -> list[_triton.Launch]:
    from fastattn.ops.grouped import triton_gated as kernels

    q, k, v, _, _, scale, _, *mask = attention_arguments(dtype=dtype, head_dim=head_dim)
    assignment, sharpness = empty(1, q.shape[2], 8, dtype=torch.float32), empty(dtype=torch.float32)
    options = (128, gate, scale, *mask)
    with _triton.recorded(_triton.TARGETS[target][1]) as launches:
        out, lse = kernels.gated_attention(q, k, v, assignment, sharpness, *options)
        kernels.gated_attention_backward(out, q, k, v, assignment, sharpness, out, lse, *options)
    return launches
