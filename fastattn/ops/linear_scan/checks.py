"""The checks of linear_scan's arguments, run for every caller."""

import torch

from ...runtime import checks
from .. import documents

_DTYPES = (*checks.FLOATING, torch.complex64, torch.complex128)


def _check_number(op: str, name: str, t: torch.Tensor) -> None:
    checks.check_tensor(op, name, t)
    if t.dtype not in _DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise TypeError(f"fastattn.{op}: {name} must be one of {allowed}, given {checks.describe(t)}")


def _check(op: str, a, initial, cu_seqlens, name: str, tokens) -> None:
    """tokens: b, or a tensor of b's shape and dtype."""
    _check_number(op, name, tokens)
    if tokens.dim() < 2:
        raise ValueError(f"fastattn.{op}: {name} must be (..., L, D), given {checks.describe(tokens)}")
    for other, t in (("a", a), ("initial", initial)):
        if t is None and other == "initial":
            continue
        _check_number(op, other, t)
        checks.check_parameter(op, other, t, name, tokens)
    checks.check_same_device(op, **{"a": a, name: tokens, "initial": initial})
    shape = tuple(tokens.shape)
    if a.dim() > len(shape) or not checks.broadcasts((1,) * (len(shape) - a.dim()) + tuple(a.shape), shape):
        raise ValueError(
            f"fastattn.{op}: a must broadcast to {name}'s shape {shape}, given {checks.describe(a)}"
        )
    state_shape = (*shape[:-2], shape[-1])
    if cu_seqlens is not None:
        if len(shape) > 3:
            raise ValueError(
                f"fastattn.{op}: cu_seqlens needs {name} of (1, L, D) or (L, D), given {checks.describe(tokens)}"
            )
        batch = shape[0] if len(shape) == 3 else 1
        state_shape = (documents.check_offsets(op, name, tokens, batch, cu_seqlens), shape[-1])
    if initial is not None:
        checks.check_shape(op, "initial", initial, state_shape, "one row for each sequence")


def check_linear_scan(a, b, initial, cu_seqlens, reverse, log_a) -> None:
    _check("linear_scan", a, initial, cu_seqlens, "b", b)


def check_linear_scan_backward(grad_out, a, initial, out, cu_seqlens, reverse, log_a, wanted) -> None:
    op = "linear_scan_backward"
    _check(op, a, initial, cu_seqlens, "out", out)
    checks.check_like(op, "grad_out", grad_out, "out", out)


def check_contents(a, b, initial, cu_seqlens, reverse, log_a) -> None:
    documents.check_offsets_contents("linear_scan", b.shape[-2], cu_seqlens)


def check_backward_contents(grad_out, a, initial, out, cu_seqlens, reverse, log_a, wanted) -> None:
    documents.check_offsets_contents("linear_scan_backward", out.shape[-2], cu_seqlens)
