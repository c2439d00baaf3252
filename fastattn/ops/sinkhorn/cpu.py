"""Sinkhorn on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native


def refusal(scores, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return native.unserved_dtype(scores)


def refusal_backward(grad_out, scores, *_) -> str | None:
    return native.unserved_dtype(scores)


def _call(
    kernel: str,
    scores,
    lengths,
    cu_seqlens,
    prefix_lengths,
    temperature: float,
    iterations: int,
    causal: bool,
    **tensors,
) -> None:
    batch, length, groups = scores.shape
    if cu_seqlens is None:
        begins, counts = torch.arange(batch) * length, torch.full((batch,), length)
    else:
        begins, counts = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    counts = counts if lengths is None else torch.minimum(counts, lengths.long())
    prefixes = None if prefix_lengths is None else torch.minimum(counts, prefix_lengths.long()).contiguous()
    native.run(
        kernel,
        scores=scores.contiguous().view(-1, groups),
        begins=begins.contiguous(),
        counts=counts.contiguous(),
        prefixes=prefixes,
        temperature=temperature,
        iterations=iterations,
        causal=int(causal),
        threads=native.threads(),
        **tensors,
    )


def sinkhorn(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
    # zeros for rows that belong to no sequence
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_zeros(sequences, 1, scores.shape[2], dtype=torch.float32)
    if out.numel() and sequences:
        _call(
            "sinkhorn_forward",
            scores,
            lengths,
            cu_seqlens,
            prefix_lengths,
            temperature,
            iterations,
            causal,
            out=out.view(-1, scores.shape[2]),
            potentials=potentials,
        )
    return out, potentials


def sinkhorn_backward(grad_out, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if out.numel() and (cu_seqlens is None or cu_seqlens.shape[0] > 1):
        groups = scores.shape[2]
        _call(
            "sinkhorn_backward",
            scores,
            lengths,
            cu_seqlens,
            prefix_lengths,
            temperature,
            iterations,
            causal,
            out=out.view(-1, groups),
            grad=grad_out.contiguous().view(-1, groups),
        )
    return out
