"""A linear layer on a few rows, as decoding has: bound by reading the weights."""

from typing import TypeGuard, TypeVar

import torch

from ...runtime.registry import call, needs_grad, requested
from . import cpu, schema  # noqa: F401  the second registers the op

MOST_ROWS = cpu.MOST_ROWS
Kind = TypeVar("Kind", bound=torch.nn.Module)


def matvec(x: torch.Tensor, weight: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """x @ weight.T, float32 sums and one rounding.

    x: (..., K); weight: (N, K), of x's dtype. Returns (..., N). Differentiable in both. The CPU kernel serves up to 8
    rows; more, and GPUs, go to the reference, which is the library's product. Raises ValueError or TypeError naming the argument.
    """
    return call("matvec", x, weight, requested("matvec", backend))


def is_unchanged(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling the module runs what class `kind` says, and nobody listens; an instance's own forward is a wrapper."""
    own = module.__dict__  # nn.Module's attributes cost a function call each
    return (
        type(module) is kind
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
    )


def is_plain(layer: object) -> TypeGuard[torch.nn.Linear]:
    """Whether calling the layer is its product and nothing more."""
    if not is_unchanged(layer, torch.nn.Linear):
        return False
    parameters = layer._parameters
    return type(parameters.get("weight")) is torch.nn.Parameter and parameters.get("bias", layer) is None


def linear(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """`layer(x)`; by `matvec` where the layer is a plain nn.Linear without bias, x a few half-precision rows on the CPU,
    and nothing is to be differentiated: torch's own bf16 product of one row is far from memory's speed there."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype not in (torch.bfloat16, torch.float16)
        or x.numel() > MOST_ROWS * x.shape[-1]
        or not is_plain(layer)
        or layer.weight.dtype != x.dtype
        or needs_grad((x, layer.weight))
    ):
        return layer(x)
    return matvec(x, layer.weight)
