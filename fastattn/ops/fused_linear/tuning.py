"""The tunable parameters of the products: torch's product or ours, and the tiles of ours."""

from ...runtime import native
from ...runtime.device import Target
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton product's parameters

_DEFAULT = native.defaults("linear")

_BLOCKS = {
    "block_rows": Parameter(_DEFAULT["block_rows"], (24, 48, 96, 192)),
    "block_columns": Parameter(_DEFAULT["block_columns"], (64, 128, 256, 512)),
    "block_steps": Parameter(_DEFAULT["block_steps"], (128, 256, 512, 1024)),
}


def default_blocks(dtype: str, target: Target) -> dict[str, int]:
    """The tiles of our product. A panel of the packed operand, block_steps deep, is at most an eighth of the second-level cache, because
    all rows of a block read it. Within that limit block_steps is as large as possible, for few passes over the contraction."""
    wide = target.arch.startswith("avx512")
    panel = 4 * (64 if wide else 16)  # bytes of a panel's row: four vectors, or two
    pairs = 2 if dtype == "bfloat16" and target.arch == "avx512bf16" else 1
    deepest = (target.l2 or 1 << 20) // 8 // panel * pairs
    steps = max(
        (n for n in _BLOCKS["block_steps"].allowed if n <= deepest), default=_BLOCKS["block_steps"].allowed[0]
    )
    return {"block_rows": 192, "block_columns": 128, "block_steps": steps}


def _feasible(values, key, target) -> str | None:
    if values["product"] == "library" and any(values[name] != p.default for name, p in _BLOCKS.items()):
        return "torch's product has no tiles to choose"
    return None


def _default(key, target) -> dict[str, int | str]:
    """torch's product or ours, measured on a model's shapes (hidden 512 in float32, 1536 in bfloat16), forward and backward.

    float32: torch's reaches 90 % of an AVX2 machine's peak, ours 80 %. On a Zen 4 ours is 2 to 17 % faster. On an Emerald Rapids torch's
    (Intel's own library) is 4 to 20 % faster. bfloat16: on a Zen 4 ours takes from 7 % less time (SwiGLU) to 5 % more (with a gate).
    Intel processors with bf16 vector instructions also have matrix instructions, which are faster and which torch uses.
    """
    dtype, arch = key.get("dtype"), target.arch
    if dtype == "float32":
        library = target.intel or not arch.startswith("avx512")
    else:
        library = dtype == "bfloat16" and arch == "avx512bf16" and target.intel
    return {"product": "library"} if library else default_blocks(dtype, target)


for _op in ("fused_linear", "fused_linear_backward"):
    declare(
        _op,
        "cpu",
        parameters={"product": Parameter("native", ("native", "library")), **_BLOCKS},
        structural=("dtype",),
        sizes=("rows", "inputs", "outputs"),
        feasible=_feasible,
        default=_default,
    )
