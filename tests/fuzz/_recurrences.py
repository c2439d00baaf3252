"""What the families of recurrences share: a call of an op beside its definition in float64, and what sums of products may be off by.

A sum of products of numbers that are off by something each is off by the difference between the same sum of their magnitudes with
what they are off by and that without it, and by a rounding u of the whole for every operation that a term goes through on its way:
`Product`. A number below the normal ones is rounded to a multiple of 2^-149, and what that loses may be multiplied by other operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from _steps import LEAST, Off, U

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
}
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 150)
LARGEST = 1e37  # what lies beyond may overflow on the way


class Unknown(Exception):
    """Nothing is said of a call: numbers on the way may overflow, or roundings are no longer small beside them."""


def share(roundings: int) -> float:
    """What so many roundings one after another make of a number, of it."""
    return roundings * U / (1 - roundings * U)


@dataclass
class Product(Off):
    """Sums of products; size: of the magnitudes of their terms."""

    size: torch.Tensor

    def after(self, roundings: int) -> Product:
        """With more operations on every term."""
        return Product(self.value, self.off + share(roundings) * self.size, self.size)


def magnitude(x: Off) -> torch.Tensor:
    return x.value.abs() + x.off


def most(*operands: torch.Tensor) -> float:
    """What a loss below the normal numbers may be multiplied by."""
    found = 1.0
    for x in operands:
        found *= 1 + (float(x.amax()) if x.numel() else 0.0)
    return found


def product(f: Callable, *operands: Off, roundings: int) -> Product:
    """f of operands, of which it is a sum of products. roundings: on the way of a term, its sums too."""
    small = f(*(x.value.abs() for x in operands))
    large = f(*(magnitude(x) for x in operands))
    lost = torch.where(large > 0, LEAST * roundings * most(*(magnitude(x) for x in operands)), 0.0)
    off = (large - small).clamp(min=0) + share(roundings) * large + lost
    return Product(f(*(x.value for x in operands)), off, large)


def total(*parts: Product) -> Product:
    """Their sum, in any order."""
    size = sum(x.size for x in parts)
    off = sum(x.off for x in parts) + share(len(parts)) * size
    return Product(sum(x.value for x in parts), off, size)


def negative(x: Product) -> Product:
    return Product(-x.value, x.off, x.size)


def over(x: Off, *dims: int, keepdim: bool = False) -> Product:
    """The sum over these dims, in any order."""
    size = x.size if isinstance(x, Product) else magnitude(x)
    terms = torch.Size(x.value.shape[d] for d in dims).numel()
    sums = [t.sum(dims, keepdim=keepdim) for t in (x.value, x.off, size)]
    return Product(sums[0], sums[1] + share(terms) * sums[2], sums[2])


def joined(parts: Sequence[Off], dim: int) -> Product:
    sizes = [x.size if isinstance(x, Product) else magnitude(x) for x in parts]
    return Product(
        torch.cat([x.value for x in parts], dim),
        torch.cat([x.off for x in parts], dim),
        torch.cat(sizes, dim),
    )


def cut(x: Off, dim: int, first: int, end: int) -> Off:
    """Elements [first, end) of a dim."""
    parts = [t.narrow(dim, first, end - first) for t in (x.value, x.off)]
    if isinstance(x, Product):
        return Product(*parts, x.size.narrow(dim, first, end - first))
    return Off(*parts)


def known(*numbers: Off) -> None:
    """Raises Unknown where one of these may overflow."""
    for x in numbers:
        if x.value.numel() and not bool(magnitude(x).amax() < LARGEST):
            raise Unknown


# --- calls ------------------------------------------------------------------------------------------------------------


def laid_out(t: torch.Tensor, how: int) -> torch.Tensor:
    """t as it is, every other element of the last dim, the last two dims or the two before the last swapped in memory, rows with
    gaps of NaN between them, or one row for all (stride 0, other values)."""
    if how == 1 and t.dim():
        return torch.stack([t, t], -1)[..., 0]
    if how == 2 and t.dim() > 1:
        return t.mT.contiguous().mT
    if how == 3 and t.dim() > 2:
        return t.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == 4 and t.dim():
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    if how >= 5 and t.dim() and t.numel():
        dim = (how - 5) % t.dim()
        return t.narrow(dim, 0, 1).expand_as(t)
    return t


LAYOUTS = 9  # of `laid_out`


@contextmanager
def kernels(isa: int, threads: int) -> Iterator[None]:
    """Kernels of an instruction set of this machine with so many threads, whose outputs are NaN until they are written."""
    names = fa.cpu_isas()
    with (
        native.use_cpu_isa(names[isa % len(names)]),
        testing.nan_filled_outputs(),
        mock.patch.object(native, "threads", lambda: threads),
    ):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch, for whose tensors here more of them are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pull(op: Callable, inputs: dict, wanted: Sequence[str], grads: Callable | Sequence, pulled: int) -> tuple:
    """(results, the gradients that came in, those of the wanted inputs by name) of op(**inputs), by the results whose bits `pulled`
    has. grads: those that come in, or grads(i, result) makes them."""
    leaves = {n: t.detach().requires_grad_(n in wanted) if _number(t) else t for n, t in inputs.items()}
    results = testing.as_tuple(op(**leaves))
    if callable(grads):
        grads = [grads(i, r) for i, r in enumerate(results)]
    through = [i for i, r in enumerate(results) if pulled >> i & 1 and r.requires_grad]
    slopes = {}
    if through:
        pairs = [results[i] for i in through], [grads[i].to(results[i].dtype) for i in through]
        given = [leaves[n] for n in wanted]
        found = torch.autograd.grad(pairs[0], given, pairs[1], allow_unused=True)
        slopes = {
            n: torch.zeros_like(x) if g is None else g for n, x, g in zip(wanted, given, found, strict=True)
        }
    return [r.detach() for r in results], grads, slopes


def _number(t: object) -> bool:
    return isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())


def wide(t: object) -> object:
    """In float64 or complex128, what is no such tensor as it is."""
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64) if _number(t) else t


def check_call(case: dict, op: Callable, inputs: dict, wanted: Sequence[str], bounds: Callable) -> None:
    """op(**inputs, backend=) by kernels against its definition in float64. case has its seed, isa, threads, pulled and grad_size;
    bounds(grads): (results, gradients by name, or None where nothing is known) as `Off`,
    grads those that come in, in float64, None where none does."""

    def grads(i: int, r: torch.Tensor) -> torch.Tensor:
        size = min(case["grad_size"], 100.0) if r.dtype == torch.float16 else case["grad_size"]
        return laid_out(
            normal(case["seed"] + 90 + i, *r.shape, dtype=r.dtype, size=size), case["grad_layout"]
        )

    with kernels(case["isa"], case["threads"]):
        found, given, slopes = pull(lambda **x: op(**x, backend="cpu"), inputs, wanted, grads, case["pulled"])
    exact = {n: wide(t) for n, t in inputs.items()}
    given = [wide(g) for g in given]
    truth, _, true_slopes = pull(
        lambda **x: op(**x, backend="reference"), exact, wanted, given, case["pulled"]
    )
    try:
        by_pulled = [g if slopes and case["pulled"] >> i & 1 else None for i, g in enumerate(given)]
        results, gradients = bounds(by_pulled)
    except Unknown:
        return
    for i, (actual, true) in enumerate(zip(found, truth, strict=True)):
        within(f"result {i}", actual, true, results[i])
    if gradients is None:
        return
    for name, actual in slopes.items():
        within(f"gradient of {name}", actual, true_slopes[name], gradients[name])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    if dtype.is_complex:
        return torch.complex(normal(2 * seed, *shape, size=size), normal(2 * seed + 1, *shape, size=size))
    return testing.random_tensor(*shape, dtype=dtype, seed=seed, scale=size)


def within(name: str, actual: torch.Tensor, truth: torch.Tensor, expected: Off) -> None:
    """actual is truth within what `expected` is off by, rounded to its dtype; where that is not finite nothing is known. The steps that
    the bound follows from have truth for their own value, which shows that they are the definition's."""
    assert actual.shape == truth.shape == expected.value.shape, (
        f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}; of its steps {tuple(expected.value.shape)}"
    )
    off = torch.where(expected.off.isnan(), torch.inf, expected.off).expand(truth.shape)
    apart = (expected.value - truth).abs()
    steps = ~(apart <= off / 1024 + 1e-12 * truth.abs()) & off.isfinite()
    assert not bool(steps.any()), (
        f"{name}: its steps give another value, {float(apart[steps].max()):.3g} away"
    )
    real = torch.finfo(actual.dtype)
    bound = off
    if actual.dtype in (torch.bfloat16, torch.float16):
        bound = off + real.eps / 2 * (truth.abs() + off) + real.smallest_normal * real.eps / 2
    found = wide(actual)
    beyond = (truth.abs() + bound > real.max) & ~found.isnan()
    wrong = ~(((found - truth).abs() <= bound) | (found == truth) | beyond | ~bound.isfinite())
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(place)} is {found[place].item():.9g}, expected {truth[place].item():.9g} within "
            f"{float(bound[place]):.3g}; {int(wrong.sum())} of {wrong.numel()} are beyond their bound"
        )
