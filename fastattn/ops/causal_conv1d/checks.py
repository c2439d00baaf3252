"""The checks of causal_conv1d's arguments, run for every caller."""

from ...runtime import checks, native
from .. import documents

MOST_TAPS = native.limits.taps


def _check(op: str, x, weight, bias, initial_state, cu_seqlens) -> tuple[int, int, int]:
    """Raises for bad arguments; returns the shape of a state."""
    checks.check_tensor(op, "x", x, dims=3)
    checks.check_floating(op, x=x)
    batch, _, channels = x.shape
    checks.check_tensor(op, "weight", weight, dims=2)
    if weight.shape[0] != channels or not 1 <= weight.shape[1] <= MOST_TAPS:
        raise ValueError(
            f"fastattn.{op}: weight must be (D, K) with x's {channels} channels and 1 to {MOST_TAPS} taps, given {checks.describe(weight)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.check_parameter(op, name, t, "x", x)
    if bias is not None:
        checks.check_shape(op, "bias", bias, (channels,), "one a channel")
    checks.check_same_device(op, x=x, weight=weight, bias=bias, initial_state=initial_state)
    state_shape = documents.check_offsets(op, "x", x, batch, cu_seqlens), weight.shape[1] - 1, channels
    if initial_state is not None:
        checks.check_floating(op, x=x, initial_state=initial_state)
        checks.check_shape(op, "initial_state", initial_state, state_shape, "K - 1 inputs of each sequence")
    return state_shape


def check_causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu) -> None:
    _check("causal_conv1d", x, weight, bias, initial_state, cu_seqlens)


def check_causal_conv1d_backward(
    grad_out, grad_state, x, weight, bias, initial_state, cu_seqlens, silu, wanted
) -> None:
    op = "causal_conv1d_backward"
    state_shape = _check(op, x, weight, bias, initial_state, cu_seqlens)
    checks.check_like(op, "grad_out", grad_out, "x", x)
    if grad_state is not None:
        checks.check_exact(op, "grad_state", grad_state, state_shape, x.dtype, x.device, "initial_state's")


def check_contents(x, weight, bias, initial_state, cu_seqlens, silu) -> None:
    documents.check_offsets_contents("causal_conv1d", x.shape[1], cu_seqlens)


def check_backward_contents(
    grad_out, grad_state, x, weight, bias, initial_state, cu_seqlens, silu, wanted
) -> None:
    documents.check_offsets_contents("causal_conv1d_backward", x.shape[1], cu_seqlens)
