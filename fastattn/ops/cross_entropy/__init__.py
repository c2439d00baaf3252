"""Losses over dense logits: the last linear layer and its cross-entropy in one op, and HRM's StableMax loss."""

import math
from typing import Literal, NamedTuple, overload

import torch

from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..vocabulary import REDUCTIONS, check_rows, check_target, check_wide, needed
from . import schema  # noqa: F401  registers the ops
from .checks import TRANSFORMS, check_class_weight

# With at most this many classes the forward computes the gradients too, from the logits of a few hundred rows at a time: three
# matrix products in all. With more classes that chunk and the saved (V, d) gradient would be most of the memory in use, so the
# backward recomputes the logits: four products.
ONE_PASS_CLASSES = 65536
_IGNORED = -100


@overload
def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    transform: str | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    transform: str | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    transform: str | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the logits x = h weight^T + bias, without ever holding a tensor of shape (N, V).

    The logits are changed in this order: x = softcap * tanh(x / softcap) when a softcap is given; x = x / temperature; for "stablemax",
    x = sign(x) log(1 + |x|), which makes softmax StableMax ("Grokking at the Edge of Numerical Stability",
    arXiv 2501.04697, equation 5). Then, with lse = logsumexp(x),

        loss = sum_c s_c (lse - x_c + z_loss * lse^2),    s_c = class_weight_c ((1 - label_smoothing) t_c + label_smoothing / V),

    where t is 1 for the target's class and 0 elsewhere, or the target's probabilities. By default the loss is lse - x[target]. With
    class weights, smoothing ("Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567) or probabilities it is
    torch.nn.functional.linear_cross_entropy's (where class weights are called "weight"). lse - x_c is formed from differences to the
    row's largest logit, before the division by the temperature, so logits of 1e8 or a temperature of 1e-3 lose no digits. One exception:
    for smoothed class indices without softcap and transform, the sum over classes is a product of h with weight^T class_weight, which
    is rounded at the logits' magnitude.

    Rows with target == ignore_index are dropped before the product. They have loss 0 and a gradient of exactly 0.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. weight: (V, d), h's dtype; or
    (V, d_1, ..., d_K, d) for d_1 * ... * d_K losses a row, each computed by a call of its own.
    target: classes (..., d_1, ..., d_K), int32 or int64, in [0, V) or ignore_index; or probabilities (..., V, d_1, ..., d_K), h's
    dtype or float32, which need not sum to 1.
    bias: (V, d_1, ..., d_K), h's dtype or float32; -inf leaves a class out. class_weight: (V,), any floating dtype; it gets no
    gradient. label_smoothing: in [0, 1], default 0.
    transform: None (softmax) or "stablemax". softcap: more than zero, default none. z_loss: factor, default 0.
    temperature: a number, or a tensor (...) with one for each row, h's dtype or float32; more than zero, default none.
    ignore_index: default -100. With probabilities it must be None, else a ValueError is raised, as in torch.
    reduction: "mean", "sum" or "none". "mean" divides by the sum of class_weight[target], 1 without class weights, over the rows that
    are not ignored, and for probabilities by the number of losses. A divisor of 0 counts as 1 (torch gives nan).
    return_lse: also return lse, (..., d_1, ..., d_K), float32; 0 for ignored rows. Default False.

    Products of low-precision inputs accumulate in float32, and weight's gradient in float32 over all rows. On a GPU, and on a CPU
    that multiplies bfloat16 faster than float32, the gradients of the logits are rounded to the inputs' dtype before the last two
    products. On such a CPU bfloat16 also holds a packed copy of weight while a product runs.
    Returns float32 (float64 for float64): a scalar, or (..., d_1, ..., d_K) for "none"; with return_lse (loss, lse). Differentiable
    once in h, weight, bias, probabilities and a tensor temperature, also through lse. The gradient of probabilities is an (N, V).
    For "mean" and "sum" over at most 65536 classes, without return_lse, the forward pass computes the gradients too, from the logits
    that it has (three matrix products instead of four). For "none", whose incoming gradient differs by row, and for more classes,
    the backward recomputes the logits.
    torch.nn.functional.linear_cross_entropy, which computes the plain softmax form, is not used: by default it holds (N, V) and
    multiplies ignored rows too. On a CPU it took 1.17 times as long (N 2048, V 32000, d 768, two cores).

    >>> h, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    >>> loss, lse = fastattn.linear_cross_entropy(h, weight, target, label_smoothing=0.1, return_lse=True)

    Raises ValueError, TypeError or NotImplementedError naming the argument.
    """
    op = "linear_cross_entropy"
    check_rows(op, "h", h)
    _checks.check_tensor(op, "weight", weight)
    _checks.check_tensor(op, "target", target)
    if weight.dim() < 2 or 0 in weight.shape:
        raise ValueError(
            f"fastattn.{op}: weight must be (V, d) or (V, d_1, ..., d_K, d), all sizes above 0, given {_checks.describe(weight)}"
        )
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    probabilities = target.is_floating_point()
    if probabilities:
        if ignore_index is not None:
            raise ValueError(
                f"fastattn.{op}: ignore_index must be None where target has probabilities, given {ignore_index!r}"
            )
        check_wide(op, "target", target, h)
        shape = (*h.shape[:-1], weight.shape[0], *weight.shape[1:-1])
        _checks.check_shape(op, "target", target, shape, "a probability a class and loss")
    ignore_index = _IGNORED if ignore_index is None else ignore_index
    loss_shape = (*h.shape[:-1], *weight.shape[1:-1])
    if not probabilities:
        check_target(op, target, loss_shape, ignore_index)
    if class_weight is not None:
        check_class_weight(op, class_weight, h, weight.shape[0])
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"fastattn.{op}: class_weight gets no gradient; pass class_weight.detach()"
            )
    _checks.check_choice(op, "transform", transform, TRANSFORMS)
    if softcap is not None:
        _checks.check_positive(op, "softcap", softcap)
    _checks.check_positive(op, "label_smoothing", label_smoothing, zero=True)
    options = _Options(
        _temperature(op, temperature, h),
        class_weight,
        TRANSFORMS.index(transform),
        0.0 if softcap is None else softcap,
        z_loss,
        label_smoothing,
        ignore_index,
        reduction,
        return_lse,
        requested(op, backend),
    )
    rows = h.reshape(-1, h.shape[-1])
    if weight.dim() == 2:
        target = target.reshape(-1, weight.shape[0]) if probabilities else target.reshape(-1)
        loss, lse = _of_head(rows, weight, bias, target, options)
    else:
        loss, lse = _of_heads(op, rows, weight, bias, target, options)
    if reduction == "none":
        loss = loss.reshape(loss_shape)
    return (loss, lse.reshape(loss_shape)) if return_lse else loss


class _Options(NamedTuple):
    temperature: torch.Tensor | None
    class_weight: torch.Tensor | None
    transform: int
    softcap: float
    z_loss: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    return_lse: bool
    backend: str


def _of_head(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss () or (N,), lse (N,) or (0,)) of rows (N, d), weight (V, d), bias (V,) and target (N,) or (N, V)."""
    gradients = 0
    if options.reduction != "none" and weight.shape[0] <= ONE_PASS_CLASSES and not options.return_lse:
        gradients = needed(rows, weight, bias, options.temperature, target)
    *settings, backend = options
    results = call("linear_cross_entropy", rows, weight, bias, target, *settings, gradients, backend)
    return results[0], results[2]


def _of_heads(
    op: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_of_head` for weight (V, d_1, ..., d_K, d), applied to each of places = d_1 * ... * d_K heads: (loss () or (N, places), lse
    (N, places))."""
    classes, places = weight.shape[0], math.prod(weight.shape[1:-1])
    biases: tuple[torch.Tensor | None, ...] = (None,) * places
    if bias is not None:
        _checks.check_tensor(op, "bias", bias)
        _checks.check_shape(op, "bias", bias, tuple(weight.shape[:-1]), "as weight without its last dim")
        biases = bias.reshape(classes, places).unbind(1)
    soft = target.is_floating_point()
    target = target.reshape(rows.shape[0], classes, places) if soft else target.reshape(rows.shape[0], places)
    head_options = options._replace(reduction="none" if options.reduction == "none" else "sum")
    pairs = [
        _of_head(rows, w, b, t, head_options)
        for w, b, t in zip(
            weight.reshape(classes, places, -1).unbind(1), biases, target.unbind(-1), strict=True
        )
    ]
    losses, lses = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
    if options.reduction == "none":
        return losses, lses
    loss = losses.sum()
    return (loss / _divisor(target, options) if options.reduction == "mean" else loss), lses


def _divisor(target: torch.Tensor, options: _Options) -> torch.Tensor | int:
    """The divisor of "mean": by it the sum over all rows and places is divided."""
    if target.is_floating_point():
        return max(1, target.shape[0] * target.shape[2])
    counted = target != options.ignore_index
    if options.class_weight is None:
        return counted.sum().clamp(min=1)
    weights = options.class_weight[target.masked_fill(~counted, 0).long()]
    total = weights.masked_fill(~counted, 0).sum(dtype=_checks.statistics_dtype(weights))
    return total.masked_fill(total == 0, 1)


def _temperature(op: str, temperature: float | torch.Tensor | None, h: torch.Tensor) -> torch.Tensor | None:
    """The temperature of each row, (N,), in the statistics' dtype; None without one."""
    if temperature is None:
        return None
    dtype = _checks.statistics_dtype(h)
    if not isinstance(temperature, torch.Tensor):
        number = _checks.as_positive(op, "temperature", temperature)
        return torch.ones(math.prod(h.shape[:-1]), dtype=dtype, device=h.device) * number
    check_wide(op, "temperature", temperature, h)
    _checks.check_shape(op, "temperature", temperature, tuple(h.shape[:-1]), "one a row")
    return temperature.reshape(-1).to(dtype)


def stablemax_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of StableMax probabilities s(x) / sum s(x), with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below
    ("Grokking at the Edge of Numerical Stability", arXiv 2501.04697, equation 5), which HRM is trained with.

    The sum is formed in float32, relative to the row's largest s, so that nothing overflows.

    logits: (..., V), float32, bfloat16, float16 (float64 on the reference backend), any strides.
    target: (...), int32 or int64, in [0, V) or ignore_index; such a row has loss 0 and a gradient of exactly 0.
    reduction: "mean" over the rows that are not ignored (0 when there are none), "sum" or "none".
    Returns float32 (float64 for float64): a scalar, or (...) for "none". Differentiable once in logits.
    Raises ValueError, TypeError or NotImplementedError naming the argument.

    >>> loss = fastattn.stablemax_cross_entropy(torch.randn(5, 11), torch.randint(11, (5,)))
    """
    op = "stablemax_cross_entropy"
    check_rows(op, "logits", logits)
    check_target(op, target, logits.shape[:-1], ignore_index)
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    loss, _ = call(
        "stablemax_cross_entropy",
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        ignore_index,
        requested(op, backend),
    )
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)
