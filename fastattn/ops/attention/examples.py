"""Typical calls of these ops."""

import torch

from ...bias import DistanceBias
from ...masks import Mask
from ...runtime.examples import Example, Make
from ..sdpa import scaled_dot_product_attention
from . import attention, sigmoid_attention


def by_distance(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    *,
    mask: Mask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """attention with a bias by distance."""
    return attention(q, k, v, bias=DistanceBias(table, 6), mask=mask, backend=backend)


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    q, k, v = make.normal(1, 4, L, 12), make.normal(1, 2, L, 12), make.normal(1, 2, L, 10)
    heads = {"q": q, "k": k, "v": v}
    causal = {"mask": Mask(causal=True)}
    like_torch = {"query": q, "key": k, "value": v}
    return {
        "attention": Example(attention, heads, causal | {"return_lse": True}),
        "attention, bias": Example(attention, heads | {"bias": make.normal(1, 4, L, L)}),
        "attention, distances": Example(by_distance, heads | {"table": make.normal(4, 9)}, causal),
        "attention, decoding": Example(attention, heads | {"q": q[:, :, -1:].contiguous()}),
        "attention, sink, soft cap and dropout": Example(
            attention,
            heads | {"sink": make.normal(4), "rng": make.whole(1 << 32, 2)},
            causal | {"softcap": 3.0, "dropout_p": 0.25},
        ),
        "sigmoid_attention": Example(sigmoid_attention, heads, causal),
        "scaled_dot_product_attention": Example(
            scaled_dot_product_attention, like_torch, {"is_causal": True, "enable_gqa": True}
        ),
    }
