"""Error budgets: how far a result may be from its op's reference.

The truth is an op's reference run in float64. What a result y in a low dtype may differ by is not a guessed
tolerance but what plain torch does in the same dtype on the same inputs, the reference with every step
rounded to that dtype (by itself the reference of attention computes in float32 and rounds once):

    max|y - truth| <= factor * max|eager - truth| + rounding band        (factor 2, gradients 3)

The rounding band is what a correct kernel may add when eager happens to be exact. One rounding of the
result is at most eps/2 of it. Inside, sums are in float32: n terms added in any order have an error under n
* eps32/2 of the sum of magnitudes, of which rounding errors of random sign leave about sqrt(n); and a
handful of float32 operations (an exponential to 2 ulp, a reciprocal to 1, a product) come before. With u =
max|truth|:

    band = u * (eps(dtype) / 2 + (4 + sqrt(terms)) * eps(float32))

which for float32 and 1024 terms is 37 eps, and for bfloat16 is the one rounding. `absolute_bound` gives the
bound that needs no eager run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..runtime.arithmetic import rounding_every_step

if TYPE_CHECKING:
    from ..runtime.examples import Example

EPS32 = torch.finfo(torch.float32).eps


def as_tuple(x: object) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def to_float64(inputs: Sequence[object]) -> tuple:
    """Floating tensors as fresh float64 leaves that require gradients where the originals do."""
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )


def fresh(inputs: Sequence[object]) -> tuple:
    """The same values, strides and dtypes as new leaves, so that two runs never share a gradient."""
    return tuple(
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs
    )


def assert_equal_at_extremes(fn: Callable, definition: Callable, dtype: torch.dtype) -> None:
    """fn and definition of two tensors, and their gradients, where arguments and incoming gradient are zero, small, large,
    infinite and NaN in every combination: alike in what is NaN or infinite, else within roundings of the dtype."""
    values = (-torch.inf, -1e30, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e30, torch.inf, torch.nan)
    a, b, grad = (
        torch.tensor(t, dtype=dtype) for t in zip(*itertools.product(values, repeat=3), strict=True)
    )
    found = []
    for call in (fn, definition):
        inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = call(*inputs)
        out.backward(grad)
        found.append((out.detach(), *(t.grad for t in inputs)))
    for mine, true in zip(*found, strict=True):
        # a handful of roundings, and the quotient of an exponential that is four away at worst
        limits = torch.finfo(dtype)
        subnormal = limits.smallest_normal * limits.eps
        torch.testing.assert_close(mine, true, rtol=8 * limits.eps, atol=subnormal, equal_nan=True)


def max_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """max|actual - truth| in float64; infinities have to agree exactly, and a NaN is an infinite error."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.numel() == 0:
        return 0.0
    error = (actual - truth).abs()
    error = torch.where(truth.isinf() & (actual == truth), torch.zeros_like(error), error)
    return float(torch.where(error.isnan(), torch.full_like(error, math.inf), error).max())


def max_finite(x: torch.Tensor) -> float:
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """max|actual - truth| / |truth|: for values that matter however small they are."""
    actual, truth = actual.detach().double(), truth.detach().double()
    return float(((actual - truth).abs() / truth.abs()).max()) if truth.numel() else 0.0


