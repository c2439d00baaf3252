"""Typical calls of flex_attention, and of attention with a Score."""

from typing import Any

import torch

from ...masks import Mask
from ...runtime.examples import Example, Make
from ...score import Score
from ..attention import attention
from . import flex_attention


def soft_cap(score: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(score / 3.0)


def by_distance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """A learned number of each distance and head, of keys at most 8 away: a table with a gradient, and a mask function."""

    def score_mod(score: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        _, h, q_idx, kv_idx = places
        return score + table[h, (q_idx - kv_idx).clamp(-8, 8) + 8]

    def window(*places: torch.Tensor) -> torch.Tensor:
        *_, q_idx, kv_idx = places
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < 12) | (kv_idx < 2))

    return flex_attention(query, key, value, score_mod, window, enable_gqa=True, backend=backend)


def by_function(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    mask: Mask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weights that no softmax makes, with a learned number of each head."""

    def weight(x: torch.Tensor, row: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(x * slopes[places[1]]) + 0.1

    return attention(q, k, v, score=Score.from_function(weight, normalise="sum"), mask=mask, backend=backend)


def above_the_mean(x: torch.Tensor, row: Any, *places: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.softplus(x - row.mean) + row.max / 4) / row.count


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    heads = {
        "query": make.normal(1, 4, L, 12),
        "key": make.normal(1, 2, L, 12),
        "value": make.normal(1, 2, L, 10),
    }
    qkv = dict(zip("qkv", heads.values(), strict=True))
    of_rows = Score.from_function(above_the_mean, normalise=None, statistics=("mean", "max", "count"))
    causal = {"mask": Mask(causal=True)}
    options = {"score_mod": soft_cap, "block_mask": Mask(causal=True), "enable_gqa": True}
    return {
        "flex_attention": Example(flex_attention, heads, options),
        "attention, a function": Example(by_function, qkv | {"slopes": make.normal(4)}, causal),
        "attention, a function of row statistics": Example(attention, qkv, causal | {"score": of_rows}),
        "flex_attention, learned table": Example(by_distance, heads | {"table": make.normal(4, 17)}),
    }
