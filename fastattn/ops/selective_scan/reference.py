"""The definition of selective_scan, in plain torch, token by token."""

import torch
import torch.nn.functional as F

from ...runtime import checks
from ...runtime.arithmetic import widened
from .. import documents
from .checks import checkpoint_shape


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dt_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, L, E), state (B or documents, E, N), zeros for checkpoints, which the definition does not need)."""
    batch, _, channels = u.shape
    wide = checks.statistics_dtype(u)
    kept = u.new_zeros(checkpoint_shape(u, A), dtype=wide)
    if cu_seqlens is not None:

        def document(i, span):
            parts = [t[:, span] for t in (u, dt, B, C)]
            gate = None if z is None else z[:, span]
            state = None if initial_state is None else initial_state[i : i + 1]
            members = (
                parts[0],
                parts[1],
                A,
                parts[2],
                parts[3],
                D,
                gate,
                dt_bias,
                state,
                None,
                dt_softplus,
            )
            return selective_scan(*members)[:2]

        out, states = documents.cut(document, u, cu_seqlens)
        return out, torch.cat([u.new_empty(0, channels, A.shape[1], dtype=wide), *states]), kept
    step = widened(dt) if dt_bias is None else widened(dt) + widened(dt_bias)
    step = F.softplus(step) if dt_softplus else step
    inputs = step * widened(u)
    A = widened(A)
    h = initial_state
    if h is None:
        h = u.new_zeros(batch, channels, A.shape[1], dtype=torch.promote_types(step.dtype, A.dtype))
    out = []
    tokens = zip(*(t.unbind(1) for t in (step, inputs, widened(B), widened(C))), strict=True)
    for d, x, b, c in tokens:
        h = (d[..., None] * A).exp() * h + x[..., None] * b[:, None]  # (B, E, N)
        out.append((h * c[:, None]).sum(-1))
    y = torch.stack(out, 1) if out else torch.zeros_like(inputs)
    y = y if D is None else y + widened(D) * widened(u)
    y = y if z is None else y * F.silu(widened(z))
    return y.to(u.dtype), h.to(wide, copy=True, memory_format=torch.contiguous_format), kept
