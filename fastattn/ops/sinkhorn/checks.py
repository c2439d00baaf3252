"""The checks of sinkhorn's arguments, run for every caller."""

import itertools

import torch

from ...runtime import checks, native
from .. import documents
from ..focus import check_group_count

MAX_ITERATIONS = native.limits.iterations


def _check_sinkhorn(
    op: str, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal
) -> None:
    checks.check_tensor(op, "scores", scores, dims=3)
    checks.check_floating(op, scores=scores)
    check_group_count(op, "scores", scores)
    checks.check_positive(op, "temperature", temperature)
    if isinstance(iterations, bool) or not isinstance(iterations, (int, torch.SymInt)) or iterations < 1:
        raise ValueError(f"fastattn.{op}: iterations must be an integer of at least 1, given {iterations!r}")
    if iterations > MAX_ITERATIONS:
        raise ValueError(f"fastattn.{op}: iterations must be at most {MAX_ITERATIONS}, given {iterations}")
    sequences = documents.check_offsets(op, "scores", scores, scores.shape[0], cu_seqlens)
    for name, value in (("lengths", lengths), ("prefix_lengths", prefix_lengths)):
        if value is not None:
            checks.check_integer(op, name, value, dims=1)
            checks.check_same_device(op, scores=scores, **{name: value})
            checks.check_shape(op, name, value, (sequences,), "one a sequence")
    if prefix_lengths is not None and not causal:
        raise ValueError(f"fastattn.{op}: prefix_lengths needs causal to be True")


def check_sinkhorn(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal) -> None:
    _check_sinkhorn("sinkhorn", scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal)


def check_sinkhorn_backward(
    grad_out, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal
) -> None:
    op = "sinkhorn_backward"
    _check_sinkhorn(op, scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal)
    checks.check_like(op, "grad_out", grad_out, "scores", scores)


def _sinkhorn_contents(op: str, scores, lengths, cu_seqlens, prefix_lengths) -> None:
    longest = scores.shape[1]
    counted = {"lengths": lengths, "prefix_lengths": prefix_lengths}
    cuts = documents.check_offsets_contents(op, longest, cu_seqlens)
    if cuts is not None:
        spans = [end - begin for begin, end in itertools.pairwise(cuts)]
        for name, value in counted.items():
            for i, (length, span) in enumerate(
                zip(value.tolist() if value is not None else (), spans, strict=False)
            ):
                if not 0 <= length <= span:
                    raise ValueError(
                        f"fastattn.{op}: {name}[{i}] must lie in [0, {span}], the length of its document, given {length}"
                    )
        return
    for name, value in counted.items():
        if value is not None:
            checks.check_range(op, name, value, 0, longest + 1)


def check_sinkhorn_contents(scores, lengths, cu_seqlens, prefix_lengths, *_) -> None:
    _sinkhorn_contents("sinkhorn", scores, lengths, cu_seqlens, prefix_lengths)


def check_sinkhorn_backward_contents(grad_out, scores, lengths, cu_seqlens, prefix_lengths, *_) -> None:
    _sinkhorn_contents("sinkhorn_backward", scores, lengths, cu_seqlens, prefix_lengths)
