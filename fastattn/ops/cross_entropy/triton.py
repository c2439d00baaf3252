"""Losses over dense logits in Triton: the row kernel between the products of chunked.py."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning
from ...runtime.triton import offset
from . import (
    chunked,
    tuning_triton,  # noqa: F401  declares what is looked up
)
from .shares import unserved


@triton.jit
def _tanh(x):
    """tanh; below 0.6 by a polynomial (relative error 8e-8), so that small logits keep their digits under a large cap."""
    z = x * x
    p = -0.005905856844 * z + 0.02080537379
    p = p * z - 0.0537866801
    p = p * z + 0.1333195865
    p = p * z - 0.3333329856
    return tl.where(tl.abs(x) < 0.6, x + x * (z * p), 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _prepare(x, bias, column, inside, softcap, tau, STABLEMAX: tl.constexpr, SOFTCAP: tl.constexpr):
    """(logit with bias and softcap, for stablemax also divided by the temperature; the softcap's derivative)."""
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        bend = _tanh(x / softcap)
        x = softcap * bend
        slope = 1.0 - bend * bend
    if STABLEMAX:
        x = x / tau
    return x, slope


@triton.jit
def _symlog(x):
    """The logarithm of StableMax's weight."""
    magnitude = tl.log(1.0 + tl.abs(x))
    return tl.where(x >= 0, magnitude, -magnitude)


@triton.jit
def _weight(x, top, log_count, column, inside, tau, STABLEMAX: tl.constexpr):
    """The weight of a prepared logit relative to the row's largest: e^((x - top) / tau + log_count), or s(x) / s(top) for stablemax."""
    if STABLEMAX:
        size = 1.0 + tl.abs(x)
        top_size = 1.0 + tl.abs(top)
        up = tl.where(x >= 0, size, 1.0) / tl.where(x >= 0, top_size, size * top_size)
        return tl.where(top >= 0, up, top_size / size)
    above = (x - top) / tau
    if log_count is not None:
        above += tl.load(log_count + column, mask=inside, other=0.0)
    return tl.exp(above)


@triton.jit
def _vocab_rows_kernel(
    x, out, bias, log_count, target, temperature, shares, grad, loss, largest, total, grad_temperature,
    x_row, out_row, classes, softcap, z_loss, ignore_index,
    STABLEMAX: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits: its loss, largest logit and sum of weights (STATISTICS), and the loss's gradient (GRADIENT), which may
    overwrite the logits. shares (rows, 3): the factors of the target's logit and of the log-sum-exp in the loss, and the gradient of
    the log-sum-exp. No log-sum-exp is formed for the loss: rounded at the logits' magnitude, it would lose the target's distance to
    the largest logit."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    label = tl.load(target + row)
    tau = tl.full([], 1.0, tl.float32)
    if temperature is not None:
        tau = tl.load(temperature + row).to(tl.float32)
    x_base = x + offset(row, x_row)
    out_base = out + offset(row, out_row)
    row_own = 1.0
    row_mass = 1.0
    if shares is not None:
        row_own = tl.load(shares + 3 * row)
        row_mass = tl.load(shares + 3 * row + 1)
    if label == ignore_index:
        if STATISTICS:
            tl.store(loss + row, 0.0)
            tl.store(largest + row, 0.0)
            tl.store(total + row, 0.0)
        if GRADIENT:
            for first in range(0, classes, BLOCK):
                tl.store(
                    out_base + first + column,
                    tl.zeros([BLOCK], out.dtype.element_ty),
                    mask=first + column < classes,
                )
            if grad_temperature is not None:
                tl.store(grad_temperature + row, 0.0)
        return
    if STATISTICS:
        # The target's logit is read before the sums below, hence before any thread overwrites it with a gradient. An invalid
        # target, which the host cannot see without waiting, makes the loss NaN.
        known = (label >= 0) & (label < classes)
        target_logit = tl.load(x_base + label, mask=known, other=float("nan")).to(tl.float32)
        picked, _picked_slope = _prepare(target_logit, bias, label, known, softcap, tau, STABLEMAX, SOFTCAP)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        for first in range(0, classes, BLOCK):
            inside = first + column < classes
            value = tl.load(x_base + first + column, mask=inside, other=0.0).to(tl.float32)
            value, _slope = _prepare(value, bias, first + column, inside, softcap, tau, STABLEMAX, SOFTCAP)
            value = tl.where(inside, value, float("-inf"))
            new_top = tl.maximum(top, value)
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights *= _weight(top, finite, None, column, inside, tau, STABLEMAX)
            weights += _weight(value, finite, log_count, first + column, inside, tau, STABLEMAX)
            top = new_top
        row_top = tl.max(top, 0)
        # a row of only -inf has the sum 0, and a row with a NaN has the sum NaN
        finite_top = tl.where(row_top == float("-inf"), 0.0, row_top)
        row_total = tl.sum(
            weights * _weight(top, finite_top, None, column, column < classes, tau, STABLEMAX), 0
        )
        tl.store(largest + row, row_top)
        tl.store(total + row, row_total)
        if STABLEMAX:
            below = _symlog(row_top) - _symlog(picked)
        else:
            below = (row_top - picked) / tau
        row_loss = row_own * below + row_mass * tl.log(row_total)
    else:
        row_top = tl.load(largest + row)
        row_total = tl.load(total + row)
    spread = 0.0  # the derivative of z_loss * lse^2 with respect to lse
    log_top = _symlog(row_top) if STABLEMAX else row_top / tau
    if Z_LOSS:
        row_lse = log_top + tl.log(row_total)
        spread = 2.0 * z_loss * row_lse
        if STATISTICS:
            row_loss += row_mass * z_loss * row_lse * row_lse
    if STATISTICS:
        tl.store(loss + row, row_loss)
    if GRADIENT:
        upstream = tl.load(grad + row).to(tl.float32)
        target_part = row_own * upstream
        # the sum of a softmax's gradients over the classes, apart from the difference of the row's mass and own factor
        excess = spread * row_mass * upstream
        if shares is not None:
            excess += tl.load(shares + 3 * row + 2)
        factor = (row_mass * upstream + excess) / row_total
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, classes, BLOCK):
            inside = first + column < classes
            value = tl.load(x_base + first + column, mask=inside, other=0.0).to(tl.float32)
            value, slope = _prepare(value, bias, first + column, inside, softcap, tau, STABLEMAX, SOFTCAP)
            g = _weight(value, row_top, log_count, first + column, inside, tau, STABLEMAX) * factor
            g = tl.where(first + column == label, g - target_part, g)
            # For softmax use distances to the largest logit, which are small where g is large.
            if STABLEMAX:
                g = g / (1.0 + tl.abs(value))
                by_tau = value
            else:
                by_tau = (value - row_top) / tau
            products += tl.where(inside & (g != 0.0), g * by_tau, 0.0)
            tl.store(out_base + first + column, (g / tau * slope).to(out.dtype.element_ty), mask=inside)
        if grad_temperature is not None:
            product = tl.sum(products, 0)
            if (Z_LOSS or shares is not None) and not STABLEMAX:
                product += excess * log_top
            tl.store(grad_temperature + row, -product / tau)


def refusal(*args) -> str | None:
    return _triton.refusal(*(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()))


def refusal_linear(
    h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing, *_
) -> str | None:
    reason = unserved(target, transform, softcap, label_smoothing)
    return reason or refusal(h, weight, bias, temperature, class_weight)


def refusal_linear_backward(grad, grad_lse, *members) -> str | None:
    return refusal_linear(*members[:6], *members[7:])


def _choose(t: torch.Tensor, classes: int) -> tuning.Choice:
    return tuning.lookup(
        "vocab_rows",
        "triton",
        structural={"dtype": str(t.dtype).removeprefix("torch.")},
        sizes={"rows": max(1, t.shape[0]), "classes": classes},
        device=_triton.target(t.device),
    )


def configure(h, weight, *_) -> tuning.Choice:
    return _choose(h, weight.shape[0])


def configure_rows(*args) -> tuning.Choice:
    logits = next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2)
    return _choose(logits, logits.shape[1])


