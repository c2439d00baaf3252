"""The declaration of torch.ops.fastattn.matvec."""

import math
from typing import NamedTuple

import torch

from ...runtime.backends import cpu_backend, reference_backend
from ...runtime.declare import Autograd, declare, save
from . import cpu, reference
from .checks import check_matvec


class Call(NamedTuple):
    x: torch.Tensor  # (..., K), few rows
    weight: torch.Tensor  # (N, K)


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    save(ctx, x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        rows = math.prod(x.shape[:-1])
        grad_weight = grad.reshape(rows, grad.shape[-1]).T @ x.reshape(rows, x.shape[-1])
    return grad_x, grad_weight, None


declare(
    "matvec",
    Call,
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
    check=check_matvec,
    backends=(
        cpu_backend(cpu.matvec, cpu.refusal, cpu.configure),
        reference_backend(reference.matvec),
    ),
    gradients=Autograd(_setup, _backward, twice=True),
)
