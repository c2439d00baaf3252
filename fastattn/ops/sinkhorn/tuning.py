"""The tunable parameters of sinkhorn's kernels."""

from ...runtime.tuning import Parameter, declare


def _fits(values, key, target) -> str | None:
    # two floats for each warp and group, and the potentials (src/cuda/sinkhorn.cuh)
    shared = (values["threads"] // 32 * 2 + 1) * key["groups"] * 4
    limit = 48 << 10
    return f"needs {shared} bytes of static shared memory, the device has {limit}" if shared > limit else None


declare(
    "sinkhorn",
    "cuda",
    parameters={"threads": Parameter(256, (64, 128, 256, 512, 1024))},
    structural=("dtype", "groups"),
    sizes=("batch", "length"),
    feasible=_fits,
)


def _default(key, target):
    if target.kind == "cpu":
        return {"tokens": 16}
    if not key:
        return {}
    # a few float32 tiles (tokens, groups) stay in registers: 16 numbers of each for a thread
    return {"tokens": max(16, min(1024, 2048 // max(2, 1 << (key["groups"] - 1).bit_length())))}


declare(
    "sinkhorn",
    "triton",
    parameters={
        "tokens": Parameter(256, (16, 32, 64, 128, 256, 512, 1024)),
        "num_warps": Parameter(4, (1, 2, 4, 8)),
    },
    structural=("dtype", "groups"),
    sizes=("batch", "length"),
    default=_default,
)
