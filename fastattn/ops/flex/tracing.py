"""From a Python function of a score to a graph: the function is called once, with values that record what is done to them.

It rests on public interfaces alone: operators, `__torch_function__`, and `torch.overrides.TorchFunctionMode` for a captured tensor
that is indexed by a value.
"""

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .graph import INPUTS, Graph, S

_MOST_DIMENSIONS = 6  # of a captured tensor
_LARGEST_WHOLE = 1 << 30  # of integers made of floats


class Refused(NotImplementedError):
    """What a function does that no kernel can; the message says what to write instead."""


class Value:
    """A number that differs from score to score, as the traced function sees it: a tensor of no dimensions."""

    __slots__ = ("graph", "place")

    def __init__(self, graph: Graph, place: int) -> None:
        self.graph, self.place = graph, place

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _apply_function(func, args, kwargs or {})

    @property
    def type(self) -> str:
        return self.graph.nodes[self.place].type

    @property
    def dtype(self) -> torch.dtype:
        return {"f": torch.float32, "i": torch.int32, "b": torch.bool}[self.type]

    shape = property(lambda self: torch.Size(()))
    ndim = property(lambda self: 0)
    device = property(lambda self: torch.device("cpu"))
    requires_grad = property(lambda self: False)

    __array_ufunc__ = None  # a number of numpy leaves an operation with a value to the value

    def __repr__(self) -> str:
        return f"<{self.dtype} of each score>"

    def dim(self) -> int:
        return 0

    def size(self, *_: Any) -> torch.Size:
        return torch.Size(())

    def numel(self) -> int:
        return 1

    def is_floating_point(self) -> bool:
        return self.type == "f"

    def __bool__(self) -> bool:
        raise Refused(
            "a branch (if, and, or, not) on a value that differs between scores; write torch.where(condition, a, b), "
            "and &, | and ~ of conditions"
        )

    def _no_number(self, *_: Any) -> Any:
        raise Refused(
            "a Python number of a value that differs between scores (float, int, .item()); keep it a tensor"
        )

    __float__ = __int__ = __index__ = item = tolist = numpy = _no_number

    def __iter__(self) -> Iterator:
        raise Refused("iteration over one score")

    def __len__(self) -> int:
        raise Refused("the length of one score")

    def __getitem__(self, index: Any) -> Any:
        raise Refused("an index of one score; only captured tensors have indices")

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        from .vocabulary import OPERATIONS

        if name.endswith("_") and name[:-1] in OPERATIONS:
            raise Refused(f"Tensor.{name}, which writes to its tensor; write {name[:-1]} and use its result")
        if _SAME.get(name, name) not in OPERATIONS:
            raise Refused(_outside(f"Tensor.{name}"))
        return lambda *args, **kwargs: _apply(name, (self, *args), kwargs)

    __hash__ = object.__hash__


def _operators() -> None:
    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
    for name in names:
        setattr(Value, f"__{name}__", lambda a, b, name=name: _apply(name, (a, b), {}))
        setattr(Value, f"__r{name}__", lambda a, b, name=name: _apply(name, (b, a), {}))
    for name in ["lt", "le", "gt", "ge", "eq", "ne"]:
        setattr(Value, f"__{name}__", lambda a, b, name=name: _apply(name, (a, b), {}))
    for name in ["neg", "abs", "invert"]:
        setattr(Value, f"__{name}__", lambda a, name=name: _apply(name, (a,), {}))
    setattr(Value, "__pos__", lambda a: a)  # noqa: B010  as the others are set


_operators()


class _Tracing(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(v, Value) for v in _flat((args, kwargs))):
            return _apply_function(func, args, kwargs)
        return func(*args, **kwargs)


def trace(function: Callable, graph: Graph, *, of_score: bool) -> int:
    """The node of function(score, b, h, q_idx, kv_idx), or of a mask's function(b, h, q_idx, kv_idx), in `graph`.

    Raises Refused for what the vocabulary has not. What the function raises itself passes through.
    """
    names = list(INPUTS) if of_score else list(INPUTS)[1:]
    with _Tracing():
        result = function(*(Value(graph, graph.input(name)) for name in names))
    if isinstance(result, Value):
        place = result.place
    elif (isinstance(result, torch.Tensor) and result.dim() == 0) or isinstance(
        result, (bool, int, float, Row)
    ):
        place = operand(graph, result)
    else:
        raise TypeError(f"it must return one number a score, given {type(result).__name__}")
    if of_score:
        return cast(graph, place, "f")
    if graph.nodes[place].type != "b":
        raise TypeError(
            f"it must return a boolean (True = attend), given {Value(graph, place).dtype}; compare with 0"
        )
    return place


def cast(graph: Graph, place: int, to: str) -> int:
    """A node as float or integer, as torch promotes it."""
    given = graph.nodes[place].type
    if given == to:
        return place
    if given == "b":
        return cast(graph, graph.make("b2i", place), to)
    if to == "b":
        return graph.make("ne", place, graph.constant(0, given))
    if to == "f":
        return graph.make("i2f", place)
    # infinity and what is far out stay integers that can be added to
    whole = graph.make("max", graph.make("f2i", place), graph.constant(-_LARGEST_WHOLE))
    return graph.make("min", whole, graph.constant(_LARGEST_WHOLE))


# --- what is done to values ------------------------------------------------------------------------------------------

