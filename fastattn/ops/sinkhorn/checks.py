"""What sinkhorn asks of its arguments, whoever calls it."""

import itertools

import torch

from ...runtime import checks, native
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
    sequences = scores.shape[0]
    if cu_seqlens is not None:
        checks.check_integer(op, "cu_seqlens", cu_seqlens, dims=1)
        checks.check_same_device(op, scores=scores, cu_seqlens=cu_seqlens)
        if sequences != 1:
            raise ValueError(f"fastattn.{op}: cu_seqlens needs a batch of one, given {sequences}")
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"fastattn.{op}: cu_seqlens must have at least one entry, given none")
        sequences = cu_seqlens.shape[0] - 1
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
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        cuts = cu_seqlens.tolist()
        spans = [end - begin for begin, end in itertools.pairwise(cuts)]
        if cuts[0] != 0 or min(spans, default=0) < 0 or cuts[-1] > longest:
            raise ValueError(
                f"fastattn.{op}: cu_seqlens must start at 0, not decrease and end at most at {longest}, given {cuts}"
            )
        for name, value in counted.items():
            for i, (length, span) in enumerate(
                zip(value.tolist() if value is not None else (), spans, strict=False)
            ):
                if not 0 <= length <= span:
                    raise ValueError(
                        f"fastattn.{op}: {name}[{i}] must lie in [0, {span}], its document, given {length}"
                    )
        return
    for name, value in counted.items():
        if value is not None:
            checks.check_range(op, name, value, 0, longest + 1)


def check_sinkhorn_contents(scores, lengths, cu_seqlens, prefix_lengths, *_) -> None:
    _sinkhorn_contents("sinkhorn", scores, lengths, cu_seqlens, prefix_lengths)


def check_sinkhorn_backward_contents(grad_out, scores, lengths, cu_seqlens, prefix_lengths, *_) -> None:
    _sinkhorn_contents("sinkhorn_backward", scores, lengths, cu_seqlens, prefix_lengths)
