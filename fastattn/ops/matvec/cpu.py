"""The few-row product on the CPU: one kernel call."""

from ...runtime import native
from ...runtime.tuning import Choice

MOST_ROWS = native.limits.matvec_rows


def refusal(x, weight) -> str | None:
    """Why the CPU kernel cannot serve these arguments, or None."""
    if x.dtype not in native.FAST_DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if x.shape[-1] == 0:
        return "it serves a last dim of 1 or more"
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return f"it serves up to {MOST_ROWS} rows, not {x.numel() // x.shape[-1]}"
    return None


def configure(x, weight) -> Choice:
    return Choice({"isa": native.cpu_isa(), "threads": native.threads()}, "built in")


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
        )
    return out
