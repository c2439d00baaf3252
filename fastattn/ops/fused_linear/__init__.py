"""Matrix products of a recurrence step together with what stands before and after them."""

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
    """x W^T as torch.nn.functional.linear, with a norm or a gate before it, SwiGLU and an addition after it.

    residual + act(pre(x) W^T). pre(x) = x * rsqrt(mean(x^2) + norm_eps) with norm_eps (arXiv 1910.07467, equation 4, no
    weight: fold one into W), sigmoid(gate) * x with a gate; act = silu(first half) * second half with swiglu (arXiv
    2002.05202, equation 6). One native or Triton kernel, or torch's product between row kernels where that is the faster
    (`fastattn tune` measures which; a GPU's default is torch's); sums in float32. Gradients on a GPU are torch's products.

    x: (..., K); with a gate (..., H, D), H * D = K, any strides. weight: (N, K), rows gate | up with swiglu. Where
    the CPU kernel runs, a packed copy as large as the weight is kept while the weight's memory lives, and each call compares a
    digest of the whole weight, so that no write to it is missed. That is one read of the weight, which counts where x has few
    rows. gate: as x. residual: (..., N), or (..., N/2) with swiglu.
    Returns (..., N), or (..., N/2). Differentiable in x, weight, gate and residual.
    Raises ValueError or TypeError naming the argument; norm_eps and gate exclude each other.
    """
    op = "fused_linear"
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    out, _, _ = call(
        "fused_linear", x, weight, gate, residual, norm_eps, swiglu, swiglu and save, requested(op, backend)
    )
    return out
