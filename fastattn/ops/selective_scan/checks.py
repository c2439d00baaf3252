"""The checks of selective_scan's arguments, run for every caller."""

from ...runtime import checks, native
from .. import documents

INTERVAL = native.defaults("selective_scan_forward")["interval"]


def _check(op: str, u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens) -> tuple[int, int, int]:
    """Raises for bad arguments; returns the shape of a state."""
    for name, t, dims in (("u", u, 3), ("A", A, 2)):
        checks.check_tensor(op, name, t, dims=dims)
    checks.check_floating(op, u=u, dt=dt, B=B, C=C, z=z, absent=("z",))
    batch, length, channels = u.shape
    checks.check_shape(op, "dt", dt, (batch, length, channels), "u's")
    if z is not None:
        checks.check_shape(op, "z", z, (batch, length, channels), "u's")
    if A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(
            f"fastattn.{op}: A must be (E, N) with u's {channels} channels and N of 1 or more, given {checks.describe(A)}"
        )
    states = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        checks.check_shape(op, name, t, (batch, length, states), "u's tokens, A's N")
    checks.check_parameter(op, "A", A, "u", u)
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            checks.check_parameter(op, name, t, "u", u)
            checks.check_shape(op, name, t, (channels,), "one a channel")
    shape = documents.check_offsets(op, "u", u, batch, cu_seqlens), channels, states
    checks.check_same_device(op, u=u, A=A, D=D, dt_bias=dt_bias)
    if initial_state is not None:
        wide = checks.statistics_dtype(u)
        checks.check_exact(op, "initial_state", initial_state, shape, wide, u.device, "one of each sequence")
    return shape


def check_selective_scan(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus) -> None:
    _check("selective_scan", u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)


def check_selective_scan_backward(
    grad_out, grad_state, u, dt, A, B, C, D, z, dt_bias, initial_state, checkpoints, cu_seqlens, dt_softplus
) -> None:
    op = "selective_scan_backward"
    shape = _check(op, u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    checks.check_like(op, "grad_out", grad_out, "u", u)
    wide = checks.statistics_dtype(u)
    if grad_state is not None:
        checks.check_exact(op, "grad_state", grad_state, shape, wide, u.device, "initial_state's")
    expected = checkpoint_shape(u, A)
    checks.check_exact(op, "checkpoints", checkpoints, expected, wide, u.device, "before every 64th token")


def checkpoint_shape(u, A) -> tuple[int, int, int, int]:
    """The shape of the states that are kept for the backward: before every 64th token."""
    return u.shape[0], -(-u.shape[1] // INTERVAL), A.shape[1], u.shape[2]


def check_contents(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus) -> None:
    documents.check_offsets_contents("selective_scan", u.shape[1], cu_seqlens)


def check_backward_contents(
    grad_out, grad_state, u, dt, A, B, C, D, z, dt_bias, initial_state, checkpoints, cu_seqlens, dt_softplus
) -> None:
    documents.check_offsets_contents("selective_scan_backward", u.shape[1], cu_seqlens)
