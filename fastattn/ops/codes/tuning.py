"""The tunable parameter of the CPU codebook ops: how much of the products with the codebook is held at once."""

from ...runtime.tuning import Parameter, declare

declare(
    "vq_cross_entropy",
    "cpu",
    parameters={"chunk_mib": Parameter(16, (4, 8, 16, 32, 64))},
    structural=("dtype",),
    sizes=("rows", "codes", "width"),
)
