"""The checks of grouped attention's arguments, run for every caller."""

import torch

from ...runtime import checks
from ..attention.checks import check_results
from ..focus import check_causal, check_grad_lse


def check_signatures(op: str, name: str, value: torch.Tensor, q: torch.Tensor, length: int) -> None:
    """value is (B, length), int32 or int64."""
    checks.check_integer(op, name, value, dims=2)
    checks.check_same_device(op, q=q, **{name: value})
    checks.check_shape(op, name, value, (q.shape[0], length), "batch and length")


def _check_grouped(op: str, q, k, v, groups, key_groups, window, scale, mask) -> None:
    check_causal(op, q, k, v, window, scale, mask)
    for name, value, length in (("groups", groups, q.shape[2]), ("key_groups", key_groups, k.shape[2])):
        check_signatures(op, name, value, q, length)
        if value.dtype != torch.int64:
            raise TypeError(f"fastattn.{op}: {name} must be int64, given {checks.describe(value)}")


def check_grouped_attention(q, k, v, groups, key_groups, window, scale, mask) -> None:
    _check_grouped("grouped_attention", q, k, v, groups, key_groups, window, scale, mask)


def check_grouped_attention_backward(
    grad_out, grad_lse, q, k, v, out, state, groups, key_groups, window, scale, mask
) -> None:
    op = "grouped_attention_backward"
    _check_grouped(op, q, k, v, groups, key_groups, window, scale, mask)
    check_results(op, grad_out, q, v, out, state, "state", (*q.shape[:3], 2))
    check_grad_lse(op, grad_lse, q)


def check_grouped_contents(q, k, v, groups, key_groups, *_) -> None:
    highest = torch.iinfo(torch.int64).max
    for name, value in (("groups", groups), ("key_groups", key_groups)):
        if name == "groups" or value is not groups:
            checks.check_range("grouped_attention", name, value, 0, highest, also=highest)