def rounding_band(truth: torch.Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """What a correct kernel may be off by when eager is exact (derived above)."""
    return max_finite(truth) * (torch.finfo(dtype).eps / 2 + (4 + math.sqrt(terms)) * EPS32)


def absolute_bound(dtype: torch.dtype, terms: int, magnitude: float, *, roundings: int = 1) -> float:
    """The worst case of a sum of `terms` products whose magnitudes add up to at most `magnitude`.

    Each value that is rounded to `dtype` on the way (`roundings` of them in sequence: the stored weight, the
    stored result) adds eps(dtype)/2 of `magnitude`; adding n terms in float32 in any order adds at most
    n * eps32/2 of it, and forming a term a further 4 * eps32.
    """
    return magnitude * (roundings * torch.finfo(dtype).eps / 2 + (terms / 2 + 4) * EPS32)


def assert_close_to_truth(
    actual: torch.Tensor,
    truth: torch.Tensor,
    eager: torch.Tensor | None,
    *,
    factor: float = 2.0,
    terms: int = 1,
    absolute: float | None = None,
    magnitude: float = 0.0,
    name: str = "result",
) -> None:
    """One tensor against its budget; `absolute` is a further bound the test derives.

    `magnitude` is that of the terms of a sum which cancel: roundings are of them, not of the little that is left.
    """
    error = max_error(actual, truth)
    budget = rounding_band(truth, actual.dtype, terms) + magnitude * (4 + math.sqrt(terms)) * EPS32
    eager_error = 0.0
    if eager is not None:
        eager_error = max_error(eager, truth)
        budget += factor * eager_error if math.isfinite(eager_error) else 0.0
    if not error <= budget:
        raise AssertionError(
            f"{name} ({actual.dtype}, {tuple(actual.shape)}): error {error:.3e} is over its budget"
            f" {budget:.3e}"
            f" (eager's error {eager_error:.3e}, factor {factor}, largest value {max_finite(truth):.3e})"
        )
    if absolute is not None and not error <= absolute:
        raise AssertionError(
            f"{name} ({actual.dtype}): error {error:.3e} is over the absolute bound {absolute:.3e}"
        )


def assert_within_budget(
    actual: object,
    reference: Callable,
    inputs: Sequence[object],
    *,
    factor: float = 2.0,
    terms: int = 1,
    absolute: float | None = None,
    name: str = "result",
) -> None:
    """Outputs of an op given `inputs`, against reference(*inputs) in float64 and in the inputs' dtype."""
    with torch.no_grad():
        truth = as_tuple(reference(*to_float64(inputs)))
        with rounding_every_step():
            eager = as_tuple(reference(*inputs))
    actual = as_tuple(actual)
    assert len(actual) == len(truth), f"{len(actual)} outputs, the reference has {len(truth)}"
    for i, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
        label = f"{name}[{i}]" if len(actual) > 1 else name
        assert_close_to_truth(a, t, e, factor=factor, terms=terms, absolute=absolute, name=label)


def differentiate(
    fn: Callable, inputs: Sequence[object], grad_outputs: Sequence[torch.Tensor | None] | None = None
) -> tuple[tuple, tuple]:
    """(outputs, gradients of the inputs that require them) of fn(*inputs) for the given output gradients.

    Without `grad_outputs` they are random, the same for every call with the same output shapes.
    """
    inputs = fresh(inputs)
    outputs = as_tuple(fn(*inputs))
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if grad_outputs is None:
        grad_outputs = output_gradients(outputs)
    pairs = [
        (o, g.to(o)) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad
    ]
    if not leaves or not pairs:
        return outputs, ()
    outs, grads = zip(*pairs, strict=True)
    return outputs, torch.autograd.grad(outs, leaves, grads, allow_unused=True)


def output_gradients(outputs: Sequence[torch.Tensor], seed: int = 17) -> tuple:
    """Random gradients for an op's outputs, exact in every dtype (multiples of 1/16 up to 2)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-32, 33, o.shape, generator=generator).to(o.device) / 16
        if o.is_floating_point()
        else None
        for o in outputs
    )


def check_op(
    op: Callable,
    reference: Callable,
    inputs: Sequence[object],
    *,
    factor: float = 2.0,
    gradient_factor: float = 3.0,
    terms: int = 1,
    absolute: float | None = None,
    grad_outputs: Sequence[torch.Tensor | None] | None = None,
    names: Sequence[str] = (),
    magnitudes: Sequence[float] = (),
) -> None:
    """Outputs and all gradients of op(*inputs) within their budgets of reference(*inputs).

    Tensors among `inputs` that require gradients get theirs compared (`names` labels them, `magnitudes` has the sizes of
    terms that cancel in them); everything else is passed through as it is. A gradient that the reference does not have
    must be absent or zero.
    """
    outputs, gradients = differentiate(op, inputs, grad_outputs)
    if grad_outputs is None:
        grad_outputs = output_gradients(outputs)
    with rounding_every_step():
        eager, eager_gradients = differentiate(reference, inputs, grad_outputs)
    truth, true_gradients = differentiate(reference, to_float64(inputs), grad_outputs)
    assert len(outputs) == len(truth), f"{len(outputs)} outputs, the reference has {len(truth)}"
    for i, (a, t, e) in enumerate(zip(outputs, truth, eager, strict=True)):
        assert a.dtype == e.dtype, f"output {i} is {a.dtype}, the reference gives {e.dtype}"
        assert_close_to_truth(a, t, e, factor=factor, terms=terms, absolute=absolute, name=f"output {i}")
    for i, (a, t, e) in enumerate(zip(gradients, true_gradients, eager_gradients, strict=True)):
        name = f"gradient of {names[i] if i < len(names) else i}"
        if t is None:
            assert a is None or not a.any(), f"{name} should be absent or zero"
            continue
        assert a is not None, f"{name} is missing"
        magnitude = magnitudes[i] if i < len(magnitudes) else 0.0
        assert_close_to_truth(a, t, e, factor=gradient_factor, terms=terms, magnitude=magnitude, name=name)


def example_call(example: Example, backend: str) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    """(a function, its floating inputs): one of the ops' examples by this backend.

    What an op without gradients writes to is among its results, and integers are given in float64.
    """
    names = tuple(example.floating)

    def call(*floating: torch.Tensor) -> tuple:
        options = {n: _of_dtype(value, floating[0].dtype) for n, value in example.options.items()}
        given = example.tensors | options | dict(zip(names, floating, strict=True))
        written = [] if example.gradients else [t.clone() for t in floating]
        given |= dict(zip(names, written, strict=False))
        with torch.random.fork_rng(devices=[]):  # of the CPU; a GPU's generator stays seeded
            torch.manual_seed(0)
            outputs = as_tuple(example.function(**given, backend=backend))
        return tuple(o if o.is_floating_point() else o.double() for o in (*outputs, *written))

    return call, tuple(t.detach().requires_grad_(example.gradients) for t in example.floating.values())


def check_example(example: Example, backend: str) -> None:
    """Outputs and gradients of one of the ops' examples by this backend, within their budgets of the definition.

    No sum behind a result has more terms than the call's largest tensor has elements.
    """
    terms = max(t.numel() for t in example.tensors.values())
    (call, inputs), (definition, _) = (example_call(example, name) for name in (backend, "reference"))
    check_op(call, definition, inputs, terms=terms, names=tuple(example.floating))


def _of_dtype(value: object, dtype: torch.dtype) -> object:
    """A list of tensors in this dtype; anything else as it is."""
    return [t.to(dtype) for t in value] if isinstance(value, list) else value


def attention_weights(attend: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The weights (..., Lq, Lk) in float64 that attend(q, k, v) gives the keys: its outputs for unit vectors as values."""
    units = torch.eye(v.shape[-2], dtype=torch.float64, device=v.device).expand(*v.shape[:-1], v.shape[-2])
    with torch.no_grad():
        return attend(q.detach().double(), k.detach().double(), units)


def lone_key_magnitudes(
    weights: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[float, ...]:
    """Where no row weighs two keys, softmax's true gradients of q, k and scores (the last of the three) are 0, the
    difference of two equal sums. A sum is at most Dv * max|v| * 2 for `output_gradients`; k's and a bias's gradients add
    it up over as many rows as there are queries at most."""
    if not weights.numel() or int((weights > 0).sum(-1).max()) > 1:
        return ()
    difference, rows = 2 * 2 * v.shape[-1] * max_finite(v), weights.shape[:-1].numel()
    return (
        difference * scale * max_finite(k),
        rows * difference * scale * max_finite(q),
        0.0,
        rows * difference,
    )


def far_magnitudes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, ...]:
    """For `check_op`: in dq what all keys have in common cancels, as the dS of a row add up to 0. For `output_gradients` a row's
    |dS| add up to at most 2 * 2 * Dv * max|v|, of which random signs leave the root of Dv."""
    share = 4 * math.sqrt(v.shape[-1]) * max_finite(v) / math.sqrt(q.shape[-1])
    return (share * max_finite(k), 0.0, 0.0)
