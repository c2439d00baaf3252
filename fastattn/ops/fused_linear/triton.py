"""Fused products in Triton: one tile kernel that includes the norm or gate, SwiGLU and the sum, or torch's product between row
kernels."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning
from ...runtime.triton import Line, Rows, dot, offset
from ..rowwise import triton as rows
from . import (
    library,
    tuning_triton,  # noqa: F401  declares what is looked up
)

_BAND = tl.constexpr(8)  # tiles of rows that pass over the columns together, so that both operands stay in L2


@triton.jit
def _fused_linear_kernel(
    x, gate, weight, residual, out, product, rstd, length, rows, columns, inner, eps, HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile (M, N) of residual + act(pre(x) W^T). x and gate are (B, L, H, D); without a gate H is 1.

    The norm's factor is one number for each row, so it is applied after the product; the loop sums the squares for it.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    band = program // (column_tiles * _BAND)
    height = tl.minimum(row_tiles - band * _BAND, _BAND)
    within = program % (column_tiles * _BAND)
    row = offset(band * _BAND + within % height, BLOCK_M) + tl.arange(0, BLOCK_M)
    column = offset(within // height, BLOCK_N) + tl.arange(0, BLOCK_N)
    inside_rows, inside_columns = row < rows, column < columns
    x_rows = x.base + offset(row // length, x.batch) + offset(row % length, x.row)
    w_rows = weight.base + offset(column, weight.stride)
    g_rows = x_rows
    if gate is not None:
        g_rows = gate.base + offset(row // length, gate.batch) + offset(row % length, gate.row)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = acc
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, inner, BLOCK_K):
        step = first + tl.arange(0, BLOCK_K)
        keep = inside_rows[:, None] & (step < inner)[None, :]
        if gate is not None:
            head = tl.zeros([], tl.int32) + first // HEAD_DIM  # a tile lies in one head
            inside = first % HEAD_DIM + tl.arange(0, BLOCK_K)
            a = tl.load(x_rows[:, None] + offset(head, x.head) + inside[None, :], mask=keep, other=0.0)
            g = tl.load(g_rows[:, None] + offset(head, gate.head) + inside[None, :], mask=keep, other=0.0)
            a = (a.to(tl.float32) / (1.0 + tl.exp(-g.to(tl.float32)))).to(a.dtype)
        else:
            a = tl.load(x_rows[:, None] + step[None, :], mask=keep, other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        inside_weight = inside_columns[:, None] & (step < inner)[None, :]
        w = tl.load(w_rows[:, None] + step[None, :], mask=inside_weight, other=0.0)
        acc = dot(a, tl.trans(w), acc, PRECISION)
        if SWIGLU:
            w = tl.load(
                (w_rows + offset(columns, weight.stride))[:, None] + step[None, :],
                mask=inside_weight,
                other=0.0,
            )
            up = dot(a, tl.trans(w), up, PRECISION)
    if NORM:
        scale = tl.rsqrt(squares / inner + eps)
        acc *= scale[:, None]
        up *= scale[:, None]
        if within < height:  # the first tile of columns
            tl.store(rstd + row, scale, mask=inside_rows)
    inside_out = inside_rows[:, None] & inside_columns[None, :]
    if SWIGLU:
        if product is not None:
            pointers = product + offset(row, 2 * columns)[:, None] + column[None, :]
            tl.store(pointers, acc.to(product.dtype.element_ty), mask=inside_out)
            tl.store(pointers + columns, up.to(product.dtype.element_ty), mask=inside_out)
        acc = acc / (1.0 + tl.exp(-acc)) * up
    if residual is not None:
        at_residual = residual.base + offset(row, residual.stride)[:, None] + column[None, :]
        other = tl.load(at_residual, mask=inside_out, other=0.0)
        acc += other.to(tl.float32)
    at_out = out + offset(row, columns)[:, None] + column[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=inside_out)


def refusal(*args) -> str | None:
    return _triton.refusal(*(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()))


def configure(x, weight, gate, residual, eps, swiglu, save) -> tuning.Choice:
    return tuning.lookup(
        "fused_linear",
        "triton",
        structural={
            "dtype": str(x.dtype).removeprefix("torch."),
            "swiglu": swiglu,
            "gated": gate is not None,
        },
        sizes={
            "rows": max(1, x.numel() // weight.shape[1]),
            "inputs": weight.shape[1],
            "outputs": weight.shape[0],
        },
        device=_triton.target(x.device),
    )


def _heads(t: torch.Tensor) -> torch.Tensor:
    """(..., H, D) as (B, L, H, D) with a contiguous last dim: a view where strides allow, else a copy."""
    t = _triton.last_dim_contiguous(t)
    return t.reshape(-1, *t.shape[-3:]) if t.dim() > 3 else t[(None,) * (4 - t.dim())]


def _of_heads(t: torch.Tensor) -> Rows:
    """(B, L, H, D) as a kernel operand."""
    batch, row, head, _ = t.stride()
    return Rows(t, batch, head, row)


def _matrix(t: torch.Tensor) -> Line:
    """(rows, D) with a contiguous last dim, as a kernel operand."""
    return Line(t, t.stride(0))


def fused_linear(x, weight, gate, residual, eps, swiglu, save):
    lead = x.shape[:-1] if gate is None else x.shape[:-2]
    columns = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = x.new_empty(*lead, columns)
    product = x.new_empty((*lead, weight.shape[0]) if swiglu and save else (0,))
    config = configure(x, weight, gate, residual, eps, swiglu, save).values
    if out.numel() == 0:
        return out, product, x.new_empty(lead if eps is not None else (0,), dtype=torch.float32)
    if config["product"] == "library":
        return library.forward(rows, x, weight, gate, residual, eps, swiglu, save, out, product)
    rstd = x.new_empty(lead if eps is not None else (0,), dtype=torch.float32)
    if gate is not None and x.shape[-1] % config["block_k"]:
        x, gate = rows.gated(x, gate).flatten(-2), None  # a tile would span heads
    a = _heads(library.flat(x)[:, None] if gate is None else x)  # (B, L, H, D)
    values = {
        "x": _of_heads(a),
        "gate": None if gate is None else _of_heads(_heads(gate)),
        "weight": _matrix(_triton.last_dim_contiguous(weight)),
        "residual": None if residual is None else _matrix(library.flat(residual)),
        "out": out,
        "product": product if product.numel() else None,
        "rstd": rstd,
        "length": a.shape[1],
        "rows": out.numel() // columns,
        "columns": columns,
        "inner": weight.shape[1],
        "eps": 0.0 if eps is None else eps,
        "HEAD_DIM": a.shape[3],
        "NORM": eps is not None,
        "SWIGLU": swiglu,
        "PRECISION": _triton.precision(x.dtype),
    }
    values |= {f"BLOCK_{name.upper()}": config[f"block_{name}"] for name in "mnk"}
    tiles = triton.cdiv(values["rows"], config["block_m"]) * triton.cdiv(columns, config["block_n"])
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    _triton.start(_fused_linear_kernel, (tiles,), values, **options)
    return out, product, rstd


def fused_linear_backward(*args):
    return library.backward(rows, *args)
