"""What the Triton kernels of grouped and gated attention can be tuned by: tiles of attention's shape."""

from ...runtime.tuning import Parameter, declare
from ..attention.tuning_triton import (
    backward_bytes,
    backward_default,
    backward_fits,
    declare_backward,
    declare_forward,
    forward_fits,
)

declare_forward("grouped_attention")
declare_backward("grouped_attention_backward")


def _gated_fits(values, key, target) -> str | None:
    """Beside a forward's tiles, float32 agreements of the same shape and both sides' assignments."""
    return forward_fits(values, {**key, "dtype": "float32"}, target) or backward_fits(values, key, target)


def _gated_backward_fits(values, key, target) -> str | None:
    """Two float32 (M, N) tiles go through shared memory for their products."""
    if target.kind == "cpu":
        return None
    m, n = values["block_m"], values["block_n"]
    wanted = backward_bytes(values, key, target) + 2 * m * n * 4
    if key["dtype"] == "float32":  # the agreements' products in float32 too, of up to 64 groups
        wanted += 2 * m * n * 4 + (m + n) * 64 * 4
    if wanted > target.shared:
        return f"needs {wanted >> 10} KiB of shared memory, {target.shared >> 10} are there"
    return backward_fits(values, key, target)


def _gated_default(key, target):
    return backward_default(key, target, _gated_fits)


def _gated_backward_default(key, target):
    return backward_default(key, target, _gated_backward_fits)


declare_forward("gated_attention", _gated_fits, _gated_default)
declare_backward("gated_attention_backward", _gated_backward_fits, _gated_backward_default)


def _sinkhorn_default(key, target):
    if target.kind == "cpu":
        return {"tokens": 16}
    if not key:
        return {}
    # a few tiles (tokens, groups) of float32 stay in registers: 16 of each a thread
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
    default=_sinkhorn_default,
)