_SAME = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "absolute": "abs",
    "negative": "neg",
    "invert": "not",
    "bitwise_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "lshift": "shl",
    "bitwise_left_shift": "shl",
    "rshift": "shr",
    "bitwise_right_shift": "shr",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "max": "maximum",
    "min": "minimum",
    "fmod": "fmod",
    "clip": "clamp",
    "__getitem__": "getitem",
}


def _outside(name: str) -> str:
    return (
        f"{name}, which is outside of what a score may use: arithmetic, comparisons, torch.where, clamp, exp, log, tanh and the like, "
        "and elements of captured tensors"
    )


def _apply_function(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property of a captured tensor beside a value: there is none
        raise Refused(_outside(str(func)))
    if name.endswith("_") and not name.endswith("__"):
        raise Refused(f"torch.{name}, which writes to its argument; write {name[:-1]} and use its result")
    return _apply(name if name == "__getitem__" else name.strip("_"), args, kwargs)


def _apply(name: str, args: tuple, kwargs: dict) -> Any:
    from .vocabulary import OPERATIONS, Builder  # it is made of what this module defines

    plain = _SAME.get(name, name)
    if plain not in OPERATIONS and plain[:1] == "r" and _SAME.get(plain[1:], plain[1:]) in OPERATIONS:
        plain, args = _SAME.get(plain[1:], plain[1:]), args[::-1]  # Tensor.__radd__ and the like
    operation = OPERATIONS.get(plain)
    if operation is None:
        raise Refused(_outside(f"torch.{name}"))
    graph = next(v.graph for v in _flat((args, kwargs)) if isinstance(v, Value))
    if kwargs.get("out", 0) is None:
        kwargs.pop("out")
    if kwargs.pop("inplace", False):
        raise Refused(f"torch.{name} with inplace=True; use its result instead")
    if "input" in kwargs:
        args = (kwargs.pop("input"), *args)
    try:
        return operation(Builder(graph), *args, **kwargs)
    except TypeError as error:
        if "positional argument" in str(error) or "keyword argument" in str(error):
            raise Refused(f"torch.{name} with these arguments in a score") from error
        raise


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    for v in values:
        if isinstance(v, (tuple, list, dict)):
            yield from _flat(v)
        else:
            yield v


def operand(graph: Graph, x: Any, name: str = "") -> int:
    if isinstance(x, Value):
        if x.graph is not graph:
            raise Refused("a value of another trace: a score function may not keep its arguments")
        return x.place
    if isinstance(x, torch.Tensor):
        if x.dim() == 0:
            return graph.load(captured(x), ())
        raise Refused(
            f"a captured tensor of shape {tuple(x.shape)} without an index{f' in torch.{name}' if name else ''}: "
            "index it, one index a dimension"
        )
    if isinstance(x, (bool, int, float)):
        return graph.constant(x)
    if isinstance(x, numbers.Real):  # numpy's
        return graph.constant(int(x) if isinstance(x, numbers.Integral) else float(x))
    if isinstance(x, Row):
        raise x._refuse()
    raise Refused(f"an operand of type {type(x).__name__}{f' in torch.{name}' if name else ''}")


def captured(t: torch.Tensor) -> torch.Tensor:
    if t.layout != torch.strided or t.is_nested or t.is_complex() or t.is_quantized:
        raise Refused(f"a captured tensor that is not a plain strided one of real numbers ({t.dtype})")
    if t.dim() > _MOST_DIMENSIONS:
        raise Refused(f"a captured tensor of {t.dim()} dimensions; it may have {_MOST_DIMENSIONS} at most")
    return t


class Row:
    """A captured tensor with some of its indices: the others may follow, `intervals[document[q]][0]`."""

    def __init__(self, graph: Graph, tensor: torch.Tensor, places: tuple[int, ...]) -> None:
        self._graph, self._tensor, self._places = graph, tensor, places

    def _refuse(self) -> Refused:
        dims, given = self._tensor.dim(), len(self._places)
        return Refused(
            f"{given} indices of a captured tensor of {dims} dimensions, whose elements would be vectors: give one "
            "index a dimension. A product of captured rows belongs in query and key: concatenate them to their head dims"
        )

    def __getitem__(self, indices: Any) -> Any:
        indices = tuple(indices) if isinstance(indices, (tuple, list)) else (indices,)
        places = list(self._places)
        for i in indices:
            if i is None or i is Ellipsis or isinstance(i, slice):
                raise self._refuse()
            place = operand(self._graph, i)
            if self._graph.nodes[place].type != "i":
                raise Refused("an index that is no integer")
            if self._graph.depends(place, S):
                raise Refused("an index that depends on the score")
            places.append(place)
        if len(places) > self._tensor.dim():
            raise IndexError(f"{len(places)} indices of a captured tensor of {self._tensor.dim()} dimensions")
        if len(places) < self._tensor.dim():
            return Row(self._graph, self._tensor, tuple(places))
        return Value(self._graph, self._graph.load(self._tensor, tuple(places)))

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise next(v for v in _flat((args, kwargs or {})) if isinstance(v, Row))._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refuse()

    def _operator(self, *_: Any) -> Any:
        raise self._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operator
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = __matmul__ = _operator
    __bool__ = __iter__ = __neg__ = __invert__ = __abs__ = _operator


def line_of(error: BaseException, function: Callable) -> str:
    """Where in `function`, or in one of the `parts` that it is made of, an error was raised: "file.py:12", or its name."""
    parts = getattr(function, "parts", (function,))
    codes, at = [getattr(part, "__code__", None) for part in parts], None
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if code in codes:
            at = f"{code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return at or str(getattr(parts[0], "__qualname__", type(parts[0]).__name__))
