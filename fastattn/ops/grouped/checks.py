"""What sinkhorn, grouped and gated attention ask of their arguments, whoever calls them."""

import itertools

import torch

from ... import masks
from ...runtime import checks as _checks
from ...runtime import native as _native
from ..attention.checks import check_qkv, check_results, check_scale

MAX_GROUPS = _native.limits.groups
MAX_ITERATIONS = _native.limits.iterations
GATES = ("multiply", "log")


def check_group_count(op: str, name: str, value: torch.Tensor) -> int:
    groups = value.shape[2]
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(
            f"fastattn.{op}: {name} must be (B, L, G) with G in [1, {MAX_GROUPS}], given G = {groups}"
        )
    return groups


# --- sinkhorn --------------------------------------------------------------------------------------------------------


def _check_sinkhorn(op: str, scores, lengths, cu_seqlens, temperature, iterations, causal) -> None:
    _checks.check_tensor(op, "scores", scores, dims=3)
    _checks.check_floating(op, scores=scores)
    check_group_count(op, "scores", scores)
    _checks.check_positive(op, "temperature", temperature)
    if isinstance(iterations, bool) or not isinstance(iterations, (int, torch.SymInt)) or iterations < 1:
        raise ValueError(f"fastattn.{op}: iterations must be an integer of at least 1, given {iterations!r}")
    if iterations > MAX_ITERATIONS:
        raise ValueError(f"fastattn.{op}: iterations must be at most {MAX_ITERATIONS}, given {iterations}")
    sequences = scores.shape[0]
    if cu_seqlens is not None:
        _checks.check_integer(op, "cu_seqlens", cu_seqlens, dims=1)
        _checks.check_same_device(op, scores=scores, cu_seqlens=cu_seqlens)
        if sequences != 1:
            raise ValueError(f"fastattn.{op}: cu_seqlens needs a batch of one, given {sequences}")
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"fastattn.{op}: cu_seqlens must have at least one entry, given none")
        sequences = cu_seqlens.shape[0] - 1
    if lengths is not None:
        _checks.check_integer(op, "lengths", lengths, dims=1)
        _checks.check_same_device(op, scores=scores, lengths=lengths)
        _checks.check_shape(op, "lengths", lengths, (sequences,), "one a sequence")


def check_sinkhorn(scores, lengths, cu_seqlens, temperature, iterations, causal) -> None:
    _check_sinkhorn("sinkhorn", scores, lengths, cu_seqlens, temperature, iterations, causal)


def check_sinkhorn_backward(grad_out, scores, lengths, cu_seqlens, temperature, iterations, causal) -> None:
    op = "sinkhorn_backward"
    _check_sinkhorn(op, scores, lengths, cu_seqlens, temperature, iterations, causal)
    _checks.check_like(op, "grad_out", grad_out, "scores", scores)


def _sinkhorn_contents(op: str, scores, lengths, cu_seqlens) -> None:
    longest = scores.shape[1]
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        cuts = cu_seqlens.tolist()
        spans = [end - begin for begin, end in itertools.pairwise(cuts)]
        if cuts[0] != 0 or min(spans, default=0) < 0 or cuts[-1] > longest:
            raise ValueError(
                f"fastattn.{op}: cu_seqlens must start at 0, not decrease and end at most at {longest}, given {cuts}"
            )
        for i, (length, span) in enumerate(
            zip(lengths.tolist() if lengths is not None else (), spans, strict=False)
        ):
            if not 0 <= length <= span:
                raise ValueError(
                    f"fastattn.{op}: lengths[{i}] must lie in [0, {span}], its document, given {length}"
                )
        return
    if lengths is not None:
        _checks.check_range(op, "lengths", lengths, 0, longest + 1)


def check_sinkhorn_contents(scores, lengths, cu_seqlens, *_) -> None:
    _sinkhorn_contents("sinkhorn", scores, lengths, cu_seqlens)


def check_sinkhorn_backward_contents(grad_out, scores, lengths, cu_seqlens, *_) -> None:
    _sinkhorn_contents("sinkhorn_backward", scores, lengths, cu_seqlens)


# --- grouped and gated attention -------------------------------------------------------------------------------------