def row_kernel(
    x, target, *, out=None, bias=None, log_count=None, temperature=None, shares=None, grad=None, loss=None,
    largest=None, total=None, grad_temperature=None, stablemax=False, softcap=0.0, z_loss=0.0, ignore_index=-100,
):  # fmt: skip
    config = _choose(x, x.shape[1]).values
    _triton.launch(
        _vocab_rows_kernel, (x.shape[0],),
        x, x if out is None else out, bias, log_count, target, temperature, shares, grad, loss, largest, total,
        grad_temperature, x.stride(0), (x if out is None else out).stride(0), x.shape[1], float(softcap), float(z_loss), ignore_index,
        STABLEMAX=stablemax, SOFTCAP=bool(softcap), Z_LOSS=bool(z_loss), STATISTICS=loss is not None,
        GRADIENT=grad is not None, BLOCK=min(config["block"], _triton.block(x.shape[1])), num_warps=config["num_warps"],
    )  # fmt: skip


def linear_cross_entropy(h, weight, *args):
    return chunked.linear_cross_entropy(
        row_kernel, configure(h, weight).values["chunk_mib"], h, weight, *args
    )


def linear_cross_entropy_backward(grad, grad_lse, h, weight, *args):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.linear_cross_entropy_backward(row_kernel, mib, grad, grad_lse, h, weight, *args)


def stablemax_cross_entropy(logits, target, ignore_index):
    loss, statistics = chunked.empty_statistics(logits)
    logits = _triton.last_dim_contiguous(logits)
    row_kernel(
        logits,
        target.contiguous(),
        loss=loss,
        largest=statistics[0],
        total=statistics[1],
        stablemax=True,
        ignore_index=ignore_index,
    )
    return loss, statistics


def stablemax_cross_entropy_backward(grad_out, logits, statistics, target, ignore_index):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = _triton.last_dim_contiguous(logits)
    row_kernel(
        logits,
        target.contiguous(),
        out=out,
        grad=grad_out.contiguous(),
        largest=statistics[0],
        total=statistics[1],
        stablemax=True,
        ignore_index=ignore_index,
    )
    return out
