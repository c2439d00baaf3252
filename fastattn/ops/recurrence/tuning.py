"""What the recurrence kernels can be tuned by."""

from ..._config import Parameter, declare

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
