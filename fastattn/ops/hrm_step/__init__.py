"""HRM-Text's decode step: one token of each row through a hierarchical recurrence of pre-norm stacks, in one op."""

from collections.abc import Sequence

import torch

from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the op
from .checks import PARTS  # noqa: F401  the order of a layer's weights


def decode_step(
    z_h: torch.Tensor,
    z_l: torch.Tensor,
    weights: Sequence[torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: int | torch.Tensor,
    *,
    h_cycles: int,
    l_cycles: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    bound: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """HRM-Text's decode step (arXiv 2605.20613): computes the state zH of each row's token at `position`, and writes the token's
    keys and values into the caches at that position.

    ::

        for h in range(h_cycles):
            for l in range(l_cycles): zL = L_stack(zL + zH)
            zH = H_stack(zH + zL)
        L_stack(x), H_stack(x): for each layer x += out @ (sigmoid(gate) * attention(q, k, v)) of gate | q | k | v = gqkv @ rms(x),
            then x += down @ swiglu(gate_up @ rms(x)); at the end rms(x)

    z_h, z_l: (B, hidden), the scaled embedding and the initial low state.
    weights: four for each layer, first the L stack's layers, then as many of the H stack: gqkv (4 * H * D, hidden),
        out (hidden, H * D), gate_up (2 * inner, hidden) and down (hidden, inner).
    k_cache, v_cache: (h_cycles * (l_cycles + 1), layers, B, H, capacity, D), written in place. Each stack call has its own caches, at
        index h * (l_cycles + 1) + l for the L stack and h * (l_cycles + 1) + l_cycles for the H stack.
    position: the number of tokens that each row has in the caches before the call: one number, or (B,) int32 or int64 if rows differ.
        A tensor's elements are checked on the CPU but not on a GPU, so that no call waits for the device.
    bound: an upper bound of the positions in a tensor; a tight one saves memory on a GPU. Default: the caches' last position.
    theta: base of the rotary embedding, default 10000. eps: of the norms, default 1e-6.
    All tensors are on one device, and all but position have one dtype.

    Returns (B, hidden). It has no gradients: an input that requires one raises NotImplementedError outside of no_grad.
    Raises ValueError or TypeError naming the argument.

    >>> state, caches = torch.randn(1, 16), torch.zeros(2, 2, 1, 1, 2, 4, 8)
    >>> weights = [torch.randn(*shape) for shape in ((64, 16), (16, 16), (6, 16), (16, 3)) * 2]
    >>> state = fastattn.decode_step(state, state, weights, *caches, 0, h_cycles=1, l_cycles=1)
    """
    op = "decode_step"
    positions = position if isinstance(position, torch.Tensor) else None
    if positions is not None:
        position = k_cache.shape[-2] - 1 if bound is None else bound
    elif bound is not None:
        raise ValueError(
            f"fastattn.{op}: bound is for a tensor of positions, given {bound} with position {position}"
        )
    return call(
        op, z_h, z_l, list(weights), k_cache, v_cache, positions, position, h_cycles, l_cycles, theta, eps,
        requested(op, backend),
    )  # fmt: skip
