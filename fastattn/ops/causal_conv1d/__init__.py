"""The short causal convolution in front of linear attention and state space layers."""

from typing import Literal, overload

import torch

from ...runtime.checks import check_choice
from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the op

_ACTIVATIONS = {None: False, "silu": True, "swish": True}


@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of each channel with a few taps of its own, as in Mamba (arXiv 2312.00752) and Gated DeltaNet:

        y_t = activation(bias + sum_{k < K} weight[:, k] * x_{t - K + 1 + k})

    It computes in float32 (float64 for float64) and rounds once. Inputs before the first token are `initial_state`, or 0.

    x: (B, L, D), any strides. For a (B, D, L) tensor pass `x.transpose(1, 2)`: the CPU kernels read it without a copy. L may be 0.
    weight: (D, K), K from 1 to 8; the last tap multiplies the token itself. For a depthwise torch.nn.Conv1d it is `weight[:, 0]`.
    bias: (D,), default none. weight and bias have x's dtype, or float32 beside a 16-bit x.
    activation: None or "silu" ("swish" is the same).
    initial_state: (B, K - 1, D), or (documents, K - 1, D) when packed; x's dtype, any strides: the inputs before the first token, the
        oldest first. transformers keeps (B, D, K), whose first column no tap reads: pass `state[..., 1:].transpose(1, 2)`.
    return_state: also return the state after the last token, of initial_state's shape, for the call that continues.
    cu_seqlens: (documents + 1,) int32 or int64 from 0, never decreasing: the offsets of documents packed in a batch of one. No tap
        reads across a document's first token. Tokens after the last document give 0.

    Returns out (B, L, D), contiguous, in x's dtype, or (out, state). Differentiable once in x, weight, bias and initial_state, also
    through the state. Sums over tokens have the same order for any number of threads.

    >>> x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    >>> y, state = fastattn.causal_conv1d(x, weight, activation="silu", return_state=True)
    >>> following = fastattn.causal_conv1d(torch.randn(2, 1, 3), weight, activation="silu", initial_state=state)

    CPU tensors have kernels; CUDA tensors are served by the definition. backend="triton" raises NotImplementedError.
    Raises ValueError or TypeError naming the argument.
    """
    op = "causal_conv1d"
    check_choice(op, "activation", activation, tuple(_ACTIVATIONS))
    silu = _ACTIVATIONS[activation]
    args = (x, weight, bias, initial_state, cu_seqlens, silu)
    results = call(op, *args, requested(op, backend), reads=None if return_state else 1)
    return (results[0], results[1]) if return_state else results[0]
