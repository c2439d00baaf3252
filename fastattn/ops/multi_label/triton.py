"""The loss of rows with several positive classes in Triton: the cross-entropies' row kernel between the products of `chunked`."""

import torch

from ..cross_entropy.triton import configure, refusal, row_kernel
from . import chunked

__all__ = ["configure", "refusal"]

_NO_CLASS, _NEVER = -1, -2


def refusal_backward(grad, *members) -> str | None:
    return refusal(*members)


def _no_class(x: torch.Tensor) -> torch.Tensor:
    return torch.full(x.shape[:1], _NO_CLASS, device=x.device)


def _bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def _statistics_of(x, bias):
    loss, largest, total = x.new_empty(3, x.shape[0])  # the loss is not used: there is no target
    row_kernel(
        x, _no_class(x), bias=_bias(bias), loss=loss, largest=largest, total=total, ignore_index=_NEVER
    )
    return torch.stack((largest, total))


def _gradient_of(x, bias, kept, mass):
    one, zero = torch.ones_like(mass), torch.zeros_like(mass)
    shares = torch.stack((zero, mass, zero), 1)
    row_kernel(
        x, _no_class(x), bias=_bias(bias), grad=one, shares=shares, largest=kept[0], total=kept[1], ignore_index=_NEVER
    )  # fmt: skip


def multi_label_cross_entropy(h, weight, bias, positives):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.multi_label_cross_entropy(_statistics_of, mib, h, weight, bias, positives)


def multi_label_cross_entropy_backward(grad, h, weight, *members):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.multi_label_cross_entropy_backward(_gradient_of, mib, grad, h, weight, *members)
