"""The tunable parameters of the row-wise kernels, which tables name "recurrence"."""

from ...runtime import native
from ...runtime.tuning import Parameter, declare

_DEFAULT = native.defaults("rms_norm")

declare(
    "recurrence",
    "triton",
    parameters={
        "block": Parameter(1024, (128, 256, 512, 1024, 2048, 4096)),
        "num_warps": Parameter(4, (1, 2, 4, 8)),
    },
    structural=("dtype",),
    sizes=("rows", "columns"),
    default=lambda key, target: {"block": 128} if target.kind == "cpu" else {},
)

declare(
    "recurrence",
    "cpu",
    parameters={
        # with fewer elements only one thread runs
        "serial": Parameter(_DEFAULT["serial"], tuple(1 << n for n in range(12, 19))),
        "prefetch": Parameter(_DEFAULT["prefetch"], (0, 256, 512, 1024, 2048)),  # bytes read ahead
    },
    structural=("dtype",),
    sizes=("rows", "columns"),
)
