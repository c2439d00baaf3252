"""What a loss of logits and its gradients may be off by in float32: each step in float64 with its own roundings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastattn import testing

U = testing.EPS32 / 2  # of one rounding
LOST = 2.0**-125  # what a product may lose below the normal numbers, and as much again in the sum


def products(h: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(products (N, K), what they may be off by) in float64."""
    width = h.shape[1]
    off = (width + 2) * U * (h.abs() @ rows.abs().T) + width * LOST * (1 + h.abs().amax(1, keepdim=True))
    return h @ rows.T, off


@dataclass
class Loss:
    """What a loss and its gradient by the logits z (rows, V) are, and what they may be off by."""

    loss: torch.Tensor
    loss_off: torch.Tensor
    dz: torch.Tensor
    dz_off: torch.Tensor
    dtemperature: torch.Tensor
    dtemperature_off: torch.Tensor


def loss_of(z, z_off, target, tau, *, stablemax=False, softcap=None, z_loss=0.0, terms=0) -> Loss:
    """Steps of a loss after its logits, each in float64 and with its error; `_off` where it says nothing more is infinite."""
    x, x_off, slope, slope_off = z, z_off, torch.ones_like(z), torch.zeros_like(z)
    if softcap is not None:
        bend = torch.tanh(z / softcap)
        x, x_off = softcap * bend, z_off + 8 * U * (softcap * bend).abs()
        slope = 1 - bend.square()
        slope_off = 2 * bend.abs() * (z_off / softcap + 8 * U) + (z_off / softcap + 8 * U).square() + 4 * U
    if stablemax:
        v, v_off = x / tau, x_off / tau + U * (x / tau).abs()
        y = torch.where(v >= 0, 1.0, -1.0) * torch.log1p(v.abs())
        near = v_off / (1 + v.abs() - v_off).clamp(min=1e-300)  # the largest slope on the way
        y_off = torch.where(v_off < 1 + v.abs(), near, math.inf) + 4 * U * y.abs()
    else:
        y, y_off = x / tau, x_off / tau
    top, place = y.max(1, keepdim=True)
    # of the largest that was found: any class that may have been it
    top_off = torch.where(y + y_off >= top - y_off.gather(1, place), y_off, 0.0).amax(1, keepdim=True)
    below = y - top
    below_off = torch.where(below == -math.inf, 0.0, y_off + top_off + 4 * U * below.abs())
    weights = below.exp()
    total = weights.sum(1, keepdim=True)
    weights_off = torch.where(weights == 0, 0.0, weights * (below_off.clamp(max=600).expm1() + 8 * U)) + 2e-38
    summed = 2 + (terms or z.shape[1]) / 2
    total_off = weights_off.sum(1, keepdim=True) / total + summed * 2 * U  # relative
    fit = total_off < 0.5
    log_off = torch.where(fit, -torch.log1p(-total_off.clamp(max=0.5)), math.inf) + 4 * U * total.log().abs()
    picked, picked_off = below.gather(1, target[:, None]), below_off.gather(1, target[:, None])
    loss = total.log() - picked
    loss_off = log_off + torch.where(picked == -math.inf, 0.0, picked_off) + 4 * U * loss.abs()
    lse = top + total.log()
    lse_off = top_off + log_off + 4 * U * (top.abs() + lse.abs())
    spread, spread_off = 2 * z_loss * lse, 2 * z_loss * lse_off + 4 * U * (2 * z_loss * lse).abs()
    if z_loss:
        loss_off = (
            loss_off + z_loss * (2 * lse.abs() * lse_off + lse_off.square()) + 8 * U * z_loss * lse.square()
        )
        loss = loss + z_loss * lse.square()
    else:
        spread, spread_off = torch.zeros_like(lse), torch.zeros_like(lse)
    one = F.one_hot(target, z.shape[1])
    p = weights / total
    p_off = torch.where(fit, (weights_off / total + p * total_off) / (1 - total_off.clamp(max=0.5)), math.inf)
    g = p * (1 + spread) - one
    g_off = p_off * (1 + spread.abs() + spread_off) + p * spread_off + 8 * U * (p * (1 + spread.abs()) + one)
    if stablemax:
        inner = 1 / (1 + v.abs())
        inner_off = inner * (torch.where(v_off < 1 + v.abs(), near, math.inf) + 4 * U)
        g, g_off = g * inner, g_off * (inner + inner_off) + g.abs() * inner_off
        by, by_off, extra, extra_off = v, v_off, 0.0, 0.0
    else:
        by, by_off, extra, extra_off = (
            below,
            below_off,
            spread * top,
            spread_off * top.abs() + spread.abs() * top_off,
        )
    heavy = g != 0
    by_tau = torch.where(heavy, g * by, 0.0)
    by_tau_off = torch.where(
        heavy, g_off * (by.abs() + by_off) + g.abs() * by_off + 2 * summed * U * by_tau.abs(), 0.0
    )
    dtau = -(by_tau.sum(1, keepdim=True) + extra) / tau
    dtau_off = (by_tau_off.sum(1, keepdim=True) + extra_off) / tau + 8 * U * dtau.abs()
    factor, factor_off = slope / tau, slope_off / tau + 4 * U * slope / tau
    dz = g * factor
    dz_off = g_off * (factor + factor_off) + g.abs() * factor_off
    return Loss(loss[:, 0], loss_off[:, 0], dz, dz_off, dtau[:, 0], dtau_off[:, 0])


def within(name: str, found: torch.Tensor, true: torch.Tensor, off: torch.Tensor) -> None:
    """Up to rounding to found's dtype, twice where a gradient was rounded before it was multiplied by the incoming one."""
    assert found.shape == true.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(true.shape)}"
    info = torch.finfo(found.dtype)
    wide = found.detach().double()
    off = off + info.eps * (true.abs() + 2 * info.smallest_normal)
    agrees = ((wide - true).abs() <= off) | (wide == true) | (wide.isnan() & true.isnan())
    agrees |= ~(off < math.inf)  # nothing is known
    agrees |= (true.abs() + off > info.max) & ~wide.isnan()  # beyond the dtype, or close to its end
    if not bool(agrees.all()):
        worst = int((~agrees).flatten().nonzero()[0])
        figures = [float(t.expand_as(wide).flatten()[worst]) for t in (wide, true, off)]
        bad = int((~agrees).sum())
        raise AssertionError(
            f"{name}: {bad} of {agrees.numel()} beyond their bound, at {worst} found {figures[0]!r}, true {figures[1]!r}, "
            f"within {figures[2]!r}"
        )
