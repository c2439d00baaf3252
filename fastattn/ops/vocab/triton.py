"""Losses over dense logits in Triton: the row kernel between the products of chunked.py."""

import torch
import triton
import triton.language as tl

from ... import _config, _triton
from ..._triton import offset
from . import (
    chunked,
    tuning_triton,  # noqa: F401  declares what is looked up
)


@triton.jit
def _transform(x, bias, at, inside, softcap, tau, BIASED: tl.constexpr, SOFTCAP: tl.constexpr):
    """(logit with bias, softcap and temperature, the softcap's slope)."""
    if BIASED:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        bend = 2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0  # tanh
        x = softcap * bend
        slope = 1.0 - bend * bend
    return x / tau, slope


@triton.jit
def _symlog(x):
    """The logarithm of StableMax's weight."""
    magnitude = tl.log(1.0 + tl.abs(x))
    return tl.where(x >= 0, magnitude, -magnitude)


@triton.jit
def _vocab_rows_kernel(
    x, out, bias, target, temperature, grad, loss, lse, grad_temperature,
    x_row, out_row, classes, softcap, z_loss, ignore_index,
    STABLEMAX: tl.constexpr, SOFTCAP: tl.constexpr, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits: its loss and log-sum-exp (STATISTICS), and the loss's gradient (GRADIENT), perhaps in place."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    label = tl.load(target + row)
    tau = tl.full([], 1.0, tl.float32)
    if temperature is not None:
        tau = tl.load(temperature + row).to(tl.float32)
    x_base = x + offset(row, x_row)
    out_base = out + offset(row, out_row)
    if label == ignore_index:
        if STATISTICS:
            tl.store(loss + row, 0.0)
            tl.store(lse + row, 0.0)
        if GRADIENT:
            for first in range(0, classes, BLOCK):
                tl.store(
                    out_base + first + at, tl.zeros([BLOCK], out.dtype.element_ty), mask=first + at < classes
                )
            if grad_temperature is not None:
                tl.store(grad_temperature + row, 0.0)
        return
    if STATISTICS:
        # The target's logit is read before the sums below, and so before any thread writes a gradient over it. A target
        # of no class, which the host cannot see without waiting, makes the loss NaN.
        known = (label >= 0) & (label < classes)
        picked, _picked_slope = _transform(
            tl.load(x_base + label, mask=known, other=float("nan")).to(tl.float32),
            bias,
            label,
            known,
            softcap,
            tau,
            bias is not None,
            SOFTCAP,
        )
        if STABLEMAX:
            picked = _symlog(picked)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, classes, BLOCK):
            inside = first + at < classes
            value, _slope = _transform(
                tl.load(x_base + first + at, mask=inside, other=0.0).to(tl.float32), bias, first + at, inside, softcap,
                tau, bias is not None, SOFTCAP,
            )  # fmt: skip
            if STABLEMAX:
                # A sum of weights at least 0: no maximum is needed.
                total += tl.where(inside, tl.where(value >= 0, value + 1.0, 1.0 / (1.0 + tl.abs(value))), 0.0)
            else:
                value = tl.where(inside, value, float("-inf"))
                new_top = tl.maximum(top, value)
                finite = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp(top - finite) + tl.exp(value - finite)
                top = new_top
        if STABLEMAX:
            row_lse = tl.log(tl.sum(total, 0))
        else:
            row_top = tl.max(top, 0)
            row_lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
        tl.store(lse + row, row_lse)
        tl.store(loss + row, row_lse - picked + z_loss * row_lse * row_lse)
    else:
        row_lse = tl.load(lse + row)
    if GRADIENT:
        upstream = tl.load(grad + row).to(tl.float32)
        factor = (1.0 + 2.0 * z_loss * row_lse) * upstream
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, classes, BLOCK):
            inside = first + at < classes
            value, slope = _transform(
                tl.load(x_base + first + at, mask=inside, other=0.0).to(tl.float32), bias, first + at, inside, softcap,
                tau, bias is not None, SOFTCAP,
            )  # fmt: skip
            if STABLEMAX:
                g = tl.exp(_symlog(value) - row_lse) * factor
            else:
                g = tl.exp(value - row_lse) * factor
            g = tl.where(first + at == label, g - upstream, g)
            if STABLEMAX:
                g = g / (1.0 + tl.abs(value))
            products += tl.where(inside, g * value, 0.0)
            tl.store(out_base + first + at, (g / tau * slope).to(out.dtype.element_ty), mask=inside)
        if grad_temperature is not None:
            tl.store(grad_temperature + row, -tl.sum(products, 0) / tau)


def refusal(*args) -> str | None:
    return _triton.refusal(*(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()))


def _choose(t: torch.Tensor, classes: int) -> _config.Choice:
    return _config.lookup(
        "vocab_rows",
        "triton",
        structural={"dtype": str(t.dtype).removeprefix("torch.")},
        sizes={"rows": max(1, t.shape[0]), "classes": classes},
        device=_triton.target(t.device),
    )


def configure(h, weight, *_) -> _config.Choice:
    return _choose(h, weight.shape[0])


def configure_rows(*args) -> _config.Choice:
    logits = next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2)
    return _choose(logits, logits.shape[1])


def row_kernel(
    x, target, *, out=None, bias=None, temperature=None, grad=None, loss=None, lse=None, grad_temperature=None,
    stablemax=False, softcap=0.0, z_loss=0.0, ignore_index=-100,
):  # fmt: skip
    config = _choose(x, x.shape[1]).values
    _triton.launch(
        _vocab_rows_kernel, (x.shape[0],),
        x, x if out is None else out, bias, target, temperature, grad, loss, lse, grad_temperature,
        x.stride(0), (x if out is None else out).stride(0), x.shape[1], float(softcap), float(z_loss), ignore_index,
        STABLEMAX=stablemax, SOFTCAP=bool(softcap), STATISTICS=loss is not None, GRADIENT=grad is not None,
        BLOCK=min(config["block"], _triton.block(x.shape[1])), num_warps=config["num_warps"],
    )  # fmt: skip


def linear_cross_entropy(h, weight, *args):
    return chunked.linear_cross_entropy(
        row_kernel, configure(h, weight).values["chunk_mib"], h, weight, *args
    )


def linear_cross_entropy_backward(grad, h, weight, *args):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.linear_cross_entropy_backward(row_kernel, mib, grad, h, weight, *args)


def stablemax_cross_entropy(logits, target, ignore_index):
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse = torch.empty_like(loss)
    logits = _triton.last_dim_contiguous(logits)
    row_kernel(logits, target.contiguous(), loss=loss, lse=lse, stablemax=True, ignore_index=ignore_index)
    return loss, lse


def stablemax_cross_entropy_backward(grad, logits, target, lse, ignore_index):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = _triton.last_dim_contiguous(logits)
    row_kernel(
        logits,
        target.contiguous(),
        out=out,
        grad=grad.contiguous(),
        lse=lse,
        stablemax=True,
        ignore_index=ignore_index,
    )
    return out
