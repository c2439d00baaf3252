"""Linear attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native
from ...runtime.declare import gradient_like
from .. import documents
from .checks import kept_states

MAX_DIM = native.limits.state_dim


def _unserved(q, v, decay, beta) -> str | None:
    refusal = native.unserved_dtype(q)
    for name, gate in (("decay", decay), ("beta", beta)):
        if refusal is None and gate is not None and gate.dtype not in native.FAST_DTYPES:
            refusal = native.unserved_dtype(gate, name)
    if refusal is None and max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        refusal = f"it serves head dims up to {MAX_DIM}, not {max(q.shape[-1], v.shape[-1])}"
    return refusal


def refusal(q, k, v, decay, beta, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return _unserved(q, v, decay, beta)


def refusal_backward(grad_out, grad_state, *members) -> str | None:
    return refusal(*members)


def refusal_step(q, k, v, decay, beta, *_) -> str | None:
    return _unserved(q, v, decay, beta)


def linear_attention(*members):
    return linear_attention_leading(3, *members)


def linear_attention_leading(
    reads, q, k, v, decay, beta, initial_state, cu_seqlens, scale, delta_rule, normalize, qk_norm, causal
):
    """(out, state, states); or (out, state), without the states that the backward needs."""
    sequences = documents.count(q.shape[0], cu_seqlens)
    shape = (q.shape[3], v.shape[3] + int(normalize))
    new = v.new_empty if cu_seqlens is None else v.new_zeros  # zeros for rows after the last document
    out = new(v.shape)
    state = v.new_empty(sequences, v.shape[1], *shape, dtype=torch.float32)
    states = None
    if reads > 2:
        num_states = kept_states(v.shape[2], causal, cu_seqlens)
        # zeros for states that are not used, where documents end within a chunk
        new = v.new_empty if cu_seqlens is None else v.new_zeros
        states = new(*v.shape[:2], num_states, *shape, dtype=torch.float32)
    _call(
        "linear_attention_forward",
        q,
        k,
        v,
        decay,
        beta,
        cu_seqlens,
        *_parts(q, v, sequences, normalize),
        initial=None if initial_state is None else native.rows(initial_state),
        out=out,
        state=state,
        states=None if states is None else states.flatten(1, 2),
        scale=scale,
        delta_rule=int(delta_rule),
        normalize=int(normalize),
        qk_norm=int(qk_norm),
        causal=int(causal),
    )
    return (out, state) if states is None else (out, state, states)


def linear_attention_backward(
    grad_out, grad_state, q, k, v, decay, beta, initial_state, out, states,
    cu_seqlens, scale, delta_rule, normalize, qk_norm, causal, wanted,
):  # fmt: skip
    batch = q.shape[0]
    sequences = documents.count(batch, cu_seqlens)
    head_parts, value_parts = _parts(q, v, sequences, normalize)
    parts = head_parts * value_parts
    new = torch.empty if cu_seqlens is None else torch.zeros  # zeros for rows after the last document
    keys = (parts * batch, *q.shape[1:])
    grad_q, grad_k = (new(keys, dtype=q.dtype if parts == 1 else torch.float32) for _ in range(2))
    grad_v = new(v.shape, dtype=v.dtype)
    rows = (value_parts, *v.shape[:3])
    needs_decay, needs_beta = decay is not None and wanted & 1, beta is not None and wanted & 2
    channels = decay is not None and decay.dim() == 4
    shape = (value_parts * batch, *decay.shape[1:]) if channels else rows
    grad_decay = new(shape, dtype=torch.float32) if needs_decay else None
    grad_beta = new(rows, dtype=torch.float32) if needs_beta else None
    grad_initial = gradient_like(initial_state, q, bool(wanted & 4))
    _call(
        "linear_attention_backward",
        q,
        k,
        v,
        decay,
        beta,
        cu_seqlens,
        head_parts,
        value_parts,
        states=states.contiguous().flatten(1, 2),
        grad_out=native.rows(grad_out),
        grad_state=None if grad_state is None else native.rows(grad_state),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
        grad_decay=None if channels else grad_decay,
        grad_channels=grad_decay if channels else None,
        grad_beta=grad_beta,
        grad_initial=grad_initial if grad_initial.dim() == 4 else None,
        scale=scale,
        delta_rule=int(delta_rule),
        normalize=int(normalize),
        qk_norm=int(qk_norm),
        causal=int(causal),
    )
    if parts > 1:
        grad_q, grad_k = (g.unflatten(0, (parts, batch)).sum(0).to(q.dtype) for g in (grad_q, grad_k))
    absent = q.new_empty(0)
    if grad_decay is not None:
        grad_decay = grad_decay.view(rows + tuple(decay.shape[3:])).sum((0, 1, 3) if decay.dim() == 1 else 0)
    return (
        grad_q,
        grad_k,
        grad_v,
        absent if grad_decay is None else grad_decay.to(decay.dtype),
        absent if grad_beta is None else grad_beta.sum(0).to(beta.dtype),
        grad_initial,
    )


def linear_attention_step(q, k, v, decay, beta, state, scale, delta_rule, normalize, qk_norm):
    out = v.new_empty(v.shape)
    if not out.numel():
        return out
    channels = decay is not None and decay.dim() == 3
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(v.shape[:2])
    contiguous_state = state if state.stride(3) == 1 or state.shape[3] == 1 else state.contiguous()
    native.run(
        "linear_attention_step",
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        decay=None if channels or decay is None else decay.float(),
        channels=native.rows(decay.float()) if channels else None,
        beta=None if beta is None else beta.float(),
        state=contiguous_state,
        out=out,
        scale=scale,
        delta_rule=int(delta_rule),
        normalize=int(normalize),
        qk_norm=int(qk_norm),
        threads=native.threads(),
    )
    if contiguous_state is not state:
        state.copy_(contiguous_state)
    return out


def _parts(q, v, sequences: int, normalize: bool) -> tuple[int, int]:
    """(parts of a key head's value heads, parts of a value head's columns): the fewest parts for which the busiest thread has the least
    work. Fewer are better because every part recomputes the scores of its key head."""
    units, threads = sequences * q.shape[1], native.threads()
    group = v.shape[1] // q.shape[1] if q.shape[1] else 0
    if not units or not group:
        return 1, 1

    def busiest(parts: int, items: int, units: int) -> int:
        return -(-units * parts // threads) * -(-items // parts)

    heads = min(range(1, group + 1), key=lambda parts: busiest(parts, group, units))
    if heads < group or normalize or units * group >= threads:
        return heads, 1
    panels = -(-v.shape[3] // 16)
    return heads, min(range(1, panels + 1), key=lambda parts: busiest(parts, panels, units * group))


def _gate(gate: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor | None:
    """gate as (1, B, Hv, L) float32, any strides."""
    if gate is None:
        return None
    if gate.dim() == 1:
        gate = gate[None, :, None].expand(v.shape[:3])
    return gate.float()[None]


def _call(kernel: str, q, k, v, decay, beta, cu_seqlens, head_parts: int, value_parts: int, **fields) -> None:
    channels = decay is not None and decay.dim() == 4
    native.run(
        kernel,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        decay=None if channels else _gate(decay, v),
        channels=native.rows(decay) if channels else None,
        beta=_gate(beta, v),
        offsets=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        head_parts=head_parts,
        value_parts=value_parts,
        threads=native.threads(),
        **fields,
    )
