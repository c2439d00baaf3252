"""The tunable parameters of the decode step on a GPU."""

from ...runtime.tuning import Parameter, declare


def _fits(values, key, target) -> str | None:
    # a block holds the longest vector, one float for each warp and the angles of a head (src/cuda/hrm_step.cuh)
    longest = max(key["hidden"], key["inner"], key["heads"] * key["head_dim"])
    shared = 4 * (longest + values["threads"] // 32 + -(-key["head_dim"] // 32) * 32)
    if shared > target.shared:
        return f"needs {shared} bytes of shared memory, the device has {target.shared}"
    return None


# threads: threads of a block; a processor runs one block. rows: rows of a weight that a warp loads at a time. span: keys of one unit
# of attention work.
declare(
    "decode_step",
    "cuda",
    parameters={
        "threads": Parameter(512, (128, 256, 512, 1024)),
        "rows": Parameter(1, (1, 2, 4)),
        "span": Parameter(64, (16, 32, 64, 128, 256)),
    },
    structural=("dtype", "head_dim"),
    sizes=("hidden", "inner", "heads", "cached"),
    feasible=_fits,
)
