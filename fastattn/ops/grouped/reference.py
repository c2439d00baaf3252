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
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), state (B, Hq, Lq, 2)): softmax attention over the dense mask of the rule."""
    share = (groups[:, :, None] & key_groups[:, None, :]) != 0
    near = distance(q, k, mask).abs() <= window
    rule = (share | near)[:, None]  # (B, 1, Lq, Lk)
    dense = rule if mask.dense is None else rule & mask.dense
    options = (None, None, 0, scale, 0.0, None, 0, None)  # softmax, without any
    out, lse, state, _ = attention(q, k, v, *options, mask._replace(dense=dense))
    return out, lse, state


def distance(q: torch.Tensor, k: torch.Tensor, mask: masks.MaskArgs) -> torch.Tensor:
    """How far key j lies before query i (negative: after it), both counted in their document, the last query on the last key: (B or 1, Lq, Lk)."""
    lq, lk = q.shape[2], k.shape[2]
    _, i = masks.positions(mask.cu_seqlens_q, lq, q.device)
    _, j = masks.positions(mask.cu_seqlens_k, lk, q.device)
    i = i + masks.diagonal_offset(lq, lk, q.device, mask)
    return i[:, :, None] - j[None, None, :]
