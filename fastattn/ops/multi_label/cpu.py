"""The loss of rows with several positive classes on the CPU: the cross-entropies' row kernel between the products of `chunked`."""

import torch

from ..cross_entropy.cpu import Statistics, configure, refusal, run_rows
from . import chunked

__all__ = ["configure", "refusal"]


def refusal_backward(grad, *members) -> str | None:
    return refusal(*members)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _no_class(x: torch.Tensor) -> torch.Tensor:
    return torch.full(x.shape[:1], -1)


def _statistics_of(x, bias):
    statistics = Statistics(x)
    run_rows(x, _no_class(x), 0, x.shape[0], bias=_float(bias), statistics=statistics)
    return statistics.kept()


def _gradient_of(x, bias, kept, mass):
    no_gradient = torch.zeros_like(mass)
    run_rows(x, _no_class(x), 0, x.shape[0], bias=_float(bias), kept=kept, grad=no_gradient, mass=mass)


def multi_label_cross_entropy(h, weight, bias, positives):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.multi_label_cross_entropy(_statistics_of, mib, h, weight, bias, positives)


def multi_label_cross_entropy_backward(grad, h, weight, *members):
    mib = configure(h, weight).values["chunk_mib"]
    return chunked.multi_label_cross_entropy_backward(_gradient_of, mib, grad, h, weight, *members)
