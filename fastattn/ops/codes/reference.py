"""The definitions of the codebook ops and their gradients, in plain torch: dense, over every token."""

import torch

from ...runtime.arithmetic import wide
from ..cross_entropy.reference import (
    at_rows,
    counted_rows,
    grad_of_rows,
    reduced,
    row_loss,
    row_loss_gradient,
    shares,
    spread,
)


def vq_logits(
    h: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return dense_logits(wide(h), wide(codebook), codes, bias).to(h.dtype)


def vq_logits_gradients(grad, h, codebook, codes, bias) -> tuple[torch.Tensor | None, ...]:
    """The gradients of h, codebook and bias."""
    g = wide(grad)
    rows = g.T @ wide(h)  # (V, d)
    return (
        (g @ wide(codebook)[codes.long()]).to(h.dtype),
        _by_code(rows, codes, codebook),
        None if bias is None else g.sum(0).to(bias.dtype),
    )


def _by_code(rows: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(V, d) summed over the tokens of each code."""
    return torch.zeros_like(codebook, dtype=rows.dtype).index_add(0, codes.long(), rows).to(codebook.dtype)


def dense_logits(
    h: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    logits = (h @ codebook.T)[:, codes.long()]  # (N, V): tokens of one code have bitwise equal products
    return logits if bias is None else logits + wide(bias)


def vq_cross_entropy(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    shadow: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss () or (N,), statistics (2, N)). shadow does not change the loss; it gets a gradient as if its rows were the codes' rows."""
    where = counted_rows(target, ignore_index)
    x = dense_logits(wide(h.index_select(0, where)), wide(codebook), codes, bias)
    loss, statistics, _ = row_loss(x, shares(target.index_select(0, where), x.shape[1], x.dtype))
    count = target.shape[0]
    return reduced(loss, where, count, reduction), at_rows(statistics, where, count)


def vq_cross_entropy_gradients(
    grad, h, codebook, codes, bias, shadow, target, ignore_index, reduction
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of h, codebook, bias and shadow."""
    where = counted_rows(target, ignore_index)
    valid = wide(h.index_select(0, where))
    x = dense_logits(valid, wide(codebook), codes, bias)
    targets = shares(target.index_select(0, where), x.shape[1], x.dtype)
    g, *_ = row_loss_gradient(x, targets, grad_of_rows(grad, where, reduction))
    rows = g.T @ valid  # (V, d)
    return (
        spread(g @ wide(codebook)[codes.long()], where, h),
        _by_code(rows, codes, codebook),
        None if bias is None else g.sum(0).to(bias.dtype),
        None if shadow is None else rows.to(shadow.dtype),
    )


def vq_argmax(
    h: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = _products(h.double(), codebook.double())[:, codes.long()]
    return _first_largest(scores if bias is None else scores + bias)


def _products(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """x codebook^T with bitwise equal columns for equal vectors: a matrix product may round equal columns differently."""
    distinct, inverse = codebook.unique(dim=0, return_inverse=True)
    return (x @ distinct.T)[:, inverse]


def _first_largest(x: torch.Tensor) -> torch.Tensor:
    """torch.argmax that returns the lowest index among equals, which torch does not promise."""
    positions = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), positions, x.shape[1] - 1).amin(1)


def vq_sample(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    uniform: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """uniform (N, 2) in [0, 1): column 0 selects the code and column 1 its token, by cumulative probability."""
    temperature = max(temperature, torch.finfo(torch.float64).tiny)
    count, codes = codebook.shape[0], codes.long()
    bias = uniform.new_zeros(codes.shape) if bias is None else bias.double()
    largest = bias.new_full((count,), -torch.inf).scatter_reduce(0, codes, bias, "amax")  # (K,)
    # each token's weight relative to its code's likeliest token; adding the product first would round at its magnitude
    tokens = torch.where(bias == -torch.inf, 0.0, ((bias - largest[codes]) / temperature).exp())  # (V,)
    scores = h.double() @ codebook.double().T + largest  # (N, K)
    scores = torch.where(largest == -torch.inf, -torch.inf, scores)
    weights = ((scores - scores.amax(1, keepdim=True)) / temperature).exp()
    code_weights = weights * tokens.new_zeros(count).index_add(0, codes, tokens)
    code = _pick(code_weights, uniform[:, 0])
    within = torch.where(codes[None] == code[:, None], tokens, 0.0)
    return _pick(within, uniform[:, 1])


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds uniform times the total; any valid index if a weight is NaN."""
    cumulative = weights.cumsum(1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return index.clamp(max=weights.shape[1] - 1)


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    x, codebook = x.double(), codebook.double()
    return _first_largest(_products(x, codebook) - codebook.square().sum(1) / 2)
