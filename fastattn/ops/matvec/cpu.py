"""The few-row product on the CPU: one kernel call."""

from ...runtime import native
from ...runtime import tuning as _tuning
from . import tuning  # noqa: F401  declares what `rows_at_once` looks up

MOST_ROWS = native.limits.matvec_rows


def refusal(x, weight) -> str | None:
    """Why the CPU kernel cannot serve these arguments, or None."""
    if x.dtype not in native.FAST_DTYPES:
        return native.unserved_dtype(x)
    if x.shape[-1] == 0:
        return "it serves a last dim of 1 or more"
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return f"it serves up to {MOST_ROWS} rows, not {x.numel() // x.shape[-1]}"
    return None


def configure(x, weight) -> _tuning.Choice:
    return choose(x.dtype, x.numel() // x.shape[-1], weight.shape)


def choose(dtype, rows: int, shape: tuple[int, int]) -> _tuning.Choice:
    """The configuration for a weight of this shape, (outputs, inputs)."""
    return _tuning.lookup(
        "matvec",
        "cpu",
        structural={"dtype": str(dtype).removeprefix("torch.")},
        sizes={"rows": max(1, rows), "inputs": shape[1], "outputs": max(1, shape[0])},
        device="cpu",
    )


def matvec(x, weight):
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if out.numel():
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        native.run(
            "matvec",
            x=native.rows(rows),
            weight=native.rows(weight),
            out=out.view(-1, weight.shape[0]),
            threads=native.threads(),
            **configure(x, weight).values,
        )
    return out
