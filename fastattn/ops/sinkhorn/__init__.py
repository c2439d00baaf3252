"""The balance of a router's groups by Sinkhorn's iterations (arXiv 2604.03260)."""

from typing import Literal, overload

import torch

from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from . import checks, schema  # noqa: F401  schema registers the op


@overload
def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def sinkhorn(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 10,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    potentials: torch.Tensor | None = None,
    return_potentials: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Balanced assignment of tokens to groups by Sinkhorn's iterations (arXiv 2604.03260), in the log domain.

    With X = scores / temperature and u = 0, it repeats `iterations` times: v_g = -log sum_tokens exp(X + u), then
    u_l = -log sum_groups exp(X + v). The result is exp(X + u + v). Rows sum to 1, column sums tend to L / G.

    scores: (B, L, G), G at most 63, any floating dtype; computed in float32 (float64 for float64).
    temperature: more than zero, default 0.1. iterations: 1 to 10000, default 10; kernels keep a few numbers for each.
    causal: the column sums of token l run over the tokens up to l, so that no assignment depends on a later token. Default False: they
        run over the whole sequence, so a causal model trained this way sees the future through its routing.
    lengths: (B,) integers, or (documents,) when packed: the number of tokens of each sequence, default all. Later tokens are padding: no
        sum includes them, and their rows are 0.
    cu_seqlens: (documents + 1,) integers from 0, never decreasing: the offsets of documents packed in a batch of one. Each document is
        balanced by itself; rows after the last document are 0.
    prefix_lengths: (B,) integers, or (documents,) when packed, with causal=True: the column sums of token l run over the tokens before
        max(l + 1, prefix), so the tokens of a prefix are balanced together, independently of later tokens. Default 0.
    potentials: (B, 1, G) or (1, 1, G), log column potentials v of an earlier call, used unchanged: the result is softmax(X + v). For
        decoding, where tokens come one at a time. `iterations`, `causal`, `lengths`, `cu_seqlens`, `prefix_lengths` and `backend` are
        then not used.
    return_potentials: also return v, (B, 1, G), or (documents, 1, G) when packed; if causal, v at the last token (of `lengths`). It has
        no gradient. Default False.

    The backward is exact for the number of iterations. It keeps only `scores` and recomputes the potentials, so memory is linear in L
    for any number of iterations (while it runs, the Triton kernel holds one number for each token and iteration).

    Returns (B, L, G) in scores' dtype. Differentiable once in scores. Raises ValueError or TypeError naming the argument.

    >>> assignment, potentials = fastattn.sinkhorn(torch.randn(1, 9, 4), causal=True, return_potentials=True)
    """
    op = "sinkhorn"
    backend = requested(op, backend)
    if potentials is not None:
        temperature = _checks.as_positive(op, "temperature", temperature)
        checks.check_sinkhorn(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal)
        _checks.check_tensor(op, "potentials", potentials, dims=3)
        _checks.check_same_device(op, scores=scores, potentials=potentials)
        batch, _, groups = scores.shape
        if not _checks.broadcasts(potentials.shape, (batch, 1, groups)) or potentials.shape[2] != groups:
            raise ValueError(
                f"fastattn.{op}: potentials must have shape ({batch} or 1)x1x{groups}, given {_checks.describe(potentials)}"
            )
        wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
        fixed = potentials.detach().to(wide)
        assignment = torch.softmax(scores.to(wide) / temperature + fixed, dim=-1).to(scores.dtype)
        return (assignment, potentials) if return_potentials else assignment
    assignment, column_potentials = call(
        "sinkhorn",
        scores,
        lengths,
        cu_seqlens,
        prefix_lengths,
        temperature,
        iterations,
        causal,
        backend,
    )
    return (assignment, column_potentials) if return_potentials else assignment
