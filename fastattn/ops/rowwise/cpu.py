"""The row-wise ops on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native
from ...runtime import tuning as _tuning
from . import tuning  # noqa: F401  declares what `_tuning.lookup` serves

# positions below this share one table of cosines and sines; with larger ones each call computes its own
_LONGEST_TABLE = 1 << 18
_MOST_TABLES = 16  # a theta that depends on the length needs several
_tables: dict[tuple[int, float], tuple[torch.Tensor, torch.Tensor]] = {}
# (key, positions, result of `rotation_rows`) of the latest call: the layers of a model share them
_latest: tuple[tuple, torch.Tensor | None, tuple] = ((), None, ())


def refusal(first: torch.Tensor, *_) -> str | None:
    """Why the CPU kernels cannot serve a call with this first member, or None."""
    return None if first.dtype in native.FAST_DTYPES else native.unserved_dtype(first)


def refusal_norm(x, residual, weight, *_) -> str | None:
    """Why the CPU kernels cannot serve this norm, or None."""
    if residual is not None and residual.dtype is not x.dtype and (reason := refusal(residual)):
        return reason
    if weight is not None and weight.dtype is not x.dtype and (reason := refusal(weight)):
        return reason
    return refusal(x)


def refusal_norm_backward(grad_normed, grad_total, total, weight, *_) -> str | None:
    return refusal_norm(grad_normed, total, weight)


def refusal_tables(q, k, cos, sin, *_) -> str | None:
    """Why the CPU kernel cannot serve these rotations, or None."""
    return refusal(q) or refusal(cos) or refusal(sin)


def configure(first: torch.Tensor, *_) -> _tuning.Choice:
    return _choose(first)


def _choose(t: torch.Tensor) -> _tuning.Choice:
    return _lookup(t.dtype, t.shape)


@_tuning.remembered
def _lookup(dtype: torch.dtype, shape: torch.Size) -> _tuning.Choice:
    columns = max(1, shape[-1])
    return _tuning.lookup(
        "recurrence",
        "cpu",
        structural={"dtype": str(dtype).removeprefix("torch.")},
        sizes={"rows": max(1, shape.numel() // columns), "columns": columns},
        device="cpu",
    )


def _call(name: str, like: torch.Tensor, threads: int | None = None, **fields) -> None:
    """Run a kernel with the configuration for a tensor such as `like`, on torch's number of threads."""
    native.run(name, threads=threads or native.threads(), **_choose(like).values, **fields)


def rms_norm(*members):
    return rms_norm_leading(3, *members)


def _scale(weight: torch.Tensor | None, offset: float, like: torch.Tensor) -> torch.Tensor | None:
    """weight + offset for the kernels, in the rows' dtype or in float32."""
    if weight is None or (offset == 0 and weight.dtype in (like.dtype, torch.float32)):
        return None if weight is None else weight.contiguous()
    return weight.float().contiguous() + offset


def rms_norm_leading(reads, x, residual, weight, eps, weight_offset):
    """(normed, total, rstd), or the first `reads` of them."""
    if residual is not None and residual.dtype != x.dtype:  # the kernel adds tensors of one dtype only
        total = x + residual
        if total.dtype != x.dtype:
            normed, _, rstd = rms_norm(total, None, weight, eps, weight_offset)
            return normed.to(x.dtype), total, rstd
        residual = residual.to(x.dtype)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs, fields = [normed], {}
    if residual is not None:
        total = torch.empty_like(normed)
        outputs.append(total)
        fields = {"residual": native.rows(residual), "total": native.rows(total)}
    elif reads > 1:
        outputs.append(x.new_empty(0))
    if reads > 2:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        outputs.append(rstd)
        fields["rstd"] = native.rows(rstd[..., None])
    if weight is not None:
        fields["weight"] = _scale(weight, weight_offset, x)
    if x.numel():
        _call("rms_norm", x, x=native.rows(x), normed=native.rows(normed), eps=eps, **fields)
    return tuple(outputs)


def rms_norm_backward(grad_normed, grad_total, total, weight, rstd, eps, weight_offset):
    grad_normed = grad_normed.to(total.dtype)
    grad = torch.empty_like(total, memory_format=torch.contiguous_format)
    columns = total.shape[-1]
    threads = native.threads()  # read once: another thread may change it
    partials = None if weight is None else total.new_zeros(threads, columns, dtype=torch.float32)
    if total.numel():
        _call(
            "rms_norm_backward",
            total,
            threads,
            grad_normed=native.rows(grad_normed),
            grad_total=None if grad_total is None else native.rows(grad_total),
            total=native.rows(total),
            weight=_scale(weight, weight_offset, total),
            rstd=native.rows(rstd[..., None]),
            grad=native.rows(grad),
            weight_partials=partials,
        )
    return grad, total.new_empty(0) if partials is None else partials.sum(0).to(weight.dtype)


