"""The definition of a decode step, in plain torch."""

import torch

from ..recurrence.reference import gated, rms_norm_of_sum, rotary, swiglu


def decode_step(
    z_h: torch.Tensor,
    z_l: torch.Tensor,
    weights: list[torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: int,
    h_cycles: int,
    l_cycles: int,
    theta: float,
    eps: float,
) -> torch.Tensor:
    """zH (B, hidden) after the last call; keys and values go to the caches (calls, layers, B, H, capacity, D)."""
    _, layers, batch, heads, _, dim = k_cache.shape
    wide = torch.float64 if z_h.dtype == torch.float64 else torch.float32
    positions = torch.full((1,), position, device=z_h.device)

    def stack(which: int, call: int, x: torch.Tensor) -> torch.Tensor:
        for layer in range(layers):
            first = 4 * (which * layers + layer)
            gqkv, out, gate_up, down = weights[first : first + 4]
            projected = rms_norm_of_sum(x, None, eps) @ gqkv.T
            gate, q, k, v = projected.view(batch, 4, heads, 1, dim).unbind(1)  # (B, H, 1, D)
            q, k = rotary(q, k, positions, theta, False)
            keys, values = k_cache[call, layer], v_cache[call, layer]  # (B, H, capacity, D)
            keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[:, :, : position + 1], values[:, :, : position + 1]
            weight = torch.softmax((q @ keys.mT).to(wide) * dim**-0.5, -1)  # (B, H, 1, position + 1)
            attended = gated(weight.to(x.dtype) @ values, gate)
            x = x + attended.reshape(batch, heads * dim) @ out.T
            x = x + swiglu(rms_norm_of_sum(x, None, eps) @ gate_up.T) @ down.T
        return rms_norm_of_sum(x, None, eps)

    for h in range(h_cycles):
        call = h * (l_cycles + 1)
        for l in range(l_cycles):
            z_l = stack(0, call + l, z_l + z_h)
        z_h = stack(1, call + l_cycles, z_h + z_l)
    return z_h
