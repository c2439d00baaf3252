"""One token a row through a hierarchical recurrence of pre-norm stacks, in one op."""

from collections.abc import Sequence

import torch

from ... import _checks
from ..._registry import call, needs_grad, requested
from . import schema  # noqa: F401  registers the op

PARTS = ("gqkv", "out", "gate_up", "down")  # the weights of a layer


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
    """HRM-Text's decode step (arXiv 2605.20613): the state zH of each row's token at `position`, whose keys and
    values join the caches there.

    ::

        for h in range(h_cycles):
            for l in range(l_cycles): zL = L_stack(zL + zH)
            zH = H_stack(zH + zL)
        L_stack(x), H_stack(x): for each layer x += out @ (sigmoid(gate) * attention(q, k, v)) of gate | q | k | v = gqkv @ rms(x),
            then x += down @ swiglu(gate_up @ rms(x)); at the end rms(x)

    z_h, z_l: (B, hidden), the scaled embedding and the initial low state.
    weights: the layers of the L stack, then as many of the H stack; of each gqkv (4 * H * D, hidden), out (hidden, H * D),
        gate_up (2 * inner, hidden) and down (hidden, inner).
    k_cache, v_cache: (h_cycles * (l_cycles + 1), layers, B, H, capacity, D), written in place. Stack call h * (l_cycles + 1) + l
        has its own, l = l_cycles being the H stack's.
    position: of every row, or (B,) int32 or int64 where rows differ in length. A row holds as many tokens before the call. A
        tensor's contents are checked on the CPU and trusted on a GPU, so that no call waits for it.
    bound: with a tensor, no position is beyond it; a tight one saves memory on a GPU. Default: the caches' last.
    All of one device, and of one dtype but for position. theta: of the rotary embedding. eps: of the norms.

    Returns (B, hidden). It has no gradients: an input that requires one raises NotImplementedError outside of no_grad.
    Raises ValueError or TypeError naming the argument.
    """
    op = "decode_step"
    _checks.check_floating(op, z_h=z_h, z_l=z_l, k_cache=k_cache, v_cache=v_cache)
    dtype, device = z_h.dtype, z_h.device
    if not all(isinstance(w, torch.Tensor) and w.dtype is dtype and w.device == device for w in weights):
        _checks.check_floating(op, z_h=z_h, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    _checks.check_tensor(op, "z_h", z_h, dims=2)
    _checks.check_shape(op, "z_l", z_l, z_h.shape, "as z_h")
    _checks.check_tensor(op, "k_cache", k_cache, dims=6)
    _checks.check_shape(op, "v_cache", v_cache, k_cache.shape, "as k_cache")
    calls, layers, batch, heads, capacity, head_dim = k_cache.shape
    hidden = z_h.shape[1]
    if 0 in z_h.shape or 0 in k_cache.shape or head_dim % 2:
        raise ValueError(
            f"fastattn.{op}: nothing may be empty and the head dim must be even, given z_h "
            f"{_checks.describe(z_h)} and k_cache {_checks.describe(k_cache)}"
        )
    if min(h_cycles, l_cycles) < 1 or calls != h_cycles * (l_cycles + 1) or batch != z_h.shape[0]:
        raise ValueError(
            f"fastattn.{op}: k_cache must have h_cycles * (l_cycles + 1) calls and z_h's {z_h.shape[0]} rows, given "
            f"{_checks.describe(k_cache)} for h_cycles {h_cycles} and l_cycles {l_cycles}"
        )
    positions = position if isinstance(position, torch.Tensor) else None
    if positions is not None:
        _checks.check_integer(op, "position", positions, dims=1)
        _checks.check_shape(op, "position", positions, (batch,), "one a row")
        _checks.check_same_device(op, z_h=z_h, position=positions)
        position = capacity - 1 if bound is None else bound
    elif bound is not None:
        raise ValueError(
            f"fastattn.{op}: bound is for a tensor of positions, given {bound} with position {position}"
        )
    if not 0 <= position < capacity:
        name = "position" if positions is None else "bound"
        raise ValueError(
            f"fastattn.{op}: {name} must be from 0 to {capacity - 1}, k_cache's last, given {position}"
        )
    if positions is not None:
        _checks.check_range(op, "position", positions, 0, position + 1)
    if len(weights) != 2 * layers * len(PARTS):
        raise ValueError(
            f"fastattn.{op}: weights must be {2 * layers * len(PARTS)} tensors, four a layer, given {len(weights)}"
        )
    inner = weights[3].shape[-1]
    shapes = (
        (4 * heads * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    )
    for i, weight in enumerate(weights):
        if weight.shape != shapes[i % 4]:
            _checks.check_shape(op, f"weights[{i}]", weight, shapes[i % 4], f"{PARTS[i % 4]} of a layer")
    if needs_grad((z_h, z_l, k_cache, v_cache, weights)):
        raise NotImplementedError(f"fastattn.{op}: it has no gradients; call it under torch.no_grad()")
    return call(
        op, z_h, z_l, list(weights), k_cache, v_cache, positions, position, h_cycles, l_cycles, theta, eps,
        requested(op, backend),
    )  # fmt: skip
