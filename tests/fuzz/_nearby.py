"""A check of any op against its definition in float64, by what inputs that are a little off would give.

A stable kernel gives, nearly, the exact result of nearly its inputs. So the definition is evaluated in float64 at inputs whose every
element is off by a random part of `SPREAD` roundings, `DRAWS` times; an error may be FACTOR times the largest change seen at that
element, or in its row on average, and one rounding of the result. It is an estimate and no proof: it finds wrong results, not lost
last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime.native import use_cpu_isa

SPREAD, DRAWS, FACTOR = 8, 4, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(
    op: Callable,
    inputs: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
    dtype: torch.dtype,
    *,
    seed: int,
    isa: int,
    threads: int,
    terms: int = 1,
    floors: Sequence[float | torch.Tensor] = (),
    result_floor: float = 0.0,
) -> None:
    """op(*inputs) and its gradients of the inputs numbered in `wanted`.

    terms: the most that one sum of the op has. floors: for each input, the size of terms whose difference its gradient is, which
    may cancel, or of each element's; their roundings stay. result_floor: likewise of the results.
    """
    names, before = fa.cpu_isas(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_cpu_isa(names[isa % len(names)]), testing.nan_filled_outputs():
            found = _evaluate(op, inputs, wanted, seed)
    finally:
        torch.set_num_threads(before)
    unit = max(torch.finfo(dtype).eps / 2, 2.0**-24) if dtype != torch.float32 else 2.0**-24
    spread = SPREAD * unit * math.sqrt(terms)
    exact = [t.detach().double() if _floating(t) else t for t in inputs]
    truth = _evaluate(op, exact, wanted, seed, like=found)
    generator = torch.Generator().manual_seed(seed)
    changes = [torch.zeros_like(t) for t in truth]
    for _ in range(DRAWS):
        off = [t * _factors(t.shape, spread, generator) if _floating(t) else t for t in exact]
        for i, t in enumerate(_evaluate(op, off, wanted, seed, like=found, off=(spread, generator))):
            changes[i] = torch.maximum(changes[i], (t - truth[i]).abs())
    for i, (actual, true, change) in enumerate(zip(found, truth, changes, strict=True)):
        source = None if i < len(found) - len(wanted) else wanted[i - len(found)]
        name = f"result {i}" if source is None else f"gradient of input {source}"
        floor = (
            floors[source]
            if source is not None and source < len(floors)
            else result_floor
            if source is None
            else 0.0
        )
        compare(name, actual, true, change, unit, 4 * math.sqrt(terms) * unit * floor)


def compare(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    change: torch.Tensor,
    unit: float,
    floor: float | torch.Tensor = 0.0,
) -> None:
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    if not truth.numel():
        return
    limits = torch.finfo(actual.dtype)
    around = change.mean(-1, keepdim=True) if change.dim() else change
    bound = FACTOR * torch.maximum(change, around) + truth.abs() * (limits.eps / 2 + 8 * unit)
    bound = bound + limits.smallest_normal * 4 + floor
    error = (actual.double() - truth).abs()
    same = (actual.double() == truth) | (actual.isnan() & truth.isnan())
    beyond = truth.abs() + bound > limits.max
    wrong = ~((error <= bound) | same | (beyond & ~actual.isnan()))
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(place)} is {float(actual[place]):.9g}, expected {float(truth[place]):.9g} within "
            f"{float(bound[place]):.3g}; {int(wrong.sum())} of {wrong.numel()} are beyond their bound"
        )


def _factors(shape: torch.Size, spread: float, generator: torch.Generator) -> torch.Tensor:
    return 1 + spread * (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1)


def _floating(t: object) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _evaluate(
    op: Callable,
    inputs: Sequence,
    wanted: Sequence[int],
    seed: int,
    like: Sequence | None = None,
    off: tuple[float, torch.Generator] | None = None,
) -> list:
    """Results and gradients; the incoming gradients are rounded to `like`'s dtypes, and `off` by a random part of themselves."""
    leaves = [t.detach().requires_grad_(i in wanted) if _floating(t) else t for i, t in enumerate(inputs)]
    results = testing.as_tuple(op(*leaves))
    if not wanted:
        return [r.detach() for r in results]
    grads = [
        testing.random_tensor(*r.shape, dtype=r.dtype if like is None else like[i].dtype, seed=seed + i).to(
            r.dtype
        )
        for i, r in enumerate(results)
    ]
    if off is not None:
        grads = [g * _factors(g.shape, *off) for g in grads]
    pulled = torch.autograd.grad(results, [leaves[i] for i in wanted], grads, allow_unused=True)
    pulled = [torch.zeros_like(leaves[i]) if g is None else g for i, g in zip(wanted, pulled, strict=True)]
    return [*(r.detach() for r in results), *pulled]
