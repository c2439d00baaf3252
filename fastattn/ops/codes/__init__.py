"""A head whose V rows are K shared vectors (VQ-logits, arXiv 2505.10202). Every op computes with K logits a row instead of V.

The logit of token i is h . codebook[codes[i]] + bias[i]. Let beta_k be the logsumexp of bias over the tokens of code k: without a bias
the log of their number, and -inf for a code without tokens. Then the logsumexp over tokens is logsumexp_k(h . codebook_k + beta_k).
"""

import torch

from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..vocabulary import check_rows, check_target, needed
from . import schema  # noqa: F401  registers the ops


def _rows(op: str, name: str, t: torch.Tensor) -> torch.Tensor:
    """t (..., d) as (N, d)."""
    check_rows(op, name, t)
    return t.reshape(-1, t.shape[-1])


def vq_logits(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """All V logits of a vector-quantised head: h . codebook[codes[i]] + bias[i].

    It takes K products per row and one look-up per token (arXiv 2505.10202, section 3). The loss, the greedy choice and sampling have
    ops that never form the logits: vq_cross_entropy, vq_argmax, vq_sample.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. codebook: (K, d), h's dtype.
    codes: (V,), int32 or int64 in [0, K); a code may have no token. bias: (V,), h's dtype or float32, default none.
    Returns (..., V) in h's dtype, rounded once from float32. Differentiable once in h, codebook and bias.
    Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> h, codebook, codes = torch.randn(5, 8), torch.randn(7, 8), torch.randint(7, (30,))
    >>> logits = fastattn.vq_logits(h, codebook, codes)
    """
    op = "vq_logits"
    logits = call(op, _rows(op, "h", h), codebook, codes, bias, requested(op, backend))
    return logits.reshape(*h.shape[:-1], codes.shape[0])


def vq_cross_entropy(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    shadow: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of target under a vector-quantised head, from K logits a row: equal to the softmax over all V tokens.

    loss = logsumexp_k(h . codebook_k + beta_k) - h . codebook[codes[target]] - bias[target], with beta_k the logsumexp of bias
    over the tokens of code k (arXiv 2505.10202; the bias is ours). It is formed from differences to the largest logit, so that large
    logits lose no digits. Nothing of size (N, V) or (V, K) is held.
    Rows with target == ignore_index are dropped before the product, have loss 0 and a gradient of exactly 0.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. codebook: (K, d), h's dtype.
    codes: (V,), int32 or int64 in [0, K), any pattern. target: (...), int32 or int64 in [0, V) or ignore_index.
    bias: (V,), h's dtype or float32, default none; without it all tokens of a code are equally likely.
    shadow: (V, d), h's dtype or float32, default none. It does not change the loss. It gets the straight-through gradient: the gradient
    that the rows of a dense head with these logits would get. This costs O(V d) in the backward.
    reduction: "mean" over the rows that are not ignored (0 when there are none), "sum" or "none".
    Returns float32 (float64 for float64): a scalar, or (...) for "none". Differentiable once in h, codebook, bias and shadow; codebook's
    gradient accumulates in float32. Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> h, codebook, codes = torch.randn(5, 8), torch.randn(7, 8), torch.randint(7, (30,))
    >>> loss = fastattn.vq_cross_entropy(h, codebook, codes, torch.randint(30, (5,)))
    """
    op = "vq_cross_entropy"
    rows = _rows(op, "h", h)
    check_target(op, target, h.shape[:-1], ignore_index)
    loss = call(
        op,
        rows,
        codebook,
        codes,
        bias,
        shadow,
        target.reshape(-1),
        ignore_index,
        reduction,
        0 if reduction == "none" else needed(h, codebook, bias, shadow),
        requested(op, backend),
    )[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def vq_argmax(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The token of the largest logit, from K logits per row. Among equal logits the lowest token id wins.

    The code is argmax_k (h . codebook_k + the largest bias of its tokens), and the token is the one with that bias: the argmax of
    vq_logits in exact arithmetic (arXiv 2505.10202). Codes within rounding of the best are compared again in float64.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. codebook: (K, d), h's dtype.
    codes: (V,), int32 or int64 in [0, K). bias: (V,), h's dtype or float32, default none.
    Returns (...), int64. Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> h, codebook, codes = torch.randn(5, 8), torch.randn(7, 8), torch.randint(7, (30,))
    >>> tokens = fastattn.vq_argmax(h, codebook, codes)
    """
    op = "vq_argmax"
    rows, bias = _rows(op, "h", h).detach(), None if bias is None else bias.detach()
    tokens = call(op, rows, codebook.detach(), codes, bias, requested(op, backend))
    return tokens.reshape(h.shape[:-1])


def vq_sample(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One token per row, drawn from softmax(vq_logits / temperature): first a code, then a token of that code.

    Code k has probability softmax_k(h . codebook_k / temperature + beta_k), where beta_k is the logsumexp of bias / temperature
    over its tokens (arXiv 2505.10202). Token i of the code is drawn in proportion to exp(bias[i] / temperature). Never forms (N, V).

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. codebook: (K, d), h's dtype.
    codes: (V,), int32 or int64 in [0, K). bias: (V,), h's dtype or float32, default none; a bias of -inf is never drawn.
    temperature: more than zero, default 1. generator: of h's device, default torch's own; two float64 uniforms a row are drawn from it.
    Returns (...), int64. Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> h, codebook, codes = torch.randn(5, 8), torch.randn(7, 8), torch.randint(7, (30,))
    >>> tokens = fastattn.vq_sample(h, codebook, codes, temperature=0.7)
    """
    op = "vq_sample"
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fastattn.{op}: generator must be a torch.Generator, given {_checks.describe(generator)}"
        )
    rows, bias = _rows(op, "h", h).detach(), None if bias is None else bias.detach()
    uniform = torch.rand(rows.shape[0], 2, dtype=torch.float64, device=h.device, generator=generator)
    tokens = call(op, rows, codebook.detach(), codes, bias, uniform, temperature, requested(op, backend))
    return tokens.reshape(h.shape[:-1])


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """The code nearest to each row in Euclidean distance, without ever holding (V, K). Among equal distances the lowest code wins.

    argmin_k |x - codebook_k|^2, the assignment step of vector quantisation ("Neural Discrete Representation Learning",
    arXiv 1711.00937, equation 1). Codes within rounding of the nearest are compared again in float64.

    x: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. codebook: (K, d), x's dtype.
    Returns (...), int64. Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> codes = fastattn.nearest_codes(torch.randn(5, 8), torch.randn(7, 8))
    """
    op = "nearest_codes"
    codes = call(op, _rows(op, "x", x).detach(), codebook.detach(), requested(op, backend))
    return codes.reshape(x.shape[:-1])
