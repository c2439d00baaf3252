"""The checks of the row-wise ops' arguments, run for every caller."""

import math

import torch

from ...runtime import checks
from ...runtime.registry import refuse_gradients

# --- rms_norm --------------------------------------------------------------------------------------------------------


def _check_rows(op: str, name: str, x: torch.Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of 1 or more, given {checks.describe(x)}"
        )


def _check_weight(op: str, weight: torch.Tensor | None, x: torch.Tensor) -> None:
    if weight is not None:
        checks.check_floating(op, weight=weight)
        checks.check_shape(op, "weight", weight, (x.shape[-1],), "x's last dim")
        checks.check_same_device(op, x=x, weight=weight)


def _check_number(op: str, name: str, value) -> None:
    if not math.isfinite(checks.as_number(op, name, value)):
        raise ValueError(f"fastattn.{op}: {name} must be finite, given {value!r}")


def check_rms_norm(x, residual, weight, eps, weight_offset) -> None:
    op = "rms_norm"
    if (  # the checks below for the most common calls, as one fast condition
        isinstance(x, torch.Tensor)
        and x.dtype in checks.FLOATING
        and (
            residual is None
            or (
                isinstance(residual, torch.Tensor)
                and residual.dtype is x.dtype
                and residual.layout is torch.strided
                and not residual.is_nested
                and residual.device == x.device
                and residual.shape == x.shape
            )
        )
        and x.dim()
        and x.shape[-1]
        and (
            weight is None
            or (
                isinstance(weight, torch.Tensor)
                and weight.dtype is x.dtype
                and weight.device == x.device
                and weight.shape == x.shape[-1:]
            )
        )
        and type(eps) is float
        and 0 <= eps < math.inf
        and weight_offset == 0
    ):
        return
    checks.check_floating(op, x=x)
    _check_rows(op, "x", x)
    if residual is not None:
        checks.check_floating(op, residual=residual)
        checks.check_shape(op, "residual", residual, x.shape, "x's")
        checks.check_same_device(op, x=x, residual=residual)
    _check_weight(op, weight, x)
    checks.check_positive(op, "eps", eps, zero=True)
    _check_number(op, "weight_offset", weight_offset)


def check_rms_norm_backward(grad_normed, grad_total, total, weight, rstd, eps, weight_offset) -> None:
    op = "rms_norm_backward"
    checks.check_floating(op, total=total)
    _check_rows(op, "total", total)
    checks.check_floating(op, grad_normed=grad_normed)
    checks.check_shape(op, "grad_normed", grad_normed, total.shape, "total's")
    checks.check_same_device(op, total=total, grad_normed=grad_normed)
    if grad_total is not None:
        checks.check_like(op, "grad_total", grad_total, "total", total)
    _check_weight(op, weight, total)
    statistics = checks.statistics_dtype(total)
    checks.check_exact(op, "rstd", rstd, total.shape[:-1], statistics, total.device, "one a row of total")
    checks.check_positive(op, "eps", eps, zero=True)
    _check_number(op, "weight_offset", weight_offset)


# --- swiglu, gated ---------------------------------------------------------------------------------------------------


def _check_gate_up(op: str, gate_up: torch.Tensor) -> None:
    checks.check_floating(op, gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"fastattn.{op}: gate_up must have an even last dim, for gate and up, given {checks.describe(gate_up)}"
        )


def check_swiglu(gate_up) -> None:
    _check_gate_up("swiglu", gate_up)


def check_swiglu_backward(grad_out, gate_up) -> None:
    op = "swiglu_backward"
    _check_gate_up(op, gate_up)
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    checks.check_exact(op, "grad_out", grad_out, shape, gate_up.dtype, gate_up.device, "half of gate_up")


def _check_gated(op: str, x: torch.Tensor, gate: torch.Tensor) -> None:
    checks.check_floating(op, x=x, gate=gate)
    if x.dim() == 0:
        raise ValueError(f"fastattn.{op}: x must have a last dim, given {checks.describe(x)}")
    checks.check_shape(op, "gate", gate, x.shape, "x's")


def check_gated(x, gate) -> None:
    _check_gated("gated", x, gate)


def check_gated_backward(grad_out, x, gate) -> None:
    op = "gated_backward"
    _check_gated(op, x, gate)
    checks.check_like(op, "grad_out", grad_out, "x", x)


# --- rotary ----------------------------------------------------------------------------------------------------------


def _check_rotated(op: str, q, k) -> None:
    for name, t in (("q", q), ("k", k)):
        checks.check_tensor(op, name, t, dims=4)
    checks.check_floating(op, q=q, k=k)
    if (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(
            f"fastattn.{op}: k must have q's batch, length and head dim, given q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if q.shape[3] % 2:
        raise ValueError(f"fastattn.{op}: q must have an even head dim, given {q.shape[3]}")


def _check_rotary(op: str, q, k, positions, theta) -> None:
    _check_rotated(op, q, k)
    checks.check_integer(op, "positions", positions, dims=(1, 2))
    checks.check_same_device(op, q=q, positions=positions)
    shape = (q.shape[2],) if positions.dim() == 1 else (q.shape[0], q.shape[2])
    checks.check_shape(op, "positions", positions, shape, "(L,), (1, L) or (B, L)")
    checks.check_positive(op, "theta", theta)


def check_rotary(q, k, positions, theta, interleaved, inverse) -> None:
    _check_rotary("rotary", q, k, positions, theta)


def check_rotary_tables(q, k, cos, sin, interleaved, inverse) -> None:
    op = "rotary_tables"
    _check_rotated(op, q, k)
    batch, _, length, head_dim = q.shape
    for name, t in (("cos", cos), ("sin", sin)):
        checks.check_tensor(op, name, t, dims=3)
        checks.check_floating(op, **{name: t})
        if (
            t.shape[1] != length
            or t.shape[0] not in (1, batch)
            or t.shape[2] not in (head_dim // 2, head_dim)
        ):
            raise ValueError(
                f"fastattn.{op}: {name} must be (B or 1, L, D or D/2), here ({batch} or 1, {length}, {head_dim} or "
                f"{head_dim // 2}), given {checks.describe(t)}"
            )
    checks.check_shape(op, "sin", sin, cos.shape, "cos's")
    checks.check_same_device(op, q=q, cos=cos, sin=sin)


def check_rotary_append(q, k, v, positions, slots, keys, values, theta) -> None:
    op = "rotary_append"
    _check_rotary(op, q, k, positions, theta)
    checks.check_tensor(op, "v", v, dims=4)
    checks.check_shape(op, "v", v, (*k.shape[:3], v.shape[3]), "k's heads and tokens")
    for name, cache, new in (("keys", keys, k), ("values", values, v)):
        checks.check_tensor(op, name, cache, dims=4)
        shape = (*new.shape[:2], cache.shape[2], new.shape[3])
        checks.check_shape(op, name, cache, shape, "batch, heads, capacity and head dim")
        checks.check_written(op, name, cache)
    checks.check_floating(op, q=q, k=k, v=v, keys=keys, values=values)
    checks.check_integer(op, "slots", slots, dims=2)
    checks.check_shape(op, "slots", slots, (q.shape[0], q.shape[2]), "(B, L)")
    checks.check_same_device(op, q=q, slots=slots)
    refuse_gradients(op, (q, k, v, keys, values))


def check_rotary_append_contents(q, k, v, positions, slots, keys, values, theta) -> None:
    capacity = min(keys.shape[2], values.shape[2])
    checks.check_range("rotary_append", "slots", slots, 0, capacity)
