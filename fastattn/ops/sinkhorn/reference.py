"""The definition of sinkhorn, in plain torch."""

import itertools

import torch

from ...runtime.arithmetic import wide


def sinkhorn(
    scores: torch.Tensor,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
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
                None if prefix_lengths is None else prefix_lengths[i : i + 1],
                temperature,
                iterations,
                causal,
            )
            for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]
        padding = torch.zeros_like(scores[:, cuts[-1] :])
        empty = wide(scores.new_empty(0, 1, groups))
        return torch.cat([*(a for a, _ in parts), padding], 1), torch.cat([empty, *(v for _, v in parts)])
    x = wide(scores) / temperature
    if lengths is None:
        lengths = torch.full((batch,), length, device=scores.device)
    valid = (torch.arange(length, device=scores.device) < lengths[:, None])[..., None]  # (B, L, 1)
    u = torch.zeros_like(x[..., :1])
    v = x.new_zeros(batch, 1, groups)
    last_summed = None  # (B, L, G): the last token of a token's column sums; None: the token itself
    if prefix_lengths is not None:
        own = torch.arange(length, device=scores.device)
        last_summed = own.maximum(prefix_lengths.long()[:, None] - 1)[..., None].expand(-1, -1, groups)
    for _ in range(iterations if length else 0):
        # padding has the weight e^-1e30 = 0; with -inf its gradient would be NaN instead of 0
        shares = torch.where(valid, x + u, -1e30)
        if causal:
            v = -torch.logcumsumexp(shares, dim=1)  # (B, L, G)
            v = v if last_summed is None else v.gather(1, last_summed)
        else:
            v = -torch.logsumexp(shares, dim=1, keepdim=True)  # (B, 1, G)
        u = -torch.logsumexp(x + v, dim=-1, keepdim=True)
    assignment = torch.where(valid, (x + u + v).exp(), 0.0)
    if causal and length:
        last = (lengths.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, groups)
        v = v.gather(1, last)
    empty = (lengths == 0)[:, None, None]  # nothing to balance
    return assignment.to(scores.dtype), v.detach().masked_fill(empty, 0.0)
