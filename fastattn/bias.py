"""Biases of attention that depend on the distance between query and key alone: a table instead of (Lq, Lk) numbers.

`fastattn.attention(..., bias=fastattn.DistanceBias(table, centre))`. What makes a table is plain torch, with gradients: `t5`, `alibi`, or
a function of your own of `distances(length_q, length_k)`.
"""

import math

import torch

from .runtime import checks

__all__ = ["DistanceBias", "alibi", "alibi_slopes", "distances", "t5"]


class DistanceBias:
    """A bias that depends on the distance d = j - i from query to key: table[h, clamp(d + centre, 0, n - 1)].

    As with a causal mask the last query stands at the last key, so that i counts from Lk - Lq (in its document when packed; at the
    last key that is no padding with `fastattn.Mask(align="key_lengths")`). Distances beyond the table's ends have the value at the end.

    table: (Hq or 1, n) of q's dtype or float32, n at least 1; it may have a gradient, summed in float32. Nothing of (Lq, Lk) is
        formed on the CPU.
    centre: the place of distance 0 in the table.

    Raises TypeError or ValueError. Example: `DistanceBias(torch.nn.Parameter(torch.zeros(8, 129)), 64)` learns a bias for each head and
    each distance up to 64, as the relative positions of "Self-Attention with Relative Position Representations" (arXiv 1803.02155)
    are clamped.
    """

    def __init__(self, table: torch.Tensor, centre: int):
        self.table = checks.check_tensor("DistanceBias", "table", table, dims=2)
        checks.check_floating("DistanceBias", table=table)
        if table.shape[1] < 1:
            raise ValueError(
                f"fastattn.DistanceBias: table must have a distance at least, given {checks.describe(table)}"
            )
        number = checks.as_integer(centre)
        if number is None:
            raise TypeError(
                f"fastattn.DistanceBias: centre must be an integer, given {checks.describe(centre)}"
            )
        self.centre = number

    def __repr__(self) -> str:
        return f"DistanceBias({tuple(self.table.shape)}, centre={self.centre})"

    def values(self, length_q: int, length_k: int) -> torch.Tensor:
        """The bias of `distances(length_q, length_k)`: (Hq or 1, Lq + Lk - 1), float32 (float64 of a float64 table)."""
        place = distances(length_q, length_k, device=self.table.device) + self.centre
        return self.table.to(checks.statistics_dtype(self.table))[:, place.clamp(0, self.table.shape[1] - 1)]


def distances(length_q: int, length_k: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """Every distance d from a query to a key, -(Lk - 1) to Lq - 1: int64 (Lq + Lk - 1,). Distance 0 is at Lk - 1."""
    return torch.arange(max(length_q + length_k - 1, 0), device=device) - (length_k - 1)


def t5(
    weight: torch.Tensor,
    length_q: int,
    length_k: int,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> DistanceBias:
    """T5's relative position bias ("Exploring the Limits of Transfer Learning", arXiv 1910.10683, section 2.1).

    Half of the buckets have a distance each, the others widen logarithmically up to max_distance; what is farther shares the last one.

    weight: (buckets, Hq), as `relative_attention_bias.weight` of transformers' T5. Its gradient is exact.
    bidirectional: half of the buckets for keys after the query, as in the encoder; else all for keys up to it, as in the decoder.

    Returns a DistanceBias for queries and keys of these lengths. T5 has no scale: call attention with scale=1.0.
    """
    checks.check_tensor("bias.t5", "weight", weight, dims=2)
    buckets = weight.shape[0]
    d = distances(length_q, length_k, device=weight.device)
    if bidirectional:
        buckets //= 2
        first, d = (d > 0).long() * buckets, d.abs()
    else:
        first, d = torch.zeros_like(d), (-d).clamp(min=0)
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"fastattn.bias.t5: {weight.shape[0]} buckets and max_distance={max_distance} leave nothing to widen; "
            f"more of both are needed"
        )
    far = torch.log(d.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = first + torch.where(d < exact, d, (exact + far.long()).clamp(max=buckets - 1))
    return DistanceBias(weight[bucket].t(), length_k - 1)


def alibi(slopes: torch.Tensor, length_q: int, length_k: int) -> DistanceBias:
    """ALiBi, -slope * |d| ("Train Short, Test Long", arXiv 2108.12409).

    slopes: (Hq,), with a gradient; `alibi_slopes(heads)` gives the paper's.
    """
    checks.check_tensor("bias.alibi", "slopes", slopes, dims=1)
    far = distances(length_q, length_k, device=slopes.device).abs()
    return DistanceBias(-slopes[:, None] * far, length_k - 1)


def alibi_slopes(heads: int) -> torch.Tensor:
    """The paper's slopes (heads,) float32: 2^(-8 k / n) for k = 1 to n, n the power of two up to `heads`, then every second one of
    the slopes for 2 n heads."""
    n = 1 << (heads.bit_length() - 1) if heads > 0 else 1
    of_n = [2.0 ** (-8 * k / n) for k in range(1, n + 1)]
    between = [2.0 ** (-4 * k / n) for k in range(1, 2 * n + 1, 2)]
    return torch.tensor((of_n + between)[:heads])
