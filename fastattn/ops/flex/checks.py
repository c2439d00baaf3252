"""What the ops of flex_attention ask of their arguments, whoever calls them."""

import torch

from ... import masks
from ...runtime import checks
from ..attention.checks import check_qkv, check_results, check_scale
from ..attention.scores import SCORES, has_residual
from .prepare import TILE
from .program import sections

WANTS_TABLES = 1  # the bit of `wanted`
_SOFTMAX = SCORES["softmax"].code


def _check(op: str, q, k, v, tables, indices, program, classes, scale, mask) -> None:
    check_qkv(op, q, k, v)
    check_scale(op, scale)
    wide = checks.statistics_dtype(q)
    for name, t, dtype in (
        ("tables", tables, wide),
        ("indices", indices, torch.int32),
        ("program", program, torch.int64),
    ):
        if t is None and name != "program":
            continue
        checks.check_tensor(op, name, t, dims=1)
        if t.dtype != dtype:
            raise TypeError(
                f"fastattn.{op}: {name} must be {str(dtype).removeprefix('torch.')}, given {checks.describe(t)}"
            )
    checks.check_same_device(op, q=q, tables=tables, indices=indices, classes=classes)
    if program.device.type != "cpu" and program.device.type != "meta":
        raise ValueError(f"fastattn.{op}: program must be on the CPU, given {program.device}")
    if classes is not None:
        checks.check_tensor(op, "classes", classes, dims=4)
        tiles = (*q.shape[:2], -(-q.shape[2] // TILE), -(-k.shape[2] // TILE))
        if (
            classes.dtype != torch.uint8
            or tuple(classes.shape[2:]) != tiles[2:]
            or not checks.broadcasts(tuple(classes.shape), tiles)
        ):
            raise ValueError(
                f"fastattn.{op}: classes must be uint8 (B or 1, Hq or 1, tiles, tiles) of {TILE} rows and keys, {tiles} here, "
                f"given {checks.describe(classes)}"
            )
    masks.check_args(op, q, k, mask)


def check_flex(*members) -> None:
    _check("flex_attention", *members)


def check_program(q, k, v, tables, indices, program, classes, scale, mask) -> None:
    _read("flex_attention", program)


def check_program_backward(
    grad_out, grad_lse, q, k, v, tables, out, lse, state, residual, indices, program, classes, scale, mask, wanted
) -> None:  # fmt: skip
    _read("flex_attention_backward", program)


def has_rest(dtype: torch.dtype, normalised: bool) -> bool:
    """Whether score_attention keeps what rounding took from its output, which its backward reads."""
    return normalised and dtype in (torch.bfloat16, torch.float16)


def check_score_attention(q, k, v, tables, indices, program, normalised, scale, mask) -> None:
    _check("score_attention", q, k, v, tables, indices, program, None, scale, mask)


def check_row_maximum(q, k, tables, indices, program, scale, mask) -> None:
    _check("row_maximum", q, k, k, tables, indices, program, None, scale, mask)


def check_extremes(q, k, tables, indices, program, scale, mask) -> None:
    _read("row_maximum", program)


def check_weights(q, k, v, tables, indices, program, normalised, scale, mask) -> None:
    _read("score_attention", program)


def check_weights_backward(
    grad_out, q, k, v, tables, out, total, residual, indices, program, normalised, scale, mask, wanted
) -> None:  # fmt: skip
    _read("score_attention_backward", program)


def check_score_attention_backward(
    grad_out, q, k, v, tables, out, total, residual, indices, program, normalised, scale, mask, wanted
) -> None:  # fmt: skip
    op = "score_attention_backward"
    _check(op, q, k, v, tables, indices, program, None, scale, mask)
    check_results(op, grad_out, q, v, out, total, "total", tuple(q.shape[:3]) if normalised else (0,))
    of_out = out.shape if has_rest(q.dtype, normalised) else (0,)
    checks.check_exact(op, "residual", residual, of_out, q.dtype, q.device, "as the forward gives it")
    _check_wanted(op, tables, wanted)


def _check_wanted(op: str, tables: torch.Tensor | None, wanted: int) -> None:
    if wanted & WANTS_TABLES and tables is None:
        raise ValueError(f"fastattn.{op}: wanted asks for the gradient of tables, given None")


def _read(op: str, program: torch.Tensor) -> None:
    if checks.has_contents(program):
        try:
            sections(program)
        except ValueError as error:
            raise ValueError(f"fastattn.{op}: {error}") from None


def check_flex_backward(
    grad_out, grad_lse, q, k, v, tables, out, lse, state, residual, indices, program, classes, scale, mask, wanted
) -> None:  # fmt: skip
    op = "flex_attention_backward"
    _check(op, q, k, v, tables, indices, program, classes, scale, mask)
    rows = tuple(q.shape[:3])
    check_results(op, grad_out, q, v, out, lse, "lse", rows)
    dtype = checks.statistics_dtype(q)
    checks.check_exact(op, "state", state, (*rows, 2), dtype, q.device, "as the forward gives it")
    of_out = out.shape if has_residual(q.dtype, _SOFTMAX) else (0,)
    checks.check_exact(op, "residual", residual, of_out, q.dtype, q.device, "as the forward gives it")
    if grad_lse is not None:
        checks.check_like(op, "grad_lse", grad_lse, "lse", lse)
    _check_wanted(op, tables, wanted)
