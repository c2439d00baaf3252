"""Checks and small conversions that the vocabulary ops share."""

import torch

from ... import _checks

REDUCTIONS = ("none", "sum", "mean")


def statistics_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def check_rows(op: str, name: str, t: torch.Tensor, columns: int | None = None) -> None:
    """(..., d) with d of 1 or more, and `columns` when given."""
    _checks.check_tensor(op, name, t)
    if t.dim() < 1 or t.shape[-1] < 1:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of 1 or more, given {_checks.describe(t)}"
        )
    if columns is not None and t.shape[-1] != columns:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of {columns}, given {_checks.describe(t)}"
        )


def check_matrix(op: str, name: str, t: torch.Tensor, rows: str) -> None:
    """(rows, d), neither empty."""
    _checks.check_tensor(op, name, t, dims=2)
    if t.shape[0] < 1 or t.shape[1] < 1:
        raise ValueError(f"fastattn.{op}: {name} must be ({rows}, d), none 0, given {_checks.describe(t)}")


def check_wide(op: str, name: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """Of like's dtype or float32, which a low-precision op may take for a term that needs it."""
    _checks.check_tensor(op, name, t)
    if t.dtype != like.dtype and not (t.dtype == torch.float32 and like.dtype != torch.float64):
        wanted = str(like.dtype).removeprefix("torch.")
        allowed = wanted if like.dtype in (torch.float32, torch.float64) else f"{wanted} or float32"
        raise TypeError(f"fastattn.{op}: {name} must be {allowed}, given {_checks.describe(t)}")


def check_positive_values(op: str, name: str, t: torch.Tensor) -> None:
    """Contents of a tensor on the CPU are more than zero. Skipped while tracing, where there are none."""
    if _checks.traced() or t.device.type != "cpu" or t.numel() == 0:
        return
    if torch._subclasses.fake_tensor.is_fake(t):
        return
    if not bool((t > 0).all()):
        raise ValueError(f"fastattn.{op}: {name} must be more than zero everywhere, given {t.min().item()!r}")


def check_target(op: str, target: torch.Tensor, shape: tuple, ignore_index: int) -> None:
    """Everything but the contents, which the implementations check: they see them when compiled too."""
    _checks.check_integer(op, "target", target)
    _checks.check_shape(op, "target", target, shape, "one class a row")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"fastattn.{op}: ignore_index must be an int, given {_checks.describe(ignore_index)}")


def check_targets(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    _checks.check_range(op, "target", target, 0, classes, also=ignore_index)


def check_codes(op: str, codes: torch.Tensor, count: int) -> None:
    if codes.device.type == "cpu":
        low, high = torch.aminmax(codes)
        if low < 0 or high >= count:  # then once more, for the message
            _checks.check_range(op, "codes", codes, 0, count)


def inverse(temperature: float) -> float:
    """1 / temperature among float32's normal numbers: one that is 0 or infinite makes NaN of an infinity or a 0."""
    return min(max(1 / temperature, 2.0**-126), 2.0**126)


def needed(*tensors: torch.Tensor | None) -> int:
    """A bit for each tensor that wants a gradient of this call."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.requires_grad)
