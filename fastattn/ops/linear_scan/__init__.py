"""First-order linear recurrences, element by element."""

import torch

from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the op


def linear_scan(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    initial: torch.Tensor | None = None,
    reverse: bool = False,
    log_a: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """h_t = a_t * h_{t-1} + b_t along the dim before the last, element by element, real or complex.

    This is the recurrence of S5 (arXiv 2208.04933, equation 3 with a diagonal state matrix), RG-LRU (arXiv 2402.19427, equation 4) and
    others. For 16-bit tensors the state is carried in float32 from token to token, and each h_t is rounded once.

    b: (..., L, D), any strides, float32, bfloat16, float16, float64, complex64 or complex128. L may be 0.
    a: broadcastable to b's shape: (D,) constants, (..., L, 1) shared by the channels, or full. b's dtype, or float32 beside a 16-bit b:
        bfloat16 has no factor between 0.996 and 1.
    initial: (..., D), or (documents, D) when packed: h before the first token, default 0. b's dtype, or float32 beside a 16-bit b.
    reverse: scan from the last token to the first: h_t = a_t * h_{t+1} + b_t, with `initial` after the last token. Default False.
    log_a: a holds the factors' natural logarithms: a_t = exp(a[t]). -inf is a factor of 0, with a gradient of 0. Default False.
    cu_seqlens: (documents + 1,) int32 or int64 from 0, never decreasing: the offsets of documents packed in b of shape (1, L, D) or
        (L, D). Each document is a sequence of its own. Tokens after the last document give 0.

    Returns h, of b's shape and dtype, contiguous. To continue a sequence pass `h[..., -1, :]` (in reverse `h[..., 0, :]`) as `initial`.
    Differentiable once in a, b and initial. The backward is a scan in the other direction that reads a and h; b is not kept. Gradients
    of shared factors are summed in the same order for a given number of threads. Complex gradients are of the conjugate, as in torch.

    >>> gate, x = torch.rand(2, 9, 4), torch.randn(2, 9, 4)
    >>> h = fastattn.linear_scan(gate, (1 - gate) * x)
    >>> h = fastattn.linear_scan(torch.tensor([0.9, 0.5, 0.1, 0.0]), x, initial=h[:, -1])

    CPU tensors have kernels, except float64 and complex128; these and CUDA tensors are served by the definition. backend="triton" raises
    NotImplementedError. Raises ValueError or TypeError naming the argument.
    """
    op = "linear_scan"
    return call(op, a, b, initial, cu_seqlens, reverse, log_a, requested(op, backend))
