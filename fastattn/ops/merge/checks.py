"""What merging asks of its arguments, whoever calls it."""

import torch

from ...runtime import checks


def _check(op: str, outs, lses, sink) -> None:
    checks.check_floating(op, outs=outs)
    if outs.dim() < 2 or not outs.shape[0]:
        raise ValueError(
            f"fastattn.{op}: outs must be (parts, ..., D) of one part at least, given {checks.describe(outs)}"
        )
    checks.check_exact(
        op,
        "lses",
        lses,
        tuple(outs.shape[:-1]),
        checks.statistics_dtype(outs),
        outs.device,
        "(parts, ...), outs without D",
    )
    if sink is not None:
        if outs.dim() < 4:
            raise ValueError(
                f"fastattn.{op}: sink needs parts of heads, (..., H, L, D), given {checks.describe(outs)}"
            )
        checks.check_tensor(op, "sink", sink, dims=1)
        if sink.shape[0] != outs.shape[-3] or sink.dtype not in (outs.dtype, torch.float32):
            raise ValueError(
                f"fastattn.{op}: sink must be float32 or of the parts' dtype, one for each of {outs.shape[-3]} heads, "
                f"given {checks.describe(sink)}"
            )
        checks.check_same_device(op, outs=outs, sink=sink)


def check_merge(outs, lses, sink) -> None:
    _check("merge", outs, lses, sink)


def check_merge_backward(grad_out, grad_lse, outs, lses, sink, wanted) -> None:
    op = "merge_backward"
    _check(op, outs, lses, sink)
    if grad_out is not None:
        checks.check_exact(op, "grad_out", grad_out, tuple(outs.shape[1:]), outs.dtype, outs.device, "out's")
    if grad_lse is not None:
        checks.check_exact(op, "grad_lse", grad_lse, tuple(lses.shape[1:]), lses.dtype, lses.device, "lse's")
