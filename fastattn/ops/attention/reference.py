"""The definition of tiled attention, in plain torch (specification: scores, masks, rows with nothing to attend)."""

import torch

from ... import masks
from ...runtime.arithmetic import rounded_once
from .scores import BY_CODE

# below it e^s is log(1 + e^s) to a factor of 1 - e^-38 / 2, closer than float64's roundings; not much above it, as float32's
# subnormals take digits from weights that are small beside a row's others
LIMIT_SCORE = -38.0


@rounded_once
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    score: int,
    scale: float,
    bias_value: float | None,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), or (0,) for a score without a normaliser, state).

    Its backward computes the weights anew: state is that of the schema, with maxima of scores.
    """
    row = BY_CODE[score]
    lq, lk = q.shape[2], k.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    s = scale * (q @ k.transpose(-1, -2))  # (B, H, Lq, Lk)
    if bias is not None:
        s = s + bias
    if bias_value is not None:
        s = s + bias_value
    elif row.log_n_bias and bias is None:
        n = masks.sequence_keys(lq, lk, q.device, mask)
        s = s - n.to(s.dtype if s.dtype == torch.float64 else torch.float32).log().to(s.dtype)
    allowed = masks.dense_allowed(lq, lk, q.device, mask)
    if not row.normalised:
        nothing = q.new_empty(0, dtype=_statistics(q.dtype))
        return row.weight(s).masked_fill(~allowed, 0.0) @ v, nothing, nothing.clone()
    wide = (s if s.dtype == torch.float64 else s.float()).masked_fill(~allowed, -torch.inf)
    top = wide.detach().amax(-1, keepdim=True) if lk else wide.new_zeros(*wide.shape[:-1], 1)
    if not row.shifted:
        # of weights that may all underflow, the exponentials they tend to
        top = top.masked_fill(top >= LIMIT_SCORE, -torch.inf)
    shifted = top != -torch.inf  # a NaN is, and stays one
    weight = torch.exp((wide - top).masked_fill(~shifted, -torch.inf))
    if not row.shifted:
        plain = row.weight(s).masked_fill(~allowed, 0.0).to(wide.dtype)
        weight = torch.where(shifted, weight, plain)
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (total.log() + top.masked_fill(~shifted, 0.0)).masked_fill(nothing, -torch.inf).squeeze(-1)
    out = (weight / total).to(v.dtype) @ v
    return out, lse.to(_statistics(q.dtype)), row_state(top, total, nothing).to(_statistics(q.dtype))


def row_state(top: torch.Tensor, total: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
    """(..., 2): row maxima and logarithms of sums relative to them, (0, inf) for a row with nothing to attend to."""
    log_sum = total.detach().log().masked_fill(nothing, torch.inf)
    return torch.cat([top.masked_fill(nothing, 0.0), log_sum], -1)


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, Hkv, L, D) -> (B, heads, L, D), each key head serving heads / Hkv query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
