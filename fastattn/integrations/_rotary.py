"""The rotary embedding of attention layers that call a function of their modeling file for it.

The function is a global of that file, shared by all its models, and stays as it is. A replaced forward is the same code with a
dictionary of globals of its own, in which the one name is ours.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.rowwise import rotary_tables
from ._replaced import DEVICES, DTYPES, Left, Substituted, is_plain, is_small

# what of its tables a function reads: a number for each dim, or for each two dims, of tables of twice the width or of that width
FULL, FIRST_HALF, COMPACT = "full", "first half", "compact"
_FORMS = ((False, FULL), (True, FULL), (True, FIRST_HALF), (False, COMPACT), (True, COMPACT))


class Rotation:
    """Stands for one function (q, k, cos, sin): what it computes, by `fastattn.rotary_tables`."""

    def __init__(self, function: Callable, interleaved: bool, tables: str, partial: bool) -> None:
        self.function = function
        self.interleaved, self.tables, self.partial = interleaved, tables, partial

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or is_small(q, q.shape[-1]) or not self.serves(q, k, cos, sin):
            return self.function(q, k, cos, sin, *args, **kwargs)
        return self.ours(q, k, cos, sin)

    def ours(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        width = self._width(cos)
        if self.tables == FIRST_HALF:
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        if width == q.shape[-1]:
            return rotary_tables(q, k, cos, sin, interleaved=self.interleaved)
        turned = rotary_tables(q[..., :width], k[..., :width], cos, sin, interleaved=self.interleaved)
        return tuple(torch.cat([a, x[..., width:]], -1) for a, x in zip(turned, (q, k), strict=True))

    def _width(self, cos: Tensor) -> int:
        """How many dims of a head are turned."""
        return cos.shape[-1] * (2 if self.tables == COMPACT else 1)

    def serves(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        tensors = (q, k, cos, sin)
        if not all(is_plain(t) and t.dtype == q.dtype and t.device == q.device for t in tensors):
            return False
        if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
            return False
        width, head_dim = self._width(cos), q.shape[-1]
        return (
            q.dim() == k.dim() == 4
            and cos.dim() == 3
            and cos.shape == sin.shape
            and (q.shape[0], q.shape[2], head_dim) == (k.shape[0], k.shape[2], k.shape[3])
            and cos.shape[0] in (1, q.shape[0])
            and cos.shape[1] == q.shape[2]
            and 0 < width <= head_dim
            and width % 2 == 0
            and (width == head_dim or self.partial)
        )


class Rotated(Substituted):
    """An attention layer's own forward, with `rotary_tables` in place of the rotary function of its modeling file."""

    kind = "rotary"


def _rotation(function: Callable, device: torch.device, dtype: torch.dtype) -> Rotation:
    """What a function (q, k, cos, sin) computes. Raises Left where it is none of our forms."""
    found = []
    for form in _FORMS:
        agreed = []
        for width in (8, 4):  # all dims of a head, and half of them
            try:
                agreed.append(_agrees(Rotation(function, *form, partial=True), width, device, dtype))
            except Exception:  # the function is another one, with other arguments or shapes
                agreed.append(False)
        if agreed[0]:
            found.append(Rotation(function, *form, partial=agreed[1]))
    if len(found) != 1:
        raise Left("its rotary function is not rotary_tables of halves or of pairs")
    return found[0]


def _agrees(rotation: Rotation, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    numbers = width // 2 if rotation.tables == COMPACT else width
    for probed in dict.fromkeys((torch.float32, dtype)):
        generator = torch.Generator().manual_seed(0)
        for tables in (2, 1):
            # independent numbers for every angle: tables that are read at other places give other results
            q, k, cos, sin = (
                torch.randn(shape, generator=generator).to(device, probed)
                for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (tables, 5, numbers), (tables, 5, numbers))
            )
            if not rotation.serves(q, k, cos, sin):
                return False
            with torch.no_grad():
                expected, actual = rotation.function(q, k, cos, sin), rotation.ours(q, k, cos, sin)
            for a, b, x in zip(actual, expected, (q, k), strict=True):
                if a.shape != b.shape or a.dtype != b.dtype:
                    return False
                # two products and their sum: each is rounded, by half an eps of at most 2 x table, in one of the two or in both
                largest = x.double().abs().max() * torch.maximum(cos.abs().max(), sin.abs().max()).double()
                bound = 2 * (1 + 1 + 2) / 2 * torch.finfo(probed).eps * largest
                if not bool((a.double() - b.double()).abs().max() <= bound):
                    return False
    return True


def rotated(module: Any, known: dict[Any, Rotation | Left]) -> Rotated | None:
    """The forward of an attention layer whose rotary function is proved; None for a module that calls none. Raises Left."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(forward, "__code__", None) and forward.__code__.co_names
    called = {n: forward.__globals__[n] for n in names or () if "rotary" in n and n in forward.__globals__}
    name, function = next(
        ((n, f) for n, f in called.items() if callable(f) and not isinstance(f, type)), ("", None)
    )
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if function is None or weight is None:
        return None
    if weight.device.type not in DEVICES or weight.dtype not in DTYPES:
        raise Left(f"its weights are {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}")
    key = function, weight.device, weight.dtype
    if key not in known:
        try:
            known[key] = _rotation(*key)
        except Left as left:
            known[key] = left
    if isinstance(rotation := known[key], Left):
        raise rotation
    return Rotated(module, {name: rotation})
