"""The definition of merging partial attention results, in plain torch."""

import torch

from ...runtime.arithmetic import rounded_once
from ..attention.reference import with_sink


@rounded_once
def merge(
    outs: torch.Tensor, lses: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (..., D), lse (...)) of parts outs (parts, ..., D) and lses (parts, ...)."""
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (total.log() + top).masked_fill(nothing, -torch.inf)
    share = weights / total
    if sink is not None:
        lse, left = with_sink(lse, sink.to(lse.dtype)[:, None])
        share = share * left
    wide = outs.to(torch.promote_types(outs.dtype, lses.dtype))
    # a part without keys is nothing, whatever its output
    out = (share[..., None] * wide).masked_fill((weights == 0)[..., None], 0.0).sum(0)
    return out, lse
