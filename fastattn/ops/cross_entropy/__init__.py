"""Losses over dense logits: the last linear layer and its cross-entropy in one op, and HRM's StableMax loss."""

import torch

from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from ..vocabulary import REDUCTIONS, check_rows, check_target, check_wide, needed
from . import schema  # noqa: F401  registers the ops
from .checks import TRANSFORMS

# With this many classes or fewer the forward pass computes the gradients too, from the logits of a few hundred rows at a
# time: three matrix products in all. With more classes that chunk and the saved (V, d) gradient would be most of the memory
# in use, so that backward computes the logits again: four products.
ONE_PASS_CLASSES = 65536


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    transform: str | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits x = h weight^T + bias, without ever holding a tensor of (N, V).

    The logits are changed in this order: x = softcap * tanh(x / softcap) when a softcap is given; x = x / temperature; for "stablemax",
    x = sign(x) log(1 + |x|), which makes softmax StableMax ("Grokking at the Edge of Numerical Stability",
    arXiv 2501.04697, equation 5). Then, with lse = logsumexp(x),

        loss = lse - x[target] + z_loss * lse^2,

    where lse - x[target] is formed from differences to the row's largest logit, before the division by the temperature. So logits
    of 1e8, or a temperature of 1e-3, lose no digits.

    Rows with target == ignore_index cost nothing: they are dropped before the product, and have loss 0 and a gradient of exactly 0.

    h: (..., d), float32, bfloat16, float16 (float64 on the reference backend), any strides. weight: (V, d), h's dtype.
    target: (...), int32 or int64, in [0, V) or ignore_index. bias: (V,), h's dtype or float32; -inf leaves a class out.
    transform: None (softmax) or "stablemax". softcap: more than zero, default none. z_loss: factor, default 0.
    temperature: a number or one a row (...), h's dtype or float32, more than zero; default none.
    reduction: "mean" over the rows that are not ignored (0 when there are none, where torch gives nan), "sum" or "none".

    Products of low-precision inputs accumulate in float32, and weight's gradient in float32 over all rows. On a GPU, and on a CPU
    that multiplies bfloat16 faster than float32, the gradients of the logits are rounded to the inputs' dtype before the last two
    products. On such a CPU bfloat16 also holds a packed copy of weight while a product runs.
    Returns float32 (float64 for float64): a scalar, or (...) for "none". Differentiable once in h, weight, bias and a tensor temperature.
    For "mean" and "sum" over at most 65536 classes the forward pass computes the gradients too, from the logits that it has (three
    matrix products instead of four). For "none", whose incoming gradient differs by row, and for more classes, backward computes
    the logits again.
    torch.nn.functional.linear_cross_entropy, which has the plain softmax form, is not used: by default it holds (N, V) and
    multiplies ignored rows too, and on a CPU it took 1.17 times as long (N 2048, V 32000, d 768, two cores).
    Raises ValueError, TypeError or NotImplementedError naming the argument.
    """
    op = "linear_cross_entropy"
    check_rows(op, "h", h)
    check_target(op, target, h.shape[:-1], ignore_index)
    _checks.check_choice(op, "transform", transform, TRANSFORMS)
    if softcap is not None:
        _checks.check_positive(op, "softcap", softcap)
    temperature = _temperature(op, temperature, h, target)
    rows = h.reshape(-1, h.shape[-1])
    gradients = 0
    if reduction != "none" and weight.shape[0] <= ONE_PASS_CLASSES:
        gradients = needed(h, weight, bias, temperature)
    loss = call(
        "linear_cross_entropy",
        rows,
        weight,
        bias,
        target.reshape(-1),
        temperature,
        TRANSFORMS.index(transform),
        0.0 if softcap is None else softcap,
        z_loss,
        ignore_index,
        reduction,
        gradients,
        requested(op, backend),
    )[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _temperature(
    op: str, temperature: float | torch.Tensor | None, h: torch.Tensor, target: torch.Tensor
) -> torch.Tensor | None:
    """The temperature of each row, (N,), in the dtype of the statistics."""
    if temperature is None:
        return None
    dtype = _checks.statistics_dtype(h)
    if not isinstance(temperature, torch.Tensor):
        number = _checks.as_positive(op, "temperature", temperature)
        return torch.ones(target.numel(), dtype=dtype, device=h.device) * number
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
    ("Grokking at the Edge of Numerical Stability", arXiv 2501.04697, equation 5), as HRM trains with.

    The sum is taken in float32, relative to the largest s of the row, so that nothing overflows.

    logits: (..., V), float32, bfloat16, float16 (float64 on the reference backend), any strides.
    target: (...), int32 or int64, in [0, V) or ignore_index; such a row has loss 0 and a gradient of exactly 0.
    reduction: "mean" over the rows that are not ignored (0 when there are none), "sum" or "none".
    Returns float32 (float64 for float64): a scalar, or (...) for "none". Differentiable once in logits.
    Raises ValueError, TypeError or NotImplementedError naming the argument.
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
