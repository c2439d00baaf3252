"""The arithmetic of attention's definitions: 16-bit inputs are converted to float32, and the result is rounded once."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_HALF = (torch.bfloat16, torch.float16)
_every_step = False


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it has that dtype."""
    return x if x.dtype == torch.float64 else x.float()


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if its dtype has 16 bits, else itself."""
    return x.float() if x.dtype in _HALF and not _every_step else x


def rounded_once(definition: Callable) -> Callable:
    """A definition that converts its 16-bit arguments to float32 and rounds its first result to the first argument's dtype."""

    @functools.wraps(definition)
    def run(*args):
        out, *others = definition(*(widened(a) if isinstance(a, torch.Tensor) else a for a in args))
        return out.to(args[0].dtype), *others

    return run


def residual_of(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rounding error of `out`, a definition's first result, in the dtype of `like`, which has 16 bits; 0 where it is not finite."""
    error = (out - out.to(like.dtype)).to(like.dtype)
    return torch.where(error.isfinite(), error, 0.0)


@contextmanager
def rounding_every_step() -> Iterator[None]:
    """Inside the block, attention's definitions compute in their inputs' dtype and round after every step, as eager torch code does.
    Process-wide."""
    global _every_step
    previous, _every_step = _every_step, True
    try:
        yield
    finally:
        _every_step = previous
