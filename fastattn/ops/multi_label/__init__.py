"""The loss of rows with several positive classes: one softmax for each of them, against the negative classes."""

import math

import torch

from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..vocabulary import REDUCTIONS, check_rows
from . import schema  # noqa: F401  registers the ops
from .checks import PADDING


def multi_label_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    positives: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of rows with several positive classes ("decoupled softmax"), without ever holding a tensor of shape (N, V).

    Each positive class competes with the negative classes only. With logits x = h weight^T + bias,

        loss = sum over the row's positives p of log(1 + exp(lse - x_p)),    lse = logsumexp of x over all classes but its positives.

    With one positive the loss is its cross-entropy, `linear_cross_entropy`. Positives do not compete with each other, unlike with
    probabilities as the target.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. weight: (V, d), h's dtype.
    positives: (..., P), int32 or int64, each row's positive classes in [0, V) in any order, padded with -100. A row without positives, or
    without negatives, has loss 0 and a gradient of 0. A class that is listed twice counts twice.
    bias: (V,), h's dtype or float32, default none; -inf excludes a class from the negatives.
    reduction: "mean" over the rows that have a positive (0 when there are none), "sum" or "none".

    lse - x_p is formed from differences to the largest negative logit, and lse is summed over the negatives only: positives are never
    subtracted from a sum over all classes.
    Returns float32 (float64 for float64): a scalar, or (...) for "none". Differentiable once in h, weight and bias; the backward
    recomputes the logits.

    >>> h, weight = torch.randn(2, 8), torch.randn(11, 8)
    >>> loss = fastattn.multi_label_cross_entropy(h, weight, torch.tensor([[3, 5], [7, -100]]))

    Raises ValueError, TypeError or NotImplementedError naming the argument.
    """
    op = "multi_label_cross_entropy"
    check_rows(op, "h", h)
    _checks.check_integer(op, "positives", positives)
    if positives.dim() < 1:
        raise ValueError(f"fastattn.{op}: positives must be (..., P), given {_checks.describe(positives)}")
    shape = (*h.shape[:-1], positives.shape[-1])
    _checks.check_shape(op, "positives", positives, shape, "h's rows, by P classes")
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    count = math.prod(h.shape[:-1])
    rows, flat_positives = h.reshape(count, h.shape[-1]), positives.reshape(count, positives.shape[-1])
    loss, _ = call(op, rows, weight, bias, flat_positives, requested(op, backend))
    if reduction == "none":
        return loss.reshape(h.shape[:-1])
    total = loss.sum()
    return total if reduction == "sum" else total / (flat_positives != PADDING).any(1).sum().clamp(min=1)
