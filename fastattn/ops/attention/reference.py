"""The definition of tiled attention, in plain torch (specification: scores, masks, rows with nothing to attend)."""

import torch

from ... import masks
from ..._arithmetic import rounded_once
from ...scores import BY_CODE


@rounded_once
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    score: int,
    scale: float,
    bias_value: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    prefix_lengths: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_lengths: torch.Tensor | None,
    dense: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), or (0,) for a score without a normaliser)."""
    row = BY_CODE[score]
    lq, lk = q.shape[2], k.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    s = scale * (q @ k.transpose(-1, -2))  # (B, H, Lq, Lk)
    if bias is not None:
        s = s + bias
    if bias_value is not None:
        s = s + bias_value
    elif row.log_n_bias and bias is None:
        n = masks.sequence_keys(lq, lk, q.device, cu_seqlens_q, cu_seqlens_k, key_lengths)
        s = s - n.to(s.dtype if s.dtype == torch.float64 else torch.float32).log().to(s.dtype)
    allowed = masks.dense_allowed(
        lq,
        lk,
        q.device,
        causal,
        window_left,
        window_right,
        prefix_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        key_lengths,
        dense,
    )
    if row.name == "softmax":
        s = s.masked_fill(~allowed, -torch.inf)
        wide = s if s.dtype == torch.float64 else s.float()
        top = wide.detach().amax(-1, keepdim=True) if lk else wide.new_zeros(*wide.shape[:-1], 1)
        weight = torch.exp(wide - top.masked_fill(top == -torch.inf, 0.0))
        lse_shift = top
    else:
        weight = row.weight(s).masked_fill(~allowed, 0.0)
        if not row.normalised:
            return weight @ v, q.new_empty(0, dtype=_statistics(q.dtype))
        weight = weight if weight.dtype == torch.float64 else weight.float()
        lse_shift = 0.0
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (total.log() + lse_shift).masked_fill(nothing, -torch.inf).squeeze(-1)
    return (weight / total).to(v.dtype) @ v, lse.to(_statistics(q.dtype))


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, Hkv, L, D) -> (B, heads, L, D), each key head serving heads / Hkv query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
