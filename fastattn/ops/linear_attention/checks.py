"""The checks of linear attention's arguments, run for every caller."""

import torch

from ...runtime import checks, native
from ...runtime.registry import refuse_gradients
from .. import documents
from ..attention.checks import check_scale

CHUNK = native.limits.chunk  # tokens between two states that are kept for the backward


def kept_states(length: int, causal: bool, cu_seqlens: torch.Tensor | None) -> int:
    """The number of states that are kept for each head: one before every chunk of each document, which is cut into chunks from its first
    token on. Document i's states begin at index cu_seqlens[i] // CHUNK + i. If not causal: one for each document, after its last token."""
    if not causal:
        return documents.count(1, cu_seqlens)
    return -(-length // CHUNK) if cu_seqlens is None else length // CHUNK + documents.count(1, cu_seqlens)


def _check_flags(op: str, **flags) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"fastattn.{op}: {name} must be a bool, given {checks.describe(value)}")


def _check_heads(op: str, q, k, v, axes: str) -> None:
    """q and k have one shape (B, H) + axes; v has the same batch and tokens."""
    dims = 2 + len(axes)
    checks.check_floating(op, q=q, k=k, v=v)
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(op, name, value, dims=dims)
    checks.check_shape(op, "k", k, q.shape, "as q")
    if v.shape[0] != q.shape[0] or v.shape[2:-1] != q.shape[2:-1]:
        raise ValueError(
            f"fastattn.{op}: v must have q's batch and tokens, given q {checks.describe(q)} and v {checks.describe(v)}"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"fastattn.{op}: head dims must be at least 1, given q {checks.describe(q)} and v {checks.describe(v)}"
        )
    if (v.shape[1] % k.shape[1] if k.shape[1] else v.shape[1]) != 0:
        raise ValueError(
            f"fastattn.{op}: v's heads must be a multiple of k's, given {v.shape[1]} and {k.shape[1]}"
        )


def _check_gates(op: str, q, v, decay, beta) -> None:
    rows = tuple(v.shape[:-1])
    if decay is not None:
        checks.check_floating(op, decay=decay)
        checks.check_same_device(op, q=q, decay=decay)
        allowed = ((v.shape[1],), rows, (*rows, q.shape[-1]))
        if tuple(decay.shape) not in allowed:
            shapes = ", ".join("x".join(map(str, s)) for s in allowed)
            raise ValueError(
                f"fastattn.{op}: decay must have one of the shapes {shapes} (a head, a token, a token and key channel), "
                f"given {checks.describe(decay)}"
            )
    if beta is not None:
        checks.check_floating(op, beta=beta)
        checks.check_same_device(op, q=q, beta=beta)
        checks.check_shape(op, "beta", beta, rows, "one a token and value head")


def _check_state(op: str, name: str, state, sequences, q, v, normalize: bool) -> None:
    shape = (sequences, v.shape[1], q.shape[-1], v.shape[-1] + int(normalize))
    checks.check_exact(
        op,
        name,
        state,
        shape,
        checks.statistics_dtype(q),
        q.device,
        "sequences, value heads, dk, dv" + (" and a column of sums of keys" if normalize else ""),
    )


def _check_linear(
    op: str, q, k, v, decay, beta, initial_state, cu_seqlens, scale, delta_rule, normalize, qk_norm, causal
) -> None:
    _check_heads(op, q, k, v, "LD")
    _check_gates(op, q, v, decay, beta)
    check_scale(op, scale)
    _check_flags(op, delta_rule=delta_rule, normalize=normalize, qk_norm=qk_norm, causal=causal)
    if normalize and delta_rule:
        raise ValueError(f"fastattn.{op}: normalize is not defined with the delta rule")
    if not causal:
        for name, given in (
            ("decay", decay is not None),
            ("beta", beta is not None),
            ("delta_rule", delta_rule),
        ):
            if given:
                raise ValueError(
                    f"fastattn.{op}: {name} is not defined with causal=False, because it depends on the order of tokens"
                )
    sequences = documents.check_offsets(op, "q", q, q.shape[0], cu_seqlens)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, sequences, q, v, normalize)


def check_linear_attention(*members) -> None:
    _check_linear("linear_attention", *members)


def check_linear_attention_backward(
    grad_out, grad_state, q, k, v, decay, beta, initial_state, out, states, cu_seqlens, *options
) -> None:
    op = "linear_attention_backward"
    *options, wanted = options
    _check_linear(op, q, k, v, decay, beta, initial_state, cu_seqlens, *options)
    _, _, normalize, _, causal = options
    checks.check_like(op, "grad_out", grad_out, "v", v)
    checks.check_like(op, "out", out, "v", v)
    if grad_state is not None:
        _check_state(op, "grad_state", grad_state, documents.count(q.shape[0], cu_seqlens), q, v, normalize)
    shape = (
        *v.shape[:2],
        kept_states(v.shape[2], causal, cu_seqlens),
        q.shape[3],
        v.shape[3] + int(normalize),
    )
    checks.check_exact(
        op, "states", states, shape, checks.statistics_dtype(q), q.device, "one state for each chunk"
    )
    if checks.as_integer(wanted) is None or not 0 <= wanted < 8:
        raise ValueError(f"fastattn.{op}: wanted must be from 0 to 7, given {wanted!r}")


def check_linear_attention_contents(q, k, v, decay, beta, initial_state, cu_seqlens, *_) -> None:
    documents.check_offsets_contents("linear_attention", q.shape[2], cu_seqlens)


def check_linear_attention_backward_contents(
    grad_out, grad_state, q, k, v, decay, beta, initial_state, out, states, cu_seqlens, *_
) -> None:
    documents.check_offsets_contents("linear_attention_backward", q.shape[2], cu_seqlens)


def check_linear_attention_step(q, k, v, decay, beta, state, scale, delta_rule, normalize, qk_norm) -> None:
    op = "linear_attention_step"
    _check_heads(op, q, k, v, "D")
    _check_gates(op, q, v, decay, beta)
    check_scale(op, scale)
    _check_flags(op, delta_rule=delta_rule, normalize=normalize, qk_norm=qk_norm)
    if normalize and delta_rule:
        raise ValueError(f"fastattn.{op}: normalize is not defined with the delta rule")
    _check_state(op, "state", state, q.shape[0], q, v, normalize)
    checks.check_written(op, "state", state)
    refuse_gradients(op, (q, k, v, decay, beta, state))
