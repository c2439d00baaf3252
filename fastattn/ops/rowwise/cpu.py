"""The recurrence pieces on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native
from ...runtime import tuning as _tuning
from . import tuning  # noqa: F401  declares what `_tuning.lookup` serves

_LONGEST_TABLE = (
    1 << 18
)  # positions up to here share one table of cosines and sines; beyond, each call makes its own
_MOST_TABLES = 16  # a theta that depends on the length has one for each
_tables: dict[tuple[int, float], tuple[torch.Tensor, torch.Tensor]] = {}
# the latest positions and what they became: the layers of a model share them
_latest: tuple[tuple, torch.Tensor | None, tuple] = ((), None, ())


def refusal(first: torch.Tensor, *_) -> str | None:
    """Why the CPU kernels cannot serve a call with this first member, or None."""
    return None if first.dtype in native.FAST_DTYPES else native.unserved_dtype(first)


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


def _call(name: str, of: torch.Tensor, threads: int | None = None, **fields) -> None:
    """Run a kernel with the configuration of a tensor like `of`, on torch's number of threads."""
    native.run(name, threads=threads or native.threads(), **_choose(of).values, **fields)


def rms_norm(*members):
    return rms_norm_leading(3, *members)


def rms_norm_leading(reads, x, residual, weight, eps):
    """(normed, total, rstd), or the first `reads` of them."""
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
        fields["weight"] = weight.contiguous()
    if x.numel():
        _call("rms_norm", x, x=native.rows(x), normed=native.rows(normed), eps=eps, **fields)
    return tuple(outputs)


def rms_norm_backward(grad_normed, grad_total, total, weight, rstd, eps):
    grad = torch.empty_like(total, memory_format=torch.contiguous_format)
    columns = total.shape[-1]
    threads = native.threads()  # read once: another thread may set it meanwhile
    partials = None if weight is None else total.new_zeros(threads, columns, dtype=torch.float32)
    if total.numel():
        _call(
            "rms_norm_backward",
            total,
            threads,
            grad_normed=native.rows(grad_normed),
            grad_total=None if grad_total is None else native.rows(grad_total),
            total=native.rows(total),
            weight=None if weight is None else weight.contiguous(),
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


def placed(
    positions: torch.Tensor, head_dim: int, theta: float, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos (R, D/2), sin (R, D/2), row of each token (B, 1, 1, L) int32)."""
    global _latest
    key = (positions.shape, positions.dtype, head_dim, theta, batch)
    known, latest, result = _latest
    # by contents: numpy may write to a tensor's memory, and torch counts no version then
    if known == key and latest.equal(positions):
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
    found = _tables.get(key)  # once: another thread may put a shorter one there
    if found is None or found[0].shape[0] < longest:
        found = _cos_sin(torch.arange(1 << max(8, (longest - 1).bit_length())), head_dim, theta)
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = found
    return (*found, positions.to(torch.int32, copy=True).contiguous().view(-1, positions.shape[-1]))


def _cos_sin(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle = positions.float()[:, None] * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def rotary(q, k, positions, theta, inverse):
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if positions.numel() and q.shape[3] and q.shape[0]:
        cos, sin, rows = placed(positions, q.shape[3], theta, q.shape[0])
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
