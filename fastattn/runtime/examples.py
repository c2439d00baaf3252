"""Typical calls of every op, from `examples` in the op's folder. Every list of ops is made from them, so a new op is in all of
them: `doctor`, the README's table, the tests of every op on each backend, the launches that are compiled ahead of time,
`make gpu-check`, and the tuner's calls of an op that has no `workload.py`."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One call of an op's public function: function(**tensors, **options).

    gradients: whether the op is differentiable with respect to the call's floating tensors.
    """

    function: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        return self.tensors | self.options

    def refusal(self, backend: str) -> str | None:
        """Why the backend of this name would not serve the call on a device that it serves, or None."""
        from .explain import collecting

        with torch.no_grad(), collecting() as calls:
            self.function(**self.arguments)
        op, _, _, members = calls[0]
        candidate = next((b for b in op.backends if b.name == backend), None)
        return f"{op.name} has no {backend} backend" if candidate is None else candidate.supports(*members)

    @property
    def floating(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self.tensors.items() if t.is_floating_point()}


class Make:
    """Makes the tensors of examples, of one dtype and on one device, with the same values in every process.

    large: `size` returns the sizes that are worth tuning for.
    longer: added to every `length`, the sizes that differ from call to call.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        large: bool = False,
        longer: int = 0,
        seed: int = 1,
    ) -> None:
        self.dtype, self.device, self.large, self.longer = dtype, device, large, longer
        self._generator = torch.Generator().manual_seed(seed)

    def size(self, small: int, large: int) -> int:
        return large if self.large else small

    def length(self, count: int) -> int:
        """A number of tokens, rows or cache positions: a size in which a model's calls differ."""
        return count + self.longer

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def shares(self, *shape: int) -> torch.Tensor:
        """Positive values, rows of sum 1."""
        return torch.randn(shape, generator=self._generator).softmax(-1).to(self.device, self.dtype)

    def whole(self, limit: int, *shape: int) -> torch.Tensor:
        """Random int64 in [0, limit)."""
        return torch.randint(0, limit, shape, generator=self._generator).to(self.device)

    def count(self, length: int) -> torch.Tensor:
        """0, 1, 2, ..."""
        return torch.arange(length).to(self.device)


def modules() -> Iterator[ModuleType]:
    """Each op's module that has `examples`: `examples.py` in its folder, or the folder's `__init__.py` where there is none."""
    from .. import ops

    for package in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if package.ispkg:
            own = f"{package.name}.examples"
            yield importlib.import_module(own if importlib.util.find_spec(own) else package.name)


def examples(dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> dict[str, Example]:
    """{name: example}. A name is the public function's, perhaps with what the call shows: "attention, decoding".

    options: keyword arguments of `Make`.
    """
    result: dict[str, Example] = {}
    for module in modules():
        result |= module.examples(Make(dtype, device, **options))
    return result
