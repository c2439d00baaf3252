"""The tunable parameters of the few-row product: the rows of weight that a thread reads at a time, and the instruction."""

import torch

from ...runtime import native
from ...runtime.tuning import Parameter, declare

_DEFAULT = native.defaults("matvec")
_LONG = 1024  # bytes of a row from which on reading a single row at a time is as fast as reading several


def _feasible(values, key, target) -> str | None:
    if values["dot"] and (key["dtype"] != "bfloat16" or key["rows"] == 1 or target.arch != "avx512bf16"):
        return "dot serves two rows or more of bfloat16 on an instruction set with a bfloat16 dot"
    return None


def _default(key, target) -> dict[str, int]:
    # Consecutive rows are one stream to the processor; several rows read at once are several streams. With weights from memory, one
    # row of x and bfloat16, a Zen 4 reads 46 GB/s with one row at once and 26 with four, an Emerald Rapids 25 and 26 (in float32 28
    # and 32). With more rows of x arithmetic takes most of the time, and then a load of x should serve several rows of weight.
    rows, row_bytes = key["rows"], key["inputs"] * getattr(torch, key["dtype"]).itemsize
    single = row_bytes >= _LONG and not target.intel
    return {
        "rows_at_once": rows if single and rows <= 2 else 4,
        "dot": int(rows > 1 and key["dtype"] == "bfloat16" and target.fast_bf16),
    }


declare(
    "matvec",
    "cpu",
    parameters={
        "rows_at_once": Parameter(_DEFAULT["rows_at_once"], (1, 2, 4)),
        "dot": Parameter(_DEFAULT["dot"], (0, 1)),
    },
    structural=("dtype",),
    sizes=("rows", "inputs", "outputs"),
    feasible=_feasible,
    default=_default,
)
