"""What the few-row product can be tuned by: how many rows of weight a thread reads side by side, and what multiplies."""

import torch

from ...runtime import native
from ...runtime.tuning import Parameter, declare

_DEFAULT = native.defaults("matvec")
_LONG = 1024  # bytes of a row from which on it is read as fast alone as beside others


def _feasible(values, key, target) -> str | None:
    if values["dot"] and (key["dtype"] != "bfloat16" or key["rows"] == 1 or target.arch != "avx512bf16"):
        return "a dot is for two rows or more of bfloat16, on an instruction set that has one"
    return None


def _default(key, target) -> dict[str, int]:
    # Rows that lie one behind the other are one stream to the processor, several read at once are several. Weights from
    # memory, one row of x, bfloat16: a Zen 4 reads 46 GB/s with one row at once and 26 with four, an Emerald Rapids 25 and 26
    # (in float32 28 and 32). More rows of x are bound by arithmetic, where a load of x serves every row of weight that is
    # there.
    rows, row_bytes = key["rows"], key["inputs"] * getattr(torch, key["dtype"]).itemsize
    alone = row_bytes >= _LONG and not target.intel
    return {
        "rows_at_once": rows if alone and rows <= 2 else 4,
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
