"""One rule for a module that nobody has touched, and the linear layers that follow it.

A fused product, the matvec kernel and the decode step each compute what a module's own forward would, without calling it. They
may only where the call would run that forward and nothing else.
"""

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.matvec import MOST_ROWS, matvec
from ..runtime.registry import needs_grad

Kind = TypeVar("Kind", bound=nn.Module)
_forwards: dict[type, Callable] = {nn.Linear: nn.Linear.forward}


def replaceable(kind: type[Kind]) -> type[Kind]:
    """Class decorator: a fast path may stand for the forward that the class has now."""
    _forwards[kind] = kind.forward
    return kind


def is_untouched(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling `module` runs the forward that `kind` was defined with, and nothing before, after or in place of it.

    Not so for a subclass (a parametrization makes one, and so does FSDP), with a forward on the instance or a new one on the
    class, and with hooks: the module's own or those of all modules.
    """
    own = module.__dict__  # nn.Module's attributes cost a function call each
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and kind.forward is _forwards[kind]
        and not _has_any_global_hook()
    )


def plain_weight(layer: object, dtype: torch.dtype) -> Tensor | None:
    """The weight of an untouched nn.Linear without bias, where it has this dtype: calling the layer is a product with it."""
    if not is_untouched(layer, nn.Linear):
        return None
    parameters = layer._parameters
    weight = parameters.get("weight")
    # functional_call puts a tensor for the parameter; a subclass of either may mean something else by a product
    if (
        weight is None
        or type(weight) not in (nn.Parameter, Tensor)
        or parameters.get("bias", layer) is not None
    ):
        return None
    return weight if weight.dtype == dtype else None


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """`layer(x)`; by `matvec` where the layer is a plain product, x a few half-precision rows on the CPU, and nothing is to be
    differentiated: torch's own bf16 product of one row is far from memory's speed there."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype not in (torch.bfloat16, torch.float16)
        or x.numel() > MOST_ROWS * x.shape[-1]
    ):
        return layer(x)
    weight = plain_weight(layer, x.dtype)
    return layer(x) if weight is None or needs_grad((x, weight)) else matvec(x, weight)
