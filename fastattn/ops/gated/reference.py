"""The definition of gated attention, in plain torch over a dense mask."""

import torch

from ... import masks
from ...runtime.arithmetic import rounded_once, wide
from ..attention.reference import expand_heads, row_state
from ..grouped.reference import distance


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, L, Dv), lse (B, Hq, L), state (B, Hq, L, 2)); gate: 0 multiplies distant scores by the gate, 1 adds its logarithm."""
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    s = wide(scale * (q @ k.transpose(-1, -2)))  # (B, H, L, L)
    a = wide(assignment)
    agreement = (sharpness.to(a.dtype) * (a @ a.transpose(-1, -2))).to(s.dtype)  # (B, L, L)
    near = distance(q, k, mask).abs() <= window
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
    lse = (total.log() + top).masked_fill(nothing, -torch.inf).squeeze(-1)
    return (weight / total).to(v.dtype) @ v, lse, row_state(top, total, nothing)
