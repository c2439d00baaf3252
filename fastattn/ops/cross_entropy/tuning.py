"""What the cross-entropies can be tuned by: on the CPU, how much of the logits is held at once."""

from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

# MiB of float32 logits held at once: whole rows when the gradients are found in the forward pass, else a tile of
# rows and classes.
declare(
    "linear_cross_entropy",
    "cpu",
    parameters={
        "chunk_mib": Parameter(64, (16, 32, 64, 128)),
        "tile_mib": Parameter(4, (2, 4, 8, 16, 32)),
    },
    structural=("dtype",),
    sizes=("rows", "classes", "width"),
)
declare(
    "vocab_rows",
    "cuda",
    parameters={"threads": Parameter(256, (64, 128, 256, 512, 1024))},
    structural=("transform",),
    sizes=("rows", "classes"),
)
