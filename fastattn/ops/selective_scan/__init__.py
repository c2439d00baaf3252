"""The selective state space recurrence of Mamba."""

from typing import Literal, overload

import torch

from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the op


@overload
def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba's selective scan ("Mamba", arXiv 2312.00752, algorithm 2), with its step size, skip and gate fused. For each channel:

        d_t = softplus(dt_t + dt_bias)
        h_t = exp(d_t A) * h_{t-1} + (d_t u_t) B_t        (N,)
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    It computes in float32 (float64 for float64) and rounds once. No tensor of shape (L, E, N) is formed: the state is kept before every
    64th token and recomputed in between in the backward.

    u, dt: (B, L, E). B, C: (B, L, N), shared by the channels. z: (B, L, E), default none (no gate). One floating dtype, any strides:
        for (B, E, L) tensors, as in mamba-ssm and transformers, pass `.transpose(1, 2)`. L may be 0.
    A: (E, N), negative in a model. D, dt_bias: (E,), default none. Each has u's dtype, or float32 beside a 16-bit u.
    dt_softplus: if False, d_t = dt_t + dt_bias. Default True.
    initial_state: (B, E, N), or (documents, E, N) when packed: h before the first token, default 0; float32 (float64 for float64).
    return_state: also return h after the last token, of initial_state's shape, for the call that continues. Default False.
    cu_seqlens: (documents + 1,) int32 or int64 from 0, never decreasing: the offsets of documents packed in a batch of one. Each document
        is a sequence of its own. Tokens after the last document give 0.

    Returns y (B, L, E), contiguous, in u's dtype, or (y, state). Differentiable once in all nine tensors, also through the state. Sums
    over tokens and channels have the same order for any number of threads.

    >>> u, dt, A = torch.randn(1, 7, 6), torch.randn(1, 7, 6), -torch.rand(6, 4)
    >>> B, C = torch.randn(2, 1, 7, 4)
    >>> y, state = fastattn.selective_scan(u, dt, A, B, C, D=torch.ones(6), return_state=True)

    CPU tensors have kernels; CUDA tensors are served by the definition. backend="triton" raises NotImplementedError.
    Raises ValueError or TypeError naming the argument.
    """
    op = "selective_scan"
    args = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    results = call(op, *args, requested(op, backend), reads=2 if return_state else 1)
    return (results[0], results[1]) if return_state else results[0]
