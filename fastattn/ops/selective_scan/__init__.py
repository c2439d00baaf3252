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
    """Mamba's selective scan ("Mamba", arXiv 2312.00752, algorithm 2), with its step size, skip and gate fused. Per channel e:

        d_t = softplus(dt_t + dt_bias)
        h_t = exp(d_t A) * h_{t-1} + (d_t u_t) B_t        (N,)
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    float32 inside (float64 for float64), one rounding. Nothing of (L, E, N) is formed: the state is kept every 64 tokens, and found again
    in the backward.

    u, dt: (B, L, E). B, C: (B, L, N), shared by the channels. z: (B, L, E), default none (no gate). One floating dtype, any strides:
        of (B, E, L) tensors, as mamba-ssm and transformers have them, pass `.transpose(1, 2)`. L may be 0.
    A: (E, N), negative in a model. D, dt_bias: (E,), default none. Each of u's dtype, or float32 beside 16 bits.
    dt_softplus: False takes dt + dt_bias as it is. Default True.
    initial_state: (B, E, N), h before the first token, default 0; float32 (float64 for float64). One a document when packed.
    return_state: also return h after the last token, as initial_state, for the call that goes on; one a document when packed.
    cu_seqlens: (documents + 1,) int32 or int64 from 0, never decreasing: documents packed in a batch of one, each a sequence of its own.
        Tokens after the last document give 0.

    Returns (B, L, E), contiguous, in u's dtype, or (that, state). Differentiable, once, in all nine tensors, also through the state; sums
    over tokens and channels are formed in one order for any number of threads.

    >>> u, dt, A = torch.randn(1, 7, 6), torch.randn(1, 7, 6), -torch.rand(6, 4)
    >>> B, C = torch.randn(2, 1, 7, 4)
    >>> y, state = fastattn.selective_scan(u, dt, A, B, C, D=torch.ones(6), return_state=True)

    There are CPU kernels and the definition, which CUDA tensors get; backend="triton" raises NotImplementedError.
    Raises ValueError or TypeError naming the argument.
    """
    op = "selective_scan"
    args = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    results = call(op, *args, requested(op, backend), reads=2 if return_state else 1)
    return (results[0], results[1]) if return_state else results[0]
