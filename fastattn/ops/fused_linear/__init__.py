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
    """x W^T as in torch.nn.functional.linear, with an optional norm or gate before it, and SwiGLU and an addition after it:

        residual + act(pre(x) W^T)

    With norm_eps, pre(x) = x * rsqrt(mean(x^2) + norm_eps) (arXiv 1910.07467, equation 4; the norm has no weight, fold it into W).
    With a gate, pre(x) = sigmoid(gate) * x. With swiglu, act(y) = silu(first half of y) * second half (arXiv 2002.05202, equation 6).
    Sums are formed in float32.

    Either one native or Triton kernel computes all of it, or torch's product runs between row kernels. `fastattn tune` measures which
    is faster; on a GPU torch's product is the default. On a GPU gradients are torch's products.

    x: (..., K), or (..., H, D) with H * D = K when there is a gate; any strides.
    weight: (N, K); with swiglu the first N/2 rows are the gate's, the others the second half's. The CPU kernel keeps a packed copy, as
        large as the weight, until the weight's memory is freed. Each call compares a digest of the whole weight, so that no write to
        it is missed; reading the weight costs time where x has few rows.
    norm_eps: default none, no norm; it excludes gate.
    gate: of x's shape, default none. residual: (..., N), or (..., N/2) with swiglu, default none.
    All tensors have one dtype, float32, bfloat16 or float16 (float64 on the reference backend).
    Returns (..., N), or (..., N/2) with swiglu, in x's dtype. Differentiable once in x, weight, gate and residual.
    Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> x, weight = torch.randn(5, 8), torch.randn(12, 8)
    >>> out = fastattn.fused_linear(x, weight, norm_eps=1e-6, swiglu=True, residual=torch.randn(5, 6))
    """
    op = "fused_linear"
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    out, _, _ = call(
        "fused_linear", x, weight, gate, residual, norm_eps, swiglu, swiglu and save, requested(op, backend)
    )
    return out
