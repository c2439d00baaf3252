"""Small conversions that the vocabulary ops share."""

import torch


def inverse(temperature: float) -> float:
    """1 / temperature among float32's normal numbers: one that is 0 or infinite makes NaN of an infinity or a 0."""
    return min(max(1 / temperature, 2.0**-126), 2.0**126)


def needed(*tensors: torch.Tensor | None) -> int:
    """A bit for each tensor that wants a gradient of this call."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.requires_grad)
