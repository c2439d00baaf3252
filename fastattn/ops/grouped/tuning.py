"""What the kernels of grouped and gated attention can be tuned by."""

from ...runtime import native as _native
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

_DEFAULT = _native.defaults("grouped_forward")

_KEY = {
    "structural": ("dtype", "head_dim", "value_dim"),
    "sizes": ("batch", "heads", "kv_heads", "q_length", "k_length"),
}

for _name, _rows in (("grouped_attention", 48), ("gated_attention", 96)):
    declare(
        _name,
        "cpu",
        parameters={
            "block_q": Parameter(_DEFAULT["block_q"], (24, 48, 72, 96, 144, 192)),
            "block_k": Parameter(_DEFAULT["block_k"], (32, 64, 128, 192, 256)),
            "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
        },
        **_KEY,
    )
    declare(
        f"{_name}_backward",
        "cpu",
        parameters={"block_q": Parameter(_rows, (24, 48, 72, 96, 144, 192))},
        **_KEY,
    )


def _fits(values, key, target) -> str | None:
    # a warp's statistics of every group: two floats each, and the potentials (src/cuda/sinkhorn.cuh)
    shared = (values["threads"] // 32 * 2 + 1) * key["groups"] * 4
    limit = 48 << 10
    return f"needs {shared} bytes of static shared memory, {limit} are there" if shared > limit else None


declare(
    "sinkhorn",
    "cuda",
    parameters={"threads": Parameter(256, (64, 128, 256, 512, 1024))},
    structural=("dtype", "groups"),
    sizes=("batch", "length"),
    feasible=_fits,
)
