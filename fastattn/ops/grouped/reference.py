"""The definitions of sinkhorn, grouped and gated attention, in plain torch over dense masks."""

import itertools

import torch

from ... import masks
from ...runtime.arithmetic import rounded_once
from ..attention.reference import attention, expand_heads, row_state


def sinkhorn(
    scores: torch.Tensor,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    temperature: float,
    iterations: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(assignment (B, L, G), column potentials of the last valid token (B or documents, 1, G))."""
    batch, length, groups = scores.shape
    if cu_seqlens is not None:
        cuts = cu_seqlens.tolist()
        parts = [
            sinkhorn(
                scores[:, begin:end],
                None if lengths is None else lengths[i : i + 1],
                None,
                temperature,
                iterations,
                causal,
            )
            for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]
        after = torch.zeros_like(scores[:, cuts[-1] :])
        empty = _wide(scores.new_empty(0, 1, groups))
        return torch.cat([*(a for a, _ in parts), after], 1), torch.cat([empty, *(v for _, v in parts)])
    x = _wide(scores) / temperature
    if lengths is None:
        lengths = torch.full((batch,), length, device=scores.device)
    valid = (torch.arange(length, device=scores.device) < lengths[:, None])[..., None]  # (B, L, 1)
    u = torch.zeros_like(x[..., :1])
    v = x.new_zeros(batch, 1, groups)
    for _ in range(iterations if length else 0):
        # padding weighs e^-1e30 = 0 and, unlike -inf, has a gradient of 0 instead of NaN
        shares = torch.where(valid, x + u, -1e30)
        if causal:
            v = -torch.logcumsumexp(shares, dim=1)  # (B, L, G)
        else:
            v = -torch.logsumexp(shares, dim=1, keepdim=True)  # (B, 1, G)
        u = -torch.logsumexp(x + v, dim=-1, keepdim=True)
    assignment = torch.where(valid, (x + u + v).exp(), 0.0)
    if causal and length:
        last = (lengths.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, groups)
        v = v.gather(1, last)
    empty = (lengths == 0)[:, None, None]  # no column to balance
    return assignment.to(scores.dtype), v.detach().masked_fill(empty, 0.0)


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    key_groups: torch.Tensor,
    window: int,
    scale: float,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), state (B, Hq, Lq, 2)): softmax attention over the dense mask of the rule."""
    share = (groups[:, :, None] & key_groups[:, None, :]) != 0
    near = _distance(q, k, mask) <= window
    rule = (share | near)[:, None]  # (B, 1, Lq, Lk)
    dense = rule if mask.dense is None else rule & mask.dense
    out, _, state = attention(q, k, v, None, 0, scale, 0.0, mask._replace(dense=dense))
    return out, state


@rounded_once
def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    assignment: torch.Tensor,
    sharpness: torch.Tensor,
    window: int,
    gate: int,
    scale: float,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, Hq, L, Dv), state (B, Hq, L, 2)); gate 0 multiplies distant scores, 1 adds its logarithm."""
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    s = _wide(scale * (q @ k.transpose(-1, -2)))  # (B, H, L, L)
    a = _wide(assignment)
    agreement = (sharpness.to(a.dtype) * (a @ a.transpose(-1, -2))).to(s.dtype)  # (B, L, L)
    near = _distance(q, k, mask) <= window
    if gate == 0:
        s = s * torch.where(near, 1.0, torch.sigmoid(agreement))[:, None]
    else:
        s = s + torch.where(near, 0.0, torch.nn.functional.logsigmoid(agreement))[:, None]
    s = s.masked_fill(~masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask), -torch.inf)
    top = s.detach().amax(-1, keepdim=True) if k.shape[2] else s.new_zeros(*s.shape[:-1], 1)
    weight = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    return (weight / total).to(v.dtype) @ v, row_state(top, total, nothing)


def _distance(q: torch.Tensor, k: torch.Tensor, mask: masks.MaskArgs) -> torch.Tensor:
    """How far key j lies before query i, both counted in their document, the last query on the last key: (B or 1, Lq, Lk)."""
    lq, lk = q.shape[2], k.shape[2]
    _, i = masks.positions(mask.cu_seqlens_q, lq, q.device)
    _, j = masks.positions(mask.cu_seqlens_k, lk, q.device)
    i = i + masks.diagonal_offset(lq, lk, q.device, mask)
    return i[:, :, None] - j[None, None, :]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