def swiglu(gate_up):
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if out.numel():
        gate, up = native.rows(gate_up).chunk(2, dim=-1)
        _call("swiglu", gate_up, a=gate, b=up, out=native.rows(out))
    return out


def swiglu_backward(grad_out, gate_up):
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if grad_out.numel():
        gate, up = native.rows(gate_up).chunk(2, dim=-1)
        grad_gate, grad_up = native.rows(grad_gate_up).chunk(2, dim=-1)
        _call(
            "swiglu_backward",
            gate_up,
            a=gate,
            b=up,
            grad_out=native.rows(grad_out),
            grad_a=grad_gate,
            grad_b=grad_up,
        )
    return grad_gate_up


def gated(x, gate):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _call("gated", x, a=native.rows(gate), b=native.rows(x), out=native.rows(out))
    return out


def gated_backward(grad_out, x, gate):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if x.numel():
        _call(
            "gated_backward",
            x,
            a=native.rows(gate),
            b=native.rows(x),
            grad_out=native.rows(grad_out),
            grad_a=native.rows(grad_gate),
            grad_b=native.rows(grad_x),
        )
    return grad_x, grad_gate


def rotation_rows(
    positions: torch.Tensor, head_dim: int, theta: float, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos (R, D/2), sin (R, D/2), row of each token (B, 1, 1, L) int32)."""
    global _latest
    key = (positions.shape, positions.dtype, head_dim, theta, batch)
    latest_key, latest, result = _latest
    # compare elements: numpy may write to a tensor's memory without raising torch's version counter
    if latest_key == key and latest.equal(positions):
        return result
    cos, sin, rows = _table(positions, head_dim, theta)
    result = (cos, sin, rows.expand(batch, -1)[:, None, None])
    _latest = (key, positions.clone(), result)
    return result


def _table(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos (R, D/2), sin (R, D/2), row of each token (B or 1, L) int32)."""
    longest = int(positions.max()) + 1
    if longest > _LONGEST_TABLE or int(positions.min()) < 0:
        cos, sin = _cos_sin(positions.reshape(-1), head_dim, theta)
        return cos, sin, torch.arange(positions.numel(), dtype=torch.int32).view(-1, positions.shape[-1])
    key = (head_dim, theta)
    table = _tables.get(key)  # read once: another thread may store a shorter table
    if table is None or table[0].shape[0] < longest:
        table = _cos_sin(torch.arange(1 << max(8, (longest - 1).bit_length())), head_dim, theta)
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = table
    return (*table, positions.to(torch.int32, copy=True).contiguous().view(-1, positions.shape[-1]))


def _cos_sin(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    # in float64: at position 131072 the rounding of a float32 angle is 9e-3
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = positions.double()[:, None] * (1.0 / theta**exponent)
    return angle.cos().float(), angle.sin().float()


def rotary(q, k, positions, theta, interleaved, inverse):
    if not positions.numel() or not q.shape[3] or not q.shape[0]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    return _rotated(q, k, *rotation_rows(positions, q.shape[3], theta, q.shape[0]), interleaved, inverse)


def rotary_tables(q, k, cos, sin, interleaved, inverse):
    batch, _, length, head_dim = q.shape
    if interleaved and cos.shape[2] == head_dim:
        cos, sin = _halves(cos), _halves(sin)
    cos, sin = (t.reshape(-1, t.shape[2]).float().contiguous() for t in (cos, sin))
    rows = (
        torch.arange(cos.shape[0], dtype=torch.int32).view(-1, length)
        if length
        else cos.new_empty(1, 0).int()
    )
    return _rotated(q, k, cos, sin, rows.expand(batch, -1)[:, None, None], interleaved, inverse)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """The last dim reordered: its even indices first, then its odd ones."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _rotated(q, k, cos, sin, rows, interleaved, inverse):
    if interleaved:  # the kernel rotates halves: one copy before it and one after
        rotated = _rotated(_halves(q), _halves(k), cos, sin, rows, False, inverse)
        return tuple(t.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for t in rotated)
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if q.shape[3]:
        for x, out in zip((q, k), outputs, strict=True):
            if x.numel():
                _call(
                    "rotary",
                    x,
                    x=native.rows(x),
                    out=out,
                    cos=cos,
                    sin=sin,
                    rows=rows,
                    inverse=int(inverse),
                )
    return outputs
