"""The arithmetic of attention's definitions: 16-bit inputs are computed with in float32, and the result is rounded once."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_HALF = (torch.bfloat16, torch.float16)
_every_step = False


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if its dtype has 16 bits, else itself."""
    return x.float() if x.dtype in _HALF and not _every_step else x


def rounded_once(definition: Callable) -> Callable:
    """The definition with its 16-bit arguments in float32, its first result rounded to the first argument's dtype."""

    @functools.wraps(definition)
    def run(*args):
        out, *rest = definition(*(widened(a) if isinstance(a, torch.Tensor) else a for a in args))
        return out.to(args[0].dtype), *rest

    return run


def residual_of(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What rounding takes from `out`, a definition's first result, where `like` has 16 bits: in its dtype, 0 for what is infinite."""
    lost = (out - out.to(like.dtype)).to(like.dtype)
    return torch.where(lost.isfinite(), lost, 0.0)


@contextmanager
def rounding_every_step() -> Iterator[None]:
    """Definitions of attention in their inputs' dtype, every step rounded to it, as eager torch code has it: process-wide."""
    global _every_step
    before, _every_step = _every_step, True
    try:
        yield
    finally:
        _every_step = before
