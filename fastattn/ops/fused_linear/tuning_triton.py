"""The tunable parameters of the Triton products: torch's product or ours, and the tiles of ours."""

from ...runtime.tuning import Parameter, declare

_BLOCKS = {
    "block_m": Parameter(64, (16, 32, 64, 128, 256)),
    "block_n": Parameter(64, (16, 32, 64, 128, 256)),
    "block_k": Parameter(32, (16, 32, 64, 128)),
    "num_warps": Parameter(4, (2, 4, 8)),
    "num_stages": Parameter(2, (1, 2, 3, 4)),
}


def _fits(values, key, target) -> str | None:
    if values["product"] == "library":
        has_tiles = any(values[name] != p.default for name, p in _BLOCKS.items())
        return "torch's product has no tiles to choose" if has_tiles else None
    if target.kind == "cpu":
        return None
    width = 4 if key["dtype"] == "float32" else 2
    products = 2 if key["swiglu"] else 1  # gate and up: two tiles of the weight, two accumulators
    m, n, k = (values[f"block_{name}"] for name in "mnk")
    flying = k * (m * (1 + key["gated"]) + n * products) * width * values["num_stages"]
    # a gated or normed operand passes through shared memory, and so does the result
    needed = flying + max(m * k * width, m * n * products * 4)
    if needed > target.shared:
        return f"needs {needed >> 10} KiB of shared memory, the device has {target.shared >> 10}"
    registers = m * n * products // (32 * values["num_warps"])
    return f"needs about {registers} registers a thread" if registers > 128 else None


declare(
    "fused_linear",
    "triton",
    # the vendor's product is the default until ours has been timed; `fastattn tune` may choose ours
    parameters={"product": Parameter("library", ("library", "native")), **_BLOCKS},
    structural=("dtype", "swiglu", "gated"),
    sizes=("rows", "inputs", "outputs"),
    feasible=_fits,
)
