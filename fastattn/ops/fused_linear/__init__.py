"""Matrix products of a recurrence step, fused with the operations before and after them."""

import torch

from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the ops


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float | None = None,
    gate: torch.Tensor | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """x W^T as torch.nn.functional.linear, with a norm or a gate before it, SwiGLU and an addition after it:

        residual + act(pre(x) W^T)

    With norm_eps, pre(x) = x * rsqrt(mean(x^2) + norm_eps) (arXiv 1910.07467, equation 4; the norm has no weight, fold one into
    W). With a gate, pre(x) = sigmoid(gate) * x. With swiglu, act(y) = silu(first half of y) * second half (arXiv 2002.05202,
    equation 6). Sums are in float32.

    One native or Triton kernel computes all of it, or torch's product between row kernels where that is faster: `fastattn tune`
    measures which, and on a GPU torch's product is the default. Gradients on a GPU are torch's products.

    x: (..., K), or (..., H, D) with H * D = K when there is a gate; any strides.
    weight: (N, K); with swiglu the rows of the gate come first, then those of the other half. The CPU kernel keeps a packed copy,
        as large as the weight, while the weight's memory lives. Each call compares a digest of the whole weight, so that no write
        to it is missed: one read of the weight, which costs time where x has few rows.
    gate: shaped as x. residual: (..., N), or (..., N/2) with swiglu.
    Returns (..., N), or (..., N/2). Differentiable in x, weight, gate and residual.
    norm_eps and gate exclude each other. Raises ValueError or TypeError naming the argument.
    """
    op = "fused_linear"
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    out, _, _ = call(
        "fused_linear", x, weight, gate, residual, norm_eps, swiglu, swiglu and save, requested(op, backend)
    )
    return out
