"""The tunable parameters of the cross-entropies: on the CPU, how much of the logits is held at once, and whose product is used."""

from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters


def _native_refused(values, key, target) -> str | None:
    if values["product"] == "native" and (key["dtype"] != "bfloat16" or target.arch != "avx512bf16"):
        return "our product serves bfloat16 on processors with bfloat16 instructions"
    return None


def _product(key, target) -> dict[str, str]:
    native = key.get("dtype") == "bfloat16" and target.fast_bf16
    return {"product": "native"} if native else {}


# chunk_mib: MiB of logits and gradients held at once, in whole rows, when the forward computes the gradients. tile_mib: MiB of a tile
# of rows and classes otherwise. product: torch's in float32, or ours in bfloat16.
declare(
    "linear_cross_entropy",
    "cpu",
    parameters={
        "product": Parameter("library", ("library", "native")),
        "chunk_mib": Parameter(64, (16, 32, 64, 128)),
        "tile_mib": Parameter(4, (2, 4, 8, 16, 32)),
    },
    structural=("dtype",),
    sizes=("rows", "classes", "width"),
    feasible=_native_refused,
    default=_product,
)
declare(
    "vocab_rows",
    "cuda",
    parameters={"threads": Parameter(256, (64, 128, 256, 512, 1024))},
    structural=("transform",),
    sizes=("rows", "classes"),
)