def _check_causal(op: str, q, k, v, window, scale, mask) -> None:
    check_qkv(op, q, k, v)
    if _checks.as_integer(window) is None or window < 0:
        raise ValueError(f"fastattn.{op}: window must be an integer of zero or more, given {window!r}")
    if window > masks.LONGEST:
        raise ValueError(f"fastattn.{op}: window must be at most {masks.LONGEST}, given {window}")
    check_scale(op, scale)
    if mask.prefix_lengths is not None:
        raise NotImplementedError(
            f"fastattn.{op}: mask.prefix_lengths lets tokens see later ones; this op is causal"
        )
    if not mask.causal:
        raise NotImplementedError(f"fastattn.{op}: causal must be True; this op is causal")
    masks.check_args(op, q, k, mask)


def check_signatures(op: str, name: str, value: torch.Tensor, q: torch.Tensor, length: int) -> None:
    """(B, length), an integer each."""
    _checks.check_integer(op, name, value, dims=2)
    _checks.check_same_device(op, q=q, **{name: value})
    _checks.check_shape(op, name, value, (q.shape[0], length), "batch and length")


def _check_grouped(op: str, q, k, v, groups, key_groups, window, scale, mask) -> None:
    _check_causal(op, q, k, v, window, scale, mask)
    for name, value, length in (("groups", groups, q.shape[2]), ("key_groups", key_groups, k.shape[2])):
        check_signatures(op, name, value, q, length)
        if value.dtype != torch.int64:
            raise TypeError(f"fastattn.{op}: {name} must be int64, given {_checks.describe(value)}")


def check_grouped_attention(q, k, v, groups, key_groups, window, scale, mask) -> None:
    _check_grouped("grouped_attention", q, k, v, groups, key_groups, window, scale, mask)


def check_grouped_attention_backward(
    grad_out, q, k, v, out, state, groups, key_groups, window, scale, mask
) -> None:
    op = "grouped_attention_backward"
    _check_grouped(op, q, k, v, groups, key_groups, window, scale, mask)
    check_results(op, grad_out, q, v, out, state, "state", (*q.shape[:3], 2))


def check_grouped_contents(q, k, v, groups, key_groups, *_) -> None:
    highest = torch.iinfo(torch.int64).max
    for name, value in (("groups", groups), ("key_groups", key_groups)):
        if name == "groups" or value is not groups:
            _checks.check_range("grouped_attention", name, value, 0, highest, also=highest)


def _check_gated(op: str, q, k, v, assignment, sharpness, window, gate, scale, mask) -> None:
    _check_causal(op, q, k, v, window, scale, mask)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"fastattn.{op}: k has {k.shape[2]} tokens, q has {q.shape[2]}; they must agree (decoding uses grouped_attention)"
        )
    _checks.check_tensor(op, "assignment", assignment, dims=3)
    _checks.check_floating(op, assignment=assignment)
    _checks.check_floating(op, sharpness=sharpness)
    _checks.check_same_device(op, q=q, assignment=assignment, sharpness=sharpness)
    if assignment.shape[:2] != (q.shape[0], q.shape[2]) or assignment.shape[2] == 0:
        raise ValueError(
            f"fastattn.{op}: assignment must have shape (B, L, G) = ({q.shape[0]}, {q.shape[2]}, 1 or more), "
            f"given {tuple(assignment.shape)}"
        )
    if sharpness.dim():
        raise ValueError(f"fastattn.{op}: sharpness must be a scalar, given {_checks.describe(sharpness)}")
    if not 0 <= gate < len(GATES):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(GATES))
        raise ValueError(f"fastattn.{op}: gate must be one of {known}, given {gate}")


def check_gated_attention(q, k, v, assignment, sharpness, window, gate, scale, mask) -> None:
    _check_gated("gated_attention", q, k, v, assignment, sharpness, window, gate, scale, mask)


def check_gated_attention_backward(
    grad_out, q, k, v, assignment, sharpness, out, state, window, gate, scale, mask
) -> None:
    op = "gated_attention_backward"
    _check_gated(op, q, k, v, assignment, sharpness, window, gate, scale, mask)
    check_results(op, grad_out, q, v, out, state, "state", (*q.shape[:3], 2))
