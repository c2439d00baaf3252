"""What the products can be tuned by: whose product runs, and the tiles of ours."""

from ...runtime import native
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton product's parameters

_DEFAULT = native.defaults("linear")

_BLOCKS = {
    "block_rows": Parameter(_DEFAULT["block_rows"], (24, 48, 96, 192)),
    "block_columns": Parameter(_DEFAULT["block_columns"], (64, 128, 256, 512)),
    "block_steps": Parameter(_DEFAULT["block_steps"], (128, 256, 512, 1024)),
}


def _feasible(values, key, target) -> str | None:
    if values["product"] == "library" and any(values[name] != p.default for name, p in _BLOCKS.items()):
        return "torch's product has no tiles to choose"
    return None


def _default(key, target) -> dict[str, str]:
    # measured: torch's float32 product reaches 90 % of an AVX2 machine's peak and a third of an AVX-512 one's; its
    # bfloat16 product 90 % where there is a dot for it, 1 % where there is none
    dtype, arch = key.get("dtype"), target.arch
    library = (dtype == "float32" and arch in ("avx2", "baseline")) or (
        dtype == "bfloat16" and arch == "avx512bf16"
    )
    return {"product": "library"} if library else {}


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
