"""What a node of a graph can be over boxes of scores: intervals, for all tiles of an attention at once.

A box is a tile: a range of queries and of keys, one batch entry and head, or all of them where a node depends on none. Intervals are
sound: no value lies outside. They are float64 arrays of bounds, so that a bound that is not known is infinite; a boolean is an interval
of 0 and 1.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ...runtime.checks import has_contents
from .graph import INT_MAX, INT_MIN, Graph


class Interval(NamedTuple):
    low: Any  # arrays of numpy, or its numbers
    high: Any

    @property
    def known(self) -> bool:
        """Whether each is one value."""
        return bool((self.low == self.high).all())


_INFINITE = np.inf


def of_number(x: float) -> Interval:
    return Interval(np.float64(x), np.float64(x))


def intervals(graph: Graph, outs: list[int], boxes: Mapping[str, Interval]) -> list[Interval]:
    """Intervals of the nodes `outs`, integers and booleans; `boxes` has b, h, q and k, shapes that broadcast."""
    values: dict[int, Interval] = {}
    for place in graph.reach(outs):
        node = graph.nodes[place]
        args = [values[a] for a in node.args]
        if node.op == "constant":
            value = of_number(float(node.value))
        elif node.op == "input":
            value = boxes[node.value] if node.value in boxes else _unknown()
        elif node.op == "load":
            value = _load(graph.tensors[node.value], args)
        else:
            rule = _RULES.get(node.op)
            if node.op in ("and", "or", "xor", "not") and node.type == "b":
                rule = _RULES[f"{node.op} of booleans"]
            value = rule(*args) if rule is not None and node.type != "f" else _unknown()
            if node.op in ("lt", "le", "eq", "ne") and any(graph.nodes[a].type == "f" for a in node.args):
                value = _either()  # floats round, and may be NaN
        if node.type == "b":
            value = Interval(np.maximum(value.low, 0.0), np.minimum(value.high, 1.0))
        values[place] = value
    return [values[n] for n in outs]


def overflowing(graph: Graph, outs: list[int], boxes: Mapping[str, Interval]) -> int | None:
    """An integer node that may not fit 32 bits over the boxes, or None."""
    places = [n for n in graph.reach(outs) if graph.nodes[n].type == "i"]
    for place, value in zip(places, intervals(graph, places, boxes), strict=True):
        if value.low.min() < INT_MIN or value.high.max() > INT_MAX:
            return place
    return None


def _unknown() -> Interval:
    return Interval(np.float64(-_INFINITE), np.float64(_INFINITE))


def _either() -> Interval:
    return Interval(np.float64(0), np.float64(1))


def _add(x: Interval, y: Interval) -> Interval:
    return Interval(x.low + y.low, x.high + y.high)


def _neg(x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def _corners(op: Callable, x: Interval, y: Interval) -> Interval:
    with np.errstate(invalid="ignore"):
        corners = [op(a, b) for a in x for b in y]
    corners = list(np.broadcast_arrays(*corners))
    bad = np.isnan(corners).any(0)  # infinite bounds
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    return Interval(np.where(bad, -_INFINITE, low), np.where(bad, _INFINITE, high))


def _abs(x: Interval) -> Interval:
    reaches = np.maximum(np.abs(x.low), np.abs(x.high))
    return Interval(np.maximum(np.maximum(x.low, -x.high), 0.0), reaches)


def _floordiv(x: Interval, y: Interval) -> Interval:
    positive = bool((y.low > 0).all())
    if positive and y.known:
        return Interval(np.floor(x.low / y.low), np.floor(x.high / y.low))
    if not (bool((y.low > 0).all()) or bool((y.high < 0).all())):
        largest = np.maximum(np.abs(x.low), np.abs(x.high))  # a divisor is 1 at least, or the quotient 0
        return Interval(-largest - 1, largest + 1)
    quotient = _corners(lambda a, b: a / b, x, y)
    return Interval(np.floor(quotient.low), np.floor(quotient.high))


def _mod(x: Interval, y: Interval) -> Interval:
    if not (y.known and bool((y.low > 0).all())):
        largest = np.maximum(np.abs(y.low), np.abs(y.high))
        return Interval(np.where(y.low >= 0, 0.0, -largest), np.where(y.high <= 0, 0.0, largest))
    m = y.low
    with np.errstate(invalid="ignore"):
        together = np.floor(x.low / m) == np.floor(x.high / m)
        together &= np.isfinite(x.low) & np.isfinite(x.high)
        low, high = x.low - m * np.floor(x.low / m), x.high - m * np.floor(x.high / m)
    return Interval(np.where(together, low, 0.0), np.where(together, high, m - 1))


def _shift(op: str) -> Callable:
    def rule(x: Interval, by: Interval) -> Interval:
        if not by.known or not bool(((by.low >= 0) & (by.low < 32)).all()):
            return _unknown()
        factor = np.exp2(by.low)
        if op == "shl":
            return Interval(x.low * factor, x.high * factor)
        return Interval(np.floor(x.low / factor), np.floor(x.high / factor))

    return rule


def _bits(op: str) -> Callable:
    """Of integers that are not negative."""

    def rule(x: Interval, y: Interval) -> Interval:
        if not (bool((x.low >= 0).all()) and bool((y.low >= 0).all())):
            return Interval(np.float64(INT_MIN), np.float64(INT_MAX))
        low: Any = np.float64(0)
        exact = (x.low == x.high) & (y.low == y.high)
        if op == "and":
            high = np.minimum(x.high, y.high)
        else:
            most = np.minimum(np.maximum(x.high, y.high), INT_MAX)
            high = np.exp2(np.floor(np.log2(np.maximum(most, 1))) + 1) - 1
        value = getattr(np, f"bitwise_{op}")(
            np.minimum(x.low, INT_MAX).astype(np.int64), np.minimum(y.low, INT_MAX).astype(np.int64)
        ).astype(np.float64)
        low, high, value, exact = np.broadcast_arrays(low, high, value, exact)
        return Interval(np.where(exact, value, low), np.where(exact, value, high))

    return rule


def _not(x: Interval) -> Interval:
    return Interval(-x.high - 1, -x.low - 1)


def _truth(surely: np.ndarray, possibly: np.ndarray) -> Interval:
    return Interval(np.asarray(surely, np.float64), np.asarray(possibly, np.float64))


def _eq(x: Interval, y: Interval) -> Interval:
    same = (x.low == x.high) & (y.low == y.high) & (x.low == y.low)
    return _truth(same, (x.low <= y.high) & (y.low <= x.high))


def _negated(x: Interval) -> Interval:
    return Interval(1 - x.high, 1 - x.low)


def _select(condition: Interval, x: Interval, y: Interval) -> Interval:
    low = np.where(condition.low == 1, x.low, np.where(condition.high == 0, y.low, np.minimum(x.low, y.low)))
    high = np.where(
        condition.low == 1, x.high, np.where(condition.high == 0, y.high, np.maximum(x.high, y.high))
    )
    return Interval(low, high)


_RULES: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": lambda x, y: Interval(x.low - y.high, x.high - y.low),
    "mul": lambda x, y: _corners(np.multiply, x, y),
    "neg": _neg,
    "abs": _abs,
    "max": lambda x, y: Interval(np.maximum(x.low, y.low), np.maximum(x.high, y.high)),
    "min": lambda x, y: Interval(np.minimum(x.low, y.low), np.minimum(x.high, y.high)),
    "floordiv": _floordiv,
    "mod": _mod,
    "shl": _shift("shl"),
    "shr": _shift("shr"),
    "and": _bits("and"),
    "or": _bits("or"),
    "xor": _bits("xor"),
    "not": _not,
    "b2i": lambda x: x,
    "lt": lambda x, y: _truth(x.high < y.low, x.low < y.high),
    "le": lambda x, y: _truth(x.high <= y.low, x.low <= y.high),
    "eq": _eq,
    "ne": lambda x, y: _negated(_eq(x, y)),
    "and of booleans": lambda x, y: Interval(np.minimum(x.low, y.low), np.minimum(x.high, y.high)),
    "or of booleans": lambda x, y: Interval(np.maximum(x.low, y.low), np.maximum(x.high, y.high)),
    "xor of booleans": lambda x, y: _negated(_eq(x, y)),
    "not of booleans": _negated,
    "select": _select,
    "f2i": lambda x: Interval(np.float64(INT_MIN), np.float64(INT_MAX)),  # nothing is known of floats
}


def _load(tensor: torch.Tensor, indices: list[Interval]) -> Interval:
    """The least and the largest element over boxes of indices."""
    if tensor.is_floating_point() or not tensor.numel() or not has_contents(tensor):
        return _unknown()
    elements = tensor.detach().cpu().numpy().astype(np.int64)
    if not indices:
        return of_number(float(elements))
    everywhere = Interval(np.float64(elements.min()), np.float64(elements.max()))
    sizes = elements.shape
    for index, size in zip(indices, sizes, strict=True):
        if not (bool((index.low >= 0).all()) and bool((index.high < size).all())):
            return everywhere  # an index from the end, or one that is refused later
    *leading, last = indices
    if not all(index.known for index in leading):
        return everywhere
    rows = elements.reshape(-1, sizes[-1])
    row = np.zeros((), np.int64)
    for index, size in zip(leading, sizes[:-1], strict=True):
        row = row * size + index.low.astype(np.int64)
    low, high = last.low.astype(np.int64), last.high.astype(np.int64)
    return Interval(_range(np.minimum, rows, row, low, high), _range(np.maximum, rows, row, low, high))


def _range(op: np.ufunc, rows: np.ndarray, row: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """op over rows[row, low : high + 1], by blocks of powers of two."""
    levels, width = [rows], 1
    while 2 * width <= int((high - low).max(initial=0)) + 1:
        before = levels[-1]
        levels.append(op(before[:, :-width], before[:, width:]))
        width *= 2
    row, low, high = np.broadcast_arrays(row, low, high)
    result = np.empty(low.shape, np.float64)
    level = np.floor(np.log2(high - low + 1)).astype(np.int64)
    for number in np.unique(level):
        here = level == number
        table = levels[number]
        first = table[row[here], low[here]]
        second = table[row[here], high[here] + 1 - (1 << number)]
        result[here] = op(first, second)
    return result
