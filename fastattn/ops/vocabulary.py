"""Checks and gradients shared by the ops over a vocabulary, with dense logits or with codebooks. Rows are (N, d) here; public
functions take (..., d)."""

import torch

from ..runtime import checks
from ..runtime.checks import statistics_dtype
from ..runtime.declare import gradient_like

REDUCTIONS = ("none", "sum", "mean")


def inverse(temperature: float) -> float:
    """1 / temperature, clamped to float32's normal numbers: a factor of 0 or infinity would turn an infinite or zero logit into NaN."""
    return min(max(1 / temperature, 2.0**-126), 2.0**126)


def needed(*tensors: torch.Tensor | None) -> int:
    """A bit mask of the tensors that need a gradient of this call."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.requires_grad)


# --- checks of arguments ---------------------------------------------------------------------------------------------


def check_rows(op: str, name: str, t: torch.Tensor, columns: int | None = None) -> None:
    """t is floating, (..., d), with d of 1 or more, or equal to `columns` when given."""
    checks.check_floating(op, **{name: t})
    if t.dim() < 1 or t.shape[-1] < 1:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of 1 or more, given {checks.describe(t)}"
        )
    if columns is not None and t.shape[-1] != columns:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of {columns}, given {checks.describe(t)}"
        )


def check_matrix(op: str, name: str, t: torch.Tensor, rows: str) -> None:
    """t is (rows, d), with neither size 0."""
    checks.check_tensor(op, name, t, dims=2)
    if t.shape[0] < 1 or t.shape[1] < 1:
        raise ValueError(
            f"fastattn.{op}: {name} must be ({rows}, d), both above 0, given {checks.describe(t)}"
        )


def check_wide(op: str, name: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """t has the dtype of `like`; beside a 16-bit `like` it may also be float32, for terms that need the precision."""
    checks.check_tensor(op, name, t)
    if t.dtype != like.dtype and not (t.dtype == torch.float32 and like.dtype != torch.float64):
        dtype = str(like.dtype).removeprefix("torch.")
        allowed = dtype if like.dtype in (torch.float32, torch.float64) else f"{dtype} or float32"
        raise TypeError(f"fastattn.{op}: {name} must be {allowed}, given {checks.describe(t)}")


def check_target(op: str, target: torch.Tensor, shape: tuple[int, ...], ignore_index: int) -> None:
    """Checks all of target but its elements."""
    checks.check_integer(op, "target", target)
    checks.check_shape(op, "target", target, shape, "one class a row")
    if checks.as_integer(ignore_index) is None:
        raise TypeError(f"fastattn.{op}: ignore_index must be an int, given {checks.describe(ignore_index)}")


def check_products(op: str, name: str, rows: torch.Tensor, of: str, matrix: torch.Tensor, size: str) -> None:
    """`rows` (N, d) and `matrix` (size, d) can be multiplied."""
    checks.check_tensor(op, name, rows, dims=2)
    check_matrix(op, of, matrix, size)
    check_rows(op, name, rows, matrix.shape[1])
    checks.check_floating(op, **{name: rows, of: matrix})


def check_by_token(op: str, name: str, t: torch.Tensor | None, shape: tuple[int, ...], h, why: str) -> None:
    if t is not None:
        check_wide(op, name, t, h)
        checks.check_shape(op, name, t, shape, why)
        checks.check_same_device(op, h=h, **{name: t})


def check_wanted(op: str, name: str, wanted: int, tensors: tuple) -> None:
    """`wanted` has bits only of tensors that are not None."""
    allowed = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    if not 0 <= wanted < 1 << len(tensors) or wanted & ~allowed:
        raise ValueError(
            f"fastattn.{op}: {name} must be a sum of bits of {allowed}, the tensors that are not None, given {wanted}"
        )


def check_loss(op: str, target, h, ignore_index, reduction) -> None:
    check_target(op, target, (h.shape[0],), ignore_index)
    checks.check_same_device(op, h=h, target=target)
    checks.check_choice(op, "reduction", reduction, REDUCTIONS)


def check_loss_gradient(op: str, grad, statistics, h, reduction: str, name: str = "grad") -> None:
    dtype, rows = checks.statistics_dtype(h), h.shape[0]
    shape = (rows,) if reduction == "none" else ()
    checks.check_exact(op, name, grad, shape, dtype, h.device, "the loss's")
    checks.check_exact(op, "statistics", statistics, (2, rows), dtype, h.device, "two a row")


def check_targets(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    checks.check_range(op, "target", target, 0, classes, also=ignore_index)


# --- results and gradients -------------------------------------------------------------------------------------------


def gradients_like(tensors: tuple, wanted: int) -> tuple[torch.Tensor, ...]:
    """An empty gradient for each tensor whose bit is set, (0,) for the others."""
    first = next(t for t in tensors if t is not None)
    return tuple(gradient_like(t, first, wanted >> i & 1) for i, t in enumerate(tensors))


def fake_statistics(rows: torch.Tensor, reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty loss, and the statistics (2, N) that the backward needs: each row's largest logit, and the sum of its weights relative
    to that logit's. Their log-sum-exp alone would be rounded at the logits' magnitude."""
    statistics = rows.new_empty(2, rows.shape[0], dtype=statistics_dtype(rows))
    return statistics.new_empty(rows.shape[:1] if reduction == "none" else ()), statistics


def selected(gradients: tuple[torch.Tensor | None, ...], wanted: int, like: torch.Tensor) -> tuple:
    """The gradients whose bit is set, (0,) for the others."""
    return tuple(
        g if wanted >> i & 1 and g is not None else like.new_empty(0) for i, g in enumerate(gradients)
    )


def saved_or_recomputed(
    wanted: int, saved_bits: int, grad: torch.Tensor, saved: tuple, recompute
) -> list[torch.Tensor | None]:
    """Gradients of the inputs whose bit is set: those that the forward saved, times `grad`, or else recompute(wanted)."""
    if wanted & ~saved_bits:
        gradients = recompute(wanted)
    else:
        # a scalar `grad` does not change the dtype of s and is not rounded to it
        gradients = [s * grad if wanted >> i & 1 else None for i, s in enumerate(saved)]
    return [g if wanted >> i & 1 else None for i, g in enumerate(gradients)]
