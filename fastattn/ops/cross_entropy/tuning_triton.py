"""The tunable parameters of the Triton row kernel, which the codebook ops use too."""

from ...runtime.tuning import Parameter, declare

declare(
    "vocab_rows",
    "triton",
    parameters={
        "block": Parameter(4096, (64, 1024, 2048, 4096, 8192, 16384)),
        "num_warps": Parameter(8, (4, 8, 16)),
        "chunk_mib": Parameter(512, (1, 64, 128, 256, 512, 1024, 2048)),
    },
    structural=("dtype",),
    sizes=("rows", "classes"),
    default=lambda key, target: {"block": 64, "chunk_mib": 1} if target.kind == "cpu" else {},
)
