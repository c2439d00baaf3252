"""Sinkhorn, grouped and gated attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native as _native
from ...runtime import tuning as _config
from ..attention.cpu import lookup, mask_fields, unserved
from . import tuning  # noqa: F401  declares what `_config.lookup` serves


def refusal_sinkhorn(scores, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return _native.unserved_dtype(scores)


def refusal_sinkhorn_backward(grad_out, scores, *_) -> str | None:
    return _native.unserved_dtype(scores)


def refusal_grouped(q, k, v, groups, key_groups, window, scale, mask) -> str | None:
    return unserved(q, k, v) or ("it does not serve a dense mask" if mask.dense is not None else None)


def refusal_grouped_backward(
    grad_out, q, k, v, out, state, groups, key_groups, window, scale, mask
) -> str | None:
    return refusal_grouped(q, k, v, groups, key_groups, window, scale, mask)


def refusal_gated(q, k, v, assignment, sharpness, *_) -> str | None:
    return (
        unserved(q, k, v)
        or _native.unserved_dtype(assignment, "assignment")
        or _native.unserved_dtype(sharpness, "sharpness")
    )


def refusal_gated_backward(grad_out, q, k, v, assignment, sharpness, *_) -> str | None:
    return refusal_gated(q, k, v, assignment, sharpness)


def configure_grouped(q, k, v, *_) -> _config.Choice:
    return lookup("grouped_attention", q, k, v)


def configure_grouped_backward(grad_out, q, k, v, *_) -> _config.Choice:
    return lookup("grouped_attention_backward", q, k, v)


def configure_gated(q, k, v, *_) -> _config.Choice:
    return lookup("gated_attention", q, k, v)


def configure_gated_backward(grad_out, q, k, v, *_) -> _config.Choice:
    return lookup("gated_attention_backward", q, k, v)


def _call_sinkhorn(
    kernel: str, scores, lengths, cu_seqlens, temperature: float, iterations: int, causal: bool, **tensors
) -> None:
    batch, length, groups = scores.shape
    if cu_seqlens is None:
        begins, counts = torch.arange(batch) * length, torch.full((batch,), length)
    else:
        begins, counts = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    _native.run(
        kernel,
        scores=scores.contiguous().view(-1, groups),
        begins=begins.contiguous(),
        counts=(counts if lengths is None else torch.minimum(counts, lengths.long())).contiguous(),
        temperature=temperature,
        iterations=iterations,
        causal=int(causal),
        threads=_native.threads(),
        **tensors,
    )


def sinkhorn(scores, lengths, cu_seqlens, temperature, iterations, causal):
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)  # rows of no sequence
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_zeros(sequences, 1, scores.shape[2], dtype=torch.float32)
    if out.numel() and sequences:
        _call_sinkhorn(
            "sinkhorn_forward",
            scores,
            lengths,
            cu_seqlens,
            temperature,
            iterations,
            causal,
            out=out.view(-1, scores.shape[2]),
            potentials=potentials,
        )
    return out, potentials


def sinkhorn_backward(grad_out, scores, lengths, cu_seqlens, temperature, iterations, causal):
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if out.numel() and (cu_seqlens is None or cu_seqlens.shape[0] > 1):
        groups = scores.shape[2]
        _call_sinkhorn(
            "sinkhorn_backward",
            scores,
            lengths,
            cu_seqlens,
            temperature,
            iterations,
            causal,
            out=out.view(-1, groups),
            grad=grad_out.contiguous().view(-1, groups),
        )
    return out


def _call(
    kernel: str, name: str, q, k, v, groups, key_groups, window: int, scale: float, mask, **tensors
) -> None:
    _native.run(
        kernel,
        q=_native.rows(q),
        k=_native.rows(k),
        v=_native.rows(v),
        groups=groups.contiguous(),
        key_groups=key_groups.contiguous(),
        window=window,
        scale=scale,
        threads=_native.threads(),
        **mask_fields(q, k, mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def grouped_attention(q, k, v, groups, key_groups, window, scale, mask):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    state = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    if out.numel():
        _call(
            "grouped_forward",
            "grouped_attention",
            q,
            k,
            v,
            groups,
            key_groups,
            window,
            scale,
            mask,
            out=out,
            state=state,
        )
    return out, state


def grouped_attention_backward(grad_out, q, k, v, out, state, groups, key_groups, window, scale, mask):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if any(g.numel() for g in grads):
        _call(
            "grouped_backward",
            "grouped_attention_backward",
            q,
            k,
            v,
            groups,
            key_groups,
            window,
            scale,
            mask,
            grad_out=_native.rows(grad_out),
            out=_native.rows(out),
            state=state.contiguous(),
            grad_q=grads[0],
            grad_k=grads[1],
            grad_v=grads[2],
        )
    return grads


def _call_gated(
    kernel: str,
    name: str,
    q,
    k,
    v,
    assignment,
    sharpness,
    window: int,
    gate: int,
    scale: float,
    mask,
    **tensors,
) -> None:
    _native.run(
        kernel,
        q=_native.rows(q),
        k=_native.rows(k),
        v=_native.rows(v),
        assignment=assignment.float().contiguous(),
        sharpness=sharpness.float(),
        window=window,
        gate=gate,
        scale=scale,
        threads=_native.threads(),
        **mask_fields(q, k, mask),
        **lookup(name, q, k, v).values,
        **tensors,
    )


def gated_attention(q, k, v, assignment, sharpness, window, gate, scale, mask):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    state = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    if out.numel():
        _call_gated(
            "gated_attention_forward",
            "gated_attention",
            q,
            k,
            v,
            assignment,
            sharpness,
            window,
            gate,
            scale,
            mask,
            out=out,
            state=state,
        )
    return out, state


def gated_attention_backward(grad_out, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask):
    if not q.numel():  # a key head that serves no query head too
        return tuple(
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in (q, k, v, assignment, sharpness)
        )
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    tokens, groups = q.shape[2], assignment.shape[2]
    # heads handled together leave their sum at the first of them
    by_query = q.new_zeros(q.shape[0], q.shape[1], tokens, groups, dtype=torch.float32)
    by_key = q.new_zeros(q.shape[0], k.shape[1], tokens, groups, dtype=torch.float32)
    by_row = q.new_zeros(q.shape[:3], dtype=torch.float32)
    _call_gated(
        "gated_attention_backward",
        "gated_attention_backward",
        q,
        k,
        v,
        assignment,
        sharpness,
        window,
        gate,
        scale,
        mask,
        grad_out=_native.rows(grad_out),
        out=_native.rows(out),
        state=state.contiguous(),
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        grad_query_assignment=by_query,
        grad_key_assignment=by_key,
        grad_sharpness=by_row,
    )
    grad_assignment = (by_query.sum(1) + by_key.sum(1)).to(assignment.dtype)
    return *grads, grad_assignment, by_row.sum(dtype=torch.float64).to(sharpness.dtype)
