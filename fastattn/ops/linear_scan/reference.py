"""The definition of linear_scan, in plain torch, token by token."""

import itertools

import torch

from ...runtime.arithmetic import widened


def _spans(length: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    return [(0, length)] if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))


def _state(initial, like: torch.Tensor, sequence: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The row (..., D) before a sequence's first token."""
    if initial is None:
        return torch.zeros_like(like[..., 0, :])
    wide = widened(initial)
    return wide if cu_seqlens is None else wide[sequence].expand(like[..., 0, :].shape)


def linear_scan(
    a: torch.Tensor,
    b: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    reverse: bool,
    log_a: bool,
) -> torch.Tensor:
    factors = (widened(a).exp() if log_a else widened(a)).expand(b.shape).unbind(-2)
    inputs = widened(b).unbind(-2)
    out = [torch.zeros_like(x) for x in inputs]
    for s, (begin, end) in enumerate(_spans(b.shape[-2], cu_seqlens)):
        h = _state(initial, b, s, cu_seqlens) if end > begin else None
        for t in reversed(range(begin, end)) if reverse else range(begin, end):
            h = factors[t] * h + inputs[t]
            out[t] = h
    return (
        torch.stack(out, -2).to(b.dtype)
        if out
        else torch.empty_like(b, memory_format=torch.contiguous_format)
    )


def linear_scan_backward(
    grad_out: torch.Tensor,
    a: torch.Tensor,
    initial: torch.Tensor | None,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    reverse: bool,
    log_a: bool,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a, b and initial: b's is g_t = grad_t + conj(a_{t+1}) g_{t+1}, a's g_t conj(h_{t-1})."""
    wide = widened(a).exp() if log_a else widened(a)
    factors = wide.expand(out.shape).conj().unbind(-2)
    incoming, h = widened(grad_out).unbind(-2), widened(out).unbind(-2)
    grad_b = [torch.zeros_like(g) for g in incoming]
    grad_a = [torch.zeros_like(g) for g in incoming]
    grad_initial = []
    for s, (begin, end) in enumerate(_spans(out.shape[-2], cu_seqlens)):
        carried = torch.zeros_like(out[..., :1, :].sum(-2))
        first = _state(initial, out, s, cu_seqlens) if end > begin else None
        for t in range(begin, end) if reverse else reversed(range(begin, end)):
            neighbour = t + 1 if reverse else t - 1
            previous = h[neighbour] if begin <= neighbour < end else first
            grad_b[t] = incoming[t] + carried
            grad_a[t] = grad_b[t] * previous.conj()
            carried = factors[t] * grad_b[t]
        grad_initial.append(carried)
    absent = out.new_empty(0)
    of_a, of_initial = absent, absent
    if wanted & 1:
        full = torch.stack(grad_a, -2) if grad_a else wide.new_zeros(out.shape)
        of_a = full * wide.conj() if log_a else full
        of_a = of_a.sum_to_size(a.shape).to(a.dtype).contiguous()
    if wanted & 2 and initial is not None:
        rows = torch.cat([absent, *(row.reshape(-1) for row in grad_initial)])
        of_initial = rows.to(initial.dtype).view(initial.shape)
    of_b = (
        torch.stack(grad_b, -2).to(out.dtype)
        if grad_b
        else torch.zeros_like(out, memory_format=torch.contiguous_format)
    )
    return of_a, of_b, of_initial
