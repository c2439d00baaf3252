"""The checks of gated attention's arguments, run for every caller."""

from ...runtime import checks
from ..attention.checks import check_results
from ..focus import check_causal, check_grad_lse

GATES = ("multiply", "log")  # by code


def _check_gated(op: str, q, k, v, assignment, sharpness, window, gate, scale, mask) -> None:
    check_causal(op, q, k, v, window, scale, mask)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"fastattn.{op}: k has {k.shape[2]} tokens, q has {q.shape[2]}; they must agree (decoding uses grouped_attention)"
        )
    checks.check_tensor(op, "assignment", assignment, dims=3)
    checks.check_floating(op, assignment=assignment)
    checks.check_floating(op, sharpness=sharpness)
    checks.check_same_device(op, q=q, assignment=assignment, sharpness=sharpness)
    if assignment.shape[:2] != (q.shape[0], q.shape[2]) or assignment.shape[2] == 0:
        raise ValueError(
            f"fastattn.{op}: assignment must have shape (B, L, G) = ({q.shape[0]}, {q.shape[2]}, 1 or more), "
            f"given {tuple(assignment.shape)}"
        )
    if sharpness.dim():
        raise ValueError(f"fastattn.{op}: sharpness must be a scalar, given {checks.describe(sharpness)}")
    if not 0 <= gate < len(GATES):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(GATES))
        raise ValueError(f"fastattn.{op}: gate must be one of {known}, given {gate}")


def check_gated_attention(q, k, v, assignment, sharpness, window, gate, scale, mask) -> None:
    _check_gated("gated_attention", q, k, v, assignment, sharpness, window, gate, scale, mask)


def check_gated_attention_backward(
    grad_out, grad_lse, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
) -> None:
    op = "gated_attention_backward"
    _check_gated(op, q, k, v, assignment, sharpness, window, gate, scale, mask)
    check_results(op, grad_out, q, v, out, state, "state", (*q.shape[:3], 2))
    check_grad_lse(op, grad_lse, q)
