"""Matrix products of a recurrence step together with what stands before and after them."""

import torch

from ... import _checks
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

    x: (..., K); with a gate (..., H, D), H * D = K, any strides. weight: (N, K), rows gate | up with swiglu. Our CPU
    kernel keeps a packed copy of it, as large as the weight, while its memory lives, and each call compares a digest of the
    whole weight, so that every write is noticed: one read of it, which counts where x has few rows (`Linear` layers of
    fastattn's models multiply fewer than 16 by the weight as it is). gate: as x. residual: (..., N), or (..., N/2) with swiglu.
    Returns (..., N), or (..., N/2). Differentiable in x, weight, gate and residual.
    Raises ValueError or TypeError naming the argument; norm_eps and gate exclude each other.
    """
    op = "fused_linear"
    _checks.check_floating(op, x=x, weight=weight, gate=gate, residual=residual)
    _checks.check_tensor(op, "weight", weight, dims=2)
    columns, contracted = weight.shape
    if weight.numel() == 0:
        raise ValueError(f"fastattn.{op}: weight must not be empty, given {_checks.describe(weight)}")
    if gate is not None:
        if norm_eps is not None:
            raise ValueError(f"fastattn.{op}: norm_eps and gate exclude each other, both are given")
        _checks.check_shape(op, "gate", gate, tuple(x.shape), "x's")
        fits = x.dim() >= 2 and x.shape[-2] * x.shape[-1] == contracted
    else:
        fits = x.dim() >= 1 and x.shape[-1] == contracted
    if not fits:
        what = "last two dims" if gate is not None else "last dim"
        raise ValueError(
            f"fastattn.{op}: x must have {what} of {contracted}, weight's columns, given {_checks.describe(x)}"
        )
    if norm_eps is not None:
        _checks.check_positive(op, "norm_eps", norm_eps, zero=True)
    if swiglu and columns % 2:
        raise ValueError(
            f"fastattn.{op}: weight must have an even number of rows, gate | up, given {columns}"
        )
    if residual is not None:
        lead = x.shape[:-1] if gate is None else x.shape[:-2]
        shape = (*lead, columns // 2 if swiglu else columns)
        _checks.check_shape(op, "residual", residual, shape, "the result's")
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    eps = None if norm_eps is None else float(norm_eps)
    out, _, _ = call(
        "fused_linear", x, weight, gate, residual, eps, swiglu, swiglu and save, requested(op, backend)
    )
    return out
