"""The row-wise ops in Triton: each makes one pass over memory, computes in float32 and rounds once."""

import math

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime import tuning as _tuning
from ...runtime.triton import Line, offset, rows
from . import tuning  # noqa: F401  declares what is looked up

_MOST_COLUMNS = 16384  # columns of a row that is held in registers; longer rows are read twice
_tables: dict[tuple, torch.Tensor] = {}


@triton.jit
def _row(t, row, size_b, size_c):
    """Address of row `row` of (A, B, C, columns)."""
    c = row % size_c
    b = (row // size_c) % size_b
    a = row // size_c // size_b
    return t.base + offset(a, t.batch) + offset(b, t.head) + offset(c, t.row)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total, rstd, size_b, size_c, columns, eps, weight_offset, BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_row = _row(x, row, size_b, size_c)
    column = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    value = squares
    out_row = offset(row, columns)
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        value = tl.load(x_row + first + column, mask=inside, other=0.0)
        if residual is not None:
            r_row = _row(residual, row, size_b, size_c)
            other = tl.load(r_row + first + column, mask=inside, other=0.0)
            value = (value.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + out_row + first + column, value, mask=inside)
        value = value.to(tl.float32)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 0) / columns + eps)
    tl.store(rstd + row, scale)
    source = x_row
    if residual is not None:
        source = total + out_row
    for first in range(0, columns, BLOCK):
        inside = first + column < columns
        if not ONE_TILE:
            value = tl.load(source + first + column, mask=inside, other=0.0).to(tl.float32)
        y = value * scale
        if weight is not None:
            y *= tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32) + weight_offset
        tl.store(normed + out_row + first + column, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    grad_normed, grad_total, total, weight, rstd, grad, partials, size_b, size_c, columns, rows, rows_each,
    weight_offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """d total = rstd * (w g - y * mean(w g y)) + grad_total with y = total * rstd. A program also sums its rows' weight gradients."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    first_row = program * rows_each
    for row in range(first_row, tl.minimum(first_row + rows_each, rows)):
        n_row = _row(grad_normed, row, size_b, size_c)
        t_row = _row(total, row, size_b, size_c)
        scale = tl.load(rstd + row)
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            inside = first + column < columns
            g = tl.load(n_row + first + column, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(t_row + first + column, mask=inside, other=0.0).to(tl.float32) * scale
            if weight is not None:
                sums = partials + offset(program, columns) + first + column
                tl.store(sums, tl.load(sums, mask=inside, other=0.0) + g * y, mask=inside)
                g *= tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32) + weight_offset
            products += g * y
        mean = tl.sum(products, 0) / columns
        for first in range(0, columns, BLOCK):
            inside = first + column < columns
            g = tl.load(n_row + first + column, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(t_row + first + column, mask=inside, other=0.0).to(tl.float32) * scale
            if weight is not None:
                g *= tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32) + weight_offset
            value = scale * (g - y * mean)
            if grad_total is not None:
                g_row = _row(grad_total, row, size_b, size_c)
                value += tl.load(g_row + first + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                grad + offset(row + column * 0, columns) + first + column,
                value.to(grad.dtype.element_ty),
                mask=inside,
            )


@triton.jit
def _gate_kernel(a, b, out, size_b, size_c, columns, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """silu(a) * b, or sigmoid(a) * b."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(_row(a, row, size_b, size_c) + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(_row(b, row, size_b, size_c) + column, mask=inside, other=0.0).to(tl.float32)
    value = y / (1.0 + tl.exp(-x))
    if SILU:
        value *= x
    tl.store(out + offset(row, columns) + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    grad, a, b, grad_a, grad_b, out_row, size_b, size_c, columns, SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(_row(grad, row, size_b, size_c) + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(_row(a, row, size_b, size_c) + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(_row(b, row, size_b, size_c) + column, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-x))
    slope = gate * (1.0 - gate)
    if SILU:
        slope = gate + x * slope
        gate = x * gate
    index = offset(row, out_row) + column
    tl.store(grad_a + index, (g * y * slope).to(grad_a.dtype.element_ty), mask=inside)
    tl.store(grad_b + index, (g * gate).to(grad_b.dtype.element_ty), mask=inside)


@triton.jit
def _token(t, batch, row):
    """The heads of token `row` of (B, H, L, D)."""
    return Line(t.base + offset(batch, t.batch) + offset(row, t.row), t.head)


@triton.jit
def _rotate(
    x, out, heads, half, left_angle, right_angle, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Rotate all heads of one token from x to out: halves, or pairs (INTERLEAVED). The first of two dims uses left_angle, (cos, sin)."""
    cos, sin = left_angle
    cos2, sin2 = right_angle
    lane = tl.arange(0, BLOCK_D)
    dim, second = lane, half
    if INTERLEAVED:
        dim, second = 2 * lane, 1
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        keep = (head < heads)[:, None] & (lane < half)[None, :]
        source = x.base + offset(head, x.stride)[:, None] + dim[None, :]
        left = tl.load(source, mask=keep, other=0.0).to(tl.float32)
        right = tl.load(source + second, mask=keep, other=0.0).to(tl.float32)
        pointers = out.base + offset(head, out.stride)[:, None] + dim[None, :]
        tl.store(pointers, (left * cos - right * sin).to(out.base.dtype.element_ty), mask=keep)
        tl.store(pointers + second, (right * cos2 + left * sin2).to(out.base.dtype.element_ty), mask=keep)


@triton.jit
def _rotary_tables_kernel(
    q, k, q_out, k_out, cos, sin, heads, kv_heads, length, half, INTERLEAVED: tl.constexpr, TWO: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token by its row of cos and sin. TWO: the row has D values, one for each dim. The inverse is the
    transpose, which exchanges the sines of two dims."""
    token = tl.program_id(0)
    batch, row = token // length, token % length
    lane = tl.arange(0, BLOCK_D)
    inside = lane < half
    dim, second = lane, 0
    if TWO:
        second = half
        if INTERLEAVED:
            dim, second = 2 * lane, 1
    cosines = cos.base + offset(batch, cos.stride) + offset(row, tl.where(TWO, 2 * half, half))
    sines = sin.base + offset(batch, sin.stride) + offset(row, tl.where(TWO, 2 * half, half))
    c1 = tl.load(cosines + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cosines + dim + second, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sines + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sines + dim + second, mask=inside, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s1, s2 = -s2, -s1
    _rotate(
        _token(q, batch, row),
        _token(q_out, batch, row),
        heads,
        half,
        (c1, s1),
        (c2, s2),
        INTERLEAVED,
        BLOCK_D,
        BLOCK_H,
    )
    _rotate(
        _token(k, batch, row),
        _token(k_out, batch, row),
        kv_heads,
        half,
        (c1, s1),
        (c2, s2),
        INTERLEAVED,
        BLOCK_D,
        BLOCK_H,
    )


@triton.jit
def _rotary_kernel(
    q, k, v, q_out, k_out, v_out, positions, slots, frequencies, heads, kv_heads, length, half, v_dim,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token, with its sines and cosines computed once. Keys, and values if given, are stored at row slots[token]."""
    token = tl.program_id(0)
    batch, row = token // length, token % length
    lane = tl.arange(0, BLOCK_D)
    # in float64 until whole turns are subtracted: at position 131072 the rounding of a float32 angle is 9e-3
    position = tl.load(positions.base + offset(batch, positions.stride) + row).to(tl.float64)
    turns = position * tl.load(frequencies + lane, mask=lane < half, other=0.0)
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    if INVERSE:
        sin = -sin
    slot = row
    if slots is not None:
        slot = tl.load(slots + token)
    _rotate(
        _token(q, batch, row),
        _token(q_out, batch, row),
        heads,
        half,
        (cos, sin),
        (cos, sin),
        INTERLEAVED,
        BLOCK_D,
        BLOCK_H,
    )
    _rotate(
        _token(k, batch, row),
        _token(k_out, batch, slot),
        kv_heads,
        half,
        (cos, sin),
        (cos, sin),
        INTERLEAVED,
        BLOCK_D,
        BLOCK_H,
    )
    if v is not None:
        v_heads, out_heads = _token(v, batch, row), _token(v_out, batch, slot)
        columns = tl.arange(0, BLOCK_V)
        for first in range(0, kv_heads, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            keep = (head < kv_heads)[:, None] & (columns < v_dim)[None, :]
            source = v_heads.base + offset(head, v_heads.stride)[:, None] + columns[None, :]
            pointers = out_heads.base + offset(head, out_heads.stride)[:, None] + columns[None, :]
            tl.store(pointers, tl.load(source, mask=keep, other=0.0), mask=keep)


def refusal(*args) -> str | None:
    return _triton.refusal(*(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()))


def configure(*args) -> _tuning.Choice:
    first = next(a for a in args if isinstance(a, torch.Tensor))
    return _choose(first)


def _choose(t: torch.Tensor) -> _tuning.Choice:
    return _tuning.lookup(
        "recurrence",
        "triton",
        structural={"dtype": str(t.dtype).removeprefix("torch.")},
        sizes={"rows": max(1, t.numel() // max(1, t.shape[-1])), "columns": max(1, t.shape[-1])},
        device=_triton.target(t.device),
    )


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t as (A, B, C, D) with a contiguous last dim: a view where strides allow, else a copy."""
    t = _triton.last_dim_contiguous(t if t.dim() else t.view(1))
    if t.dim() > 4:
        t = t.reshape(-1, *t.shape[-3:])
    return t[(None,) * (4 - t.dim())]


def _launch_options(t: torch.Tensor) -> tuple[int, dict]:
    values = _choose(t).values
    return values["block"], {"num_warps": values["num_warps"]}


def rms_norm(x, residual, weight, eps, weight_offset):
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0)
    if residual is not None:
        total = torch.empty_like(normed, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    columns = x.shape[-1]
    block = min(_triton.block(columns), _MOST_COLUMNS)
    source = _rows(x)
    other = None if residual is None else _rows(residual)
    _triton.launch(
        _rms_norm_kernel, (rstd.numel(),),
        rows(source), rows(other), None if weight is None else weight.contiguous(), normed, total, rstd,
        *source.shape[1:3], columns, eps, float(weight_offset),
        BLOCK=block, ONE_TILE=block >= columns, num_warps=_warps(block),
    )  # fmt: skip
    return normed, total, rstd


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def rms_norm_backward(grad_normed, grad_total, total, weight, rstd, eps, weight_offset):
    grad = torch.empty_like(total, memory_format=torch.contiguous_format)
    count, columns = rstd.numel(), total.shape[-1]
    # As many programs as the device holds at once; each adds its rows' weight gradients in order.
    programs = count if weight is None else min(count, 4 * _triton.target(total.device).units)
    rows_each = triton.cdiv(count, max(1, programs))
    partials = None if weight is None else total.new_zeros(programs, columns, dtype=torch.float32)
    n, t = _rows(grad_normed), _rows(total)
    g = None if grad_total is None else _rows(grad_total)
    block = min(_triton.block(columns), _MOST_COLUMNS)
    _triton.launch(
        _rms_norm_backward_kernel, (triton.cdiv(count, max(1, rows_each)),),
        rows(n), rows(g), rows(t), None if weight is None else weight.contiguous(), rstd, grad, partials,
        *t.shape[1:3], columns, count, rows_each, float(weight_offset), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return grad, total.new_empty(0) if partials is None else partials.sum(0).to(weight.dtype)


def _gate(a, b, out, silu: bool):
    if out.numel() == 0:
        return out
    columns = a.shape[3]
    block, options = _launch_options(a)
    _triton.launch(
        _gate_kernel, (out.numel() // columns, triton.cdiv(columns, block)),
        rows(a), rows(b), out, *a.shape[1:3], columns, SILU=silu, BLOCK=block, **options,
    )  # fmt: skip
    return out


def _gate_backward(grad, a, b, grad_a, grad_b, silu: bool) -> None:
    if grad.numel() == 0:
        return
    g = _rows(grad)
    columns = g.shape[3]
    block, options = _launch_options(g)
    _triton.launch(
        _gate_backward_kernel, (g.numel() // columns, triton.cdiv(columns, block)),
        rows(g), rows(a), rows(b), grad_a, grad_b, grad_a.stride(0), *a.shape[1:3], columns, SILU=silu, BLOCK=block, **options,
    )  # fmt: skip


def swiglu(gate_up):
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return _gate(*_rows(gate_up).chunk(2, dim=-1), out, True) if out.numel() else out


def swiglu_backward(grad, gate_up):
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if grad.numel():
        _gate_backward(
            grad,
            *_rows(gate_up).chunk(2, dim=-1),
            *grad_gate_up.view(-1, gate_up.shape[-1]).chunk(2, dim=-1),
            True,
        )
    return grad_gate_up


def gated(x, gate):
    return _gate(_rows(gate), _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format), False)


def gated_backward(grad, x, gate):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if grad.numel():
        columns = x.shape[-1] if x.dim() else 1
        _gate_backward(
            grad, _rows(gate), _rows(x), grad_gate.view(-1, columns), grad_x.view(-1, columns), False
        )
    return grad_x, grad_gate


def _frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(D/2,) float64: the turns of one position."""
    key = (head_dim, theta, device)
    if key not in _tables:
        # computed on the host: the copy is complete when `to` returns, for every stream
        capturing = _triton.stream(device) is None
        source = device if capturing else "cpu"
        exponent = torch.arange(0, head_dim, 2, device=source, dtype=torch.float64) / head_dim
        table = (1.0 / (2 * math.pi * theta**exponent)).to(device)
        if capturing:
            return table
        _tables[key] = table
    return _tables[key]


def _start_rotary(
    q, k, v, positions, slots, q_out, k_out, v_out, theta: float, interleaved: bool, inverse: bool
):
    batch, heads, length, head_dim = q.shape
    positions = positions.contiguous()
    if batch * length == 0 or head_dim == 0:
        return
    block = _triton.block(head_dim // 2)
    block_v = block if v is None else _triton.block(v.shape[3])
    max_heads = 2048 // max(block, block_v)
    values = {
        "q": rows(_triton.last_dim_contiguous(q)),
        "k": rows(_triton.last_dim_contiguous(k)),
        "v": None if v is None else rows(_triton.last_dim_contiguous(v)),
        "q_out": rows(q_out),
        "k_out": rows(k_out),
        "v_out": rows(v_out),
        "positions": Line(positions, length if positions.dim() == 2 else 0),
        "slots": slots,
        "frequencies": _frequencies(head_dim, theta, q.device),
        "heads": heads,
        "kv_heads": k.shape[1],
        "length": length,
        "half": head_dim // 2,
        "v_dim": 0 if v is None else v.shape[3],
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "BLOCK_D": block,
        "BLOCK_V": block_v,
        "BLOCK_H": max(1, min(triton.next_power_of_2(max(1, heads)), max_heads)),
    }
    _triton.start(_rotary_kernel, (batch * length,), values, num_warps=4)


def rotary(q, k, positions, theta, interleaved, inverse):
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    _start_rotary(q, k, None, positions, None, *outputs, None, theta, interleaved, inverse)
    return outputs


def rotary_tables(q, k, cos, sin, interleaved, inverse):
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    batch, heads, length, head_dim = q.shape
    if batch * length == 0 or head_dim == 0:
        return outputs
    cos, sin = cos.contiguous(), sin.contiguous()
    batch_stride = cos.stride(0) if cos.shape[0] > 1 else 0
    block = _triton.block(head_dim // 2)
    _triton.launch(
        _rotary_tables_kernel, (batch * length,),
        *(rows(_triton.last_dim_contiguous(t)) for t in (q, k)), *map(rows, outputs), Line(cos, batch_stride), Line(sin, batch_stride),
        heads, k.shape[1], length, head_dim // 2, INTERLEAVED=interleaved, TWO=cos.shape[2] == head_dim, INVERSE=inverse,
        BLOCK_D=block, BLOCK_H=max(1, min(triton.next_power_of_2(max(1, heads)), 2048 // block)), num_warps=4,
    )  # fmt: skip
    return outputs


def rotary_append(q, k, v, positions, slots, keys, values, theta):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _start_rotary(q, k, v, positions, slots.contiguous(), out, keys, values, theta, False, False)
    return out


def refusal_append(q, k, v, positions, slots, keys, values, theta) -> str | None:
    if any(t.stride(-1) != 1 for t in (keys, values)):
        return "it serves caches with a contiguous last dim"
    return refusal(q, k, v, keys, values)
