"""The definition of a decode step, in plain torch."""

import torch

from ...runtime.arithmetic import widened
from ..rowwise.reference import gated, rms_norm, rotary, swiglu


def decode_step(
    z_h: torch.Tensor,
    z_l: torch.Tensor,
    weights: list[torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor | None,
    position: int,
    h_cycles: int,
    l_cycles: int,
    theta: float,
    eps: float,
) -> torch.Tensor:
    """zH (B, hidden) after the last call. Keys and values are written to the caches (calls, layers, B, H, capacity, D).

    positions: (B,), each at most `position`; or None if all are `position`.
    """
    _, layers, batch, heads, _, dim = k_cache.shape
    wide = torch.float64 if z_h.dtype == torch.float64 else torch.float32
    if positions is None:
        positions = torch.full((batch,), position, device=z_h.device)
    rows, end = torch.arange(batch, device=z_h.device), position + 1
    unused = (torch.arange(end, device=z_h.device) > positions[:, None])[:, None, None]  # (B, 1, 1, end)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, None, None, eps)[0]

    def stack(index: int, call: int, x: torch.Tensor) -> torch.Tensor:
        for layer in range(layers):
            first = 4 * (index * layers + layer)
            gqkv, out, gate_up, down = weights[first : first + 4]
            projected = normed(x) @ gqkv.T
            gate, q, k, v = projected.view(batch, 4, heads, 1, dim).unbind(1)  # (B, H, 1, D)
            q, k = rotary(q, k, positions[:, None], theta, False, False)
            keys, values = k_cache[call, layer], v_cache[call, layer]  # (B, H, capacity, D)
            keys[rows, :, positions.long()], values[rows, :, positions.long()] = k[:, :, 0], v[:, :, 0]
            scores = (widened(q) @ widened(keys[:, :, :end]).mT).to(wide) * dim**-0.5  # (B, H, 1, end)
            weight = torch.softmax(scores.masked_fill(unused, -torch.inf), -1)
            known = widened(values[:, :, :end].masked_fill(unused.mT, 0))
            attended = gated((weight.to(known.dtype) @ known).to(x.dtype), gate)
            x = x + attended.reshape(batch, heads * dim) @ out.T
            x = x + swiglu(normed(x) @ gate_up.T) @ down.T
        return normed(x)

    for h in range(h_cycles):
        call = h * (l_cycles + 1)
        for l in range(l_cycles):
            z_l = stack(0, call + l, z_l + z_h)
        z_h = stack(1, call + l_cycles, z_h + z_l)
    return z_h
