"""The definition of a few-row product, in plain torch."""

import torch


def matvec(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K) @ weight (N, K).T, summed in float32 or wider."""
    if x.dtype == torch.float64:
        return x @ weight.T
    return (x.float() @ weight.float().T).to(x.dtype)
