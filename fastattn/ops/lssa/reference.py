"""The definition of LSSA and LSSAR in plain torch. The first normaliser of LSSAR, which cancels, is left out."""

import math

import torch

from ... import masks
from ...runtime.arithmetic import rounded_once, wide
from ..attention.reference import expand_heads

EQUAL = 8.0  # scores of a row that lie within EQUAL * eps * (1 + c) are all equal
SHORTEST = 1e-12
FEW = 3  # rows with at most this many keys have no offset


@rounded_once
def softplus_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, power: float | None, mask: masks.MaskArgs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), statistics (B, Hq, Lq, 3): highest score, 1 / (highest - threshold) or 0, sum of
    weights).

    Without a threshold (LSSA) the first two statistics are 0 and 1. With one (LSSAR) lse is (0,).
    """
    lq, lk = q.shape[2], k.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    allowed = masks.dense_allowed(lq, lk, q.device, mask)
    dots = wide(_unit(q) @ _unit(k).transpose(-1, -2))  # (B, H, Lq, Lk)
    n = allowed.sum(-1, keepdim=True).to(dots.dtype)  # (B or 1, H or 1, Lq, 1)
    c = math.log(q.shape[-1]) * n.clamp(min=1).log()
    s = torch.nn.functional.softplus(c * dots)
    s = s.masked_fill(~allowed, 0.0)
    if power is None or lk == 0:
        highest = s.new_zeros(*s.shape[:-1], 1)
        height = torch.ones_like(highest)
        weight = s
    else:
        mean = s.sum(-1, keepdim=True) / n.clamp(min=1)
        threshold = torch.where(n > FEW, mean, 0.0)
        highest = s.detach().amax(-1, keepdim=True)
        lowest = s.detach().masked_fill(~allowed, torch.inf).amin(-1, keepdim=True)
        height = highest - threshold.detach()  # cancels against the sum of weights, so it needs no gradient
        equal = (n > FEW) & (highest - lowest <= EQUAL * torch.finfo(s.dtype).eps * (1 + c))
        height = height.masked_fill(equal | (n == 0), 0.0)
        above = torch.relu(s - threshold) / height.masked_fill(height == 0, 1.0)
        weight = above.masked_fill(~allowed | (height == 0), 0.0) ** power
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    out = (weight / total.masked_fill(nothing, 1.0)).to(v.dtype) @ v
    reciprocal = (1 / height).masked_fill(height == 0, 0.0)
    lse = total.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf).squeeze(-1)
    return (
        out,
        lse if power is None else lse.new_empty(0),
        torch.cat([highest, reciprocal, total], dim=-1).detach(),
    )


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x|; a vector shorter than SHORTEST becomes 0 and gets no gradient."""
    norm = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)
    return torch.where(norm <= SHORTEST, 0.0, wide(x) / norm.clamp(min=SHORTEST)).to(x.dtype)  # NaN stays
