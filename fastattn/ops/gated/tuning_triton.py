"""The tunable parameters of gated attention's Triton kernels: tiles as in attention."""

from ..attention.tuning_triton import (
    backward_bytes,
    backward_default,
    backward_fits,
    declare_backward,
    declare_forward,
    forward_fits,
)


def _fits(values, key, target) -> str | None:
    """The forward needs float32 agreements besides the scores, and both sides' assignments."""
    return forward_fits(values, {**key, "dtype": "float32"}, target) or backward_fits(values, key, target)


def _backward_fits(values, key, target) -> str | None:
    """Two float32 (M, N) tiles go through shared memory for their products."""
    if target.kind == "cpu":
        return None
    m, n = values["block_m"], values["block_n"]
    needed = backward_bytes(values, key, target) + 2 * m * n * 4
    if key["dtype"] == "float32":  # the agreements' products are float32 too, with up to 64 groups
        needed += 2 * m * n * 4 + (m + n) * 64 * 4
    if needed > target.shared:
        return f"needs {needed >> 10} KiB of shared memory, the device has {target.shared >> 10}"
    return backward_fits(values, key, target)


def _default(key, target):
    return backward_default(key, target, _fits)


def _backward_default(key, target):
    return backward_default(key, target, _backward_fits)


declare_forward("gated_attention", _fits, _default)
declare_backward("gated_attention_backward", _backward_fits, _backward_default)
