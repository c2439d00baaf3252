"""The definition of grouped attention, in plain torch over a dense mask."""

import torch

from ... import masks
from ..attention.reference import attention


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    key_groups: torch.Tensor,
    window: int,
    scale: float,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), state (B, Hq, Lq, 2)): softmax attention with the rule as a dense mask."""
    share = (groups[:, :, None] & key_groups[:, None, :]) != 0
    near = distance(q, k, mask).abs() <= window
    rule = (share | near)[:, None]  # (B, 1, Lq, Lk)
    dense = rule if mask.dense is None else rule & mask.dense
    options = (None, None, 0, scale, 0.0, None, 0, None)  # softmax without options
    out, lse, state, _ = attention(q, k, v, *options, mask._replace(dense=dense))
    return out, lse, state


def distance(q: torch.Tensor, k: torch.Tensor, mask: masks.MaskArgs) -> torch.Tensor:
    """(B or 1, Lq, Lk): how far key j lies before query i (negative: after it). Positions count from the document's start, and the last
    query is aligned with the last key."""
    lq, lk = q.shape[2], k.shape[2]
    _, i = masks.positions(mask.cu_seqlens_q, lq, q.device)
    _, j = masks.positions(mask.cu_seqlens_k, lk, q.device)
    i = i + masks.diagonal_offset(lq, lk, q.device, mask)
    return i[:, :, None] - j[None, None, :]
