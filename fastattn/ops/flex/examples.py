"""Typical calls of flex_attention."""

import torch

from ...masks import Mask
from ...runtime.examples import Example, Make
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


def examples(make: Make) -> dict[str, Example]:
    L = make.length(21)
    heads = {
        "query": make.normal(1, 4, L, 12),
        "key": make.normal(1, 2, L, 12),
        "value": make.normal(1, 2, L, 10),
    }
    options = {"score_mod": soft_cap, "block_mask": Mask(causal=True), "enable_gqa": True}
    return {
        "flex_attention": Example(flex_attention, heads, options),
        "flex_attention, learned table": Example(by_distance, heads | {"table": make.normal(4, 17)}),
    }
