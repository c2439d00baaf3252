"""The definition of causal_conv1d, in plain torch."""

import torch
import torch.nn.functional as F

from ...runtime.arithmetic import widened
from .. import documents


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, L, D), the last K - 1 inputs (B or documents, K - 1, D))."""
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if cu_seqlens is not None:

        def document(i, span):
            state = None if initial_state is None else initial_state[i : i + 1]
            return causal_conv1d(x[:, span], weight, bias, state, None, silu)

        out, states = documents.cut(document, x, cu_seqlens)
        return out, torch.cat([x.new_empty(0, taps - 1, channels), *states])
    history = x.new_zeros(batch, taps - 1, channels) if initial_state is None else initial_state
    inputs = torch.cat([history, x], 1)  # (B, K - 1 + L, D)
    wide, weight = widened(inputs), widened(weight)
    pre = sum(wide[:, k : k + length] * weight[:, k] for k in range(taps))
    pre = pre if bias is None else pre + widened(bias)
    out = F.silu(pre) if silu else pre
    return out.to(x.dtype), inputs[:, length:].clone()
