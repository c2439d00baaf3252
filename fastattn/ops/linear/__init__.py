"""Matrix products of a recurrence step together with what stands before and after them."""

import torch

from ..._registry import call, requested
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

    x: (..., K); with a gate (..., H, D), H * D = K, any strides. weight: (N, K), rows gate | up with swiglu; packed
    once for the CPU and kept until it changes: by any in-place op or optimizer step, or by an update of a whole row or column
    through `.data`. Single elements written through `.data` or from outside of torch, or in place where each call is given a
    new `weight.data` (its count of versions starts at 0; `weight.detach()` shares the weight's), are not noticed: call
    `torch.autograd.graph.increment_version(weight)` after that. gate: as x. residual: (..., N), or (..., N/2) with swiglu.
    Returns (..., N), or (..., N/2). Differentiable in x, weight, gate and residual.
    Raises ValueError or TypeError naming the argument; norm_eps and gate exclude each other.
    """
    op = "fused_linear"
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    out, _, _ = call(
        "fused_linear", x, weight, gate, residual, norm_eps, swiglu, swiglu and save, requested(op, backend)
    )
    return out
