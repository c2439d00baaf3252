"""Small typical calls of every op, from `examples.py` in the op's folder: what lists ops (the `doctor`, the README, the tests of
every op) is made from them, so an op appears there by existing."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One call of an op's public function: function(**tensors, **options).

    gradients: whether the op is differentiable in the call's floating tensors.
    """

    function: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        return self.tensors | self.options

    @property
    def floating(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self.tensors.items() if t.is_floating_point()}


class Make:
    """The tensors of examples: of one dtype and device, the same in every process."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def shares(self, *shape: int) -> torch.Tensor:
        """Rows that sum to 1."""
        return torch.randn(shape, generator=self._generator).softmax(-1).to(self.device, self.dtype)

    def whole(self, limit: int, *shape: int) -> torch.Tensor:
        """int64 in [0, limit)."""
        return torch.randint(0, limit, shape, generator=self._generator).to(self.device)

    def count(self, length: int) -> torch.Tensor:
        """0, 1, 2, ..."""
        return torch.arange(length).to(self.device)


def examples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Example]:
    """{name: example}; a name is the public function's, or it and what the call shows: "attention, decoding"."""
    from .. import ops

    found: dict[str, Example] = {}
    for package in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if package.ispkg:
            module = importlib.import_module(f"{package.name}.examples")
            found |= module.examples(Make(dtype, device))
    return found
