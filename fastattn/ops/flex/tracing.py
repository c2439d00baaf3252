"""From a Python function of a score to a graph: the function is called once, with values that record what is done to them.

It rests on public interfaces alone: operators, `__torch_function__`, and `torch.overrides.TorchFunctionMode` for a captured tensor
that is indexed by a value.
"""

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .graph import COMPARISONS, INPUTS, Graph, S

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
        result, (bool, int, float, _Row)
    ):
        place = _operand(graph, result)
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


# --- what a function may do ------------------------------------------------------------------------------------------

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
        return operation(_Builder(graph), *args, **kwargs)
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


def _operand(graph: Graph, x: Any, name: str = "") -> int:
    if isinstance(x, Value):
        if x.graph is not graph:
            raise Refused("a value of another trace: a score function may not keep its arguments")
        return x.place
    if isinstance(x, torch.Tensor):
        if x.dim() == 0:
            return graph.load(_captured(x), ())
        raise Refused(
            f"a captured tensor of shape {tuple(x.shape)} without an index{f' in torch.{name}' if name else ''}: "
            "index it, one index a dimension"
        )
    if isinstance(x, (bool, int, float)):
        return graph.constant(x)
    if isinstance(x, numbers.Real):  # numpy's
        return graph.constant(int(x) if isinstance(x, numbers.Integral) else float(x))
    if isinstance(x, _Row):
        raise x._refuse()
    raise Refused(f"an operand of type {type(x).__name__}{f' in torch.{name}' if name else ''}")


def _captured(t: torch.Tensor) -> torch.Tensor:
    if t.layout != torch.strided or t.is_nested or t.is_complex() or t.is_quantized:
        raise Refused(f"a captured tensor that is not a plain strided one of real numbers ({t.dtype})")
    if t.dim() > _MOST_DIMENSIONS:
        raise Refused(f"a captured tensor of {t.dim()} dimensions; it may have {_MOST_DIMENSIONS} at most")
    return t


class _Builder:
    """Nodes from operands of any kind, with torch's promotion."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def place(self, x: Any) -> int:
        return _operand(self.graph, x)

    def type(self, x: Any) -> str:
        return self.graph.nodes[self.place(x)].type

    def value(self, place: int) -> Value:
        return Value(self.graph, place)

    def as_type(self, x: Any, to: str) -> Value:
        return self.value(cast(self.graph, self.place(x), to))

    def make(self, op: str, *operands: Any) -> Value:
        return self.value(self.graph.make(op, *(self.place(x) for x in operands)))

    def common(self, *operands: Any, least: str = "i") -> tuple[list[Value], str]:
        """The operands in their common type: float where one is, else `least` or what they all are."""
        types = {self.type(x) for x in operands}
        to = "f" if "f" in types else "i" if "i" in types or least == "i" else "b"
        return [self.as_type(x, to) for x in operands], to

    def float(self, op: str, *operands: Any) -> Value:
        return self.make(op, *(self.as_type(x, "f") for x in operands))


def _arithmetic(op: str) -> Callable:
    def apply(g: _Builder, x: Any, y: Any, *, alpha: Any = 1) -> Value:
        if op in ("add", "sub") and alpha != 1:
            y = _arithmetic("mul")(g, y, alpha)
        return g.make(op, *g.common(x, y)[0])

    return apply


def _of_float(op: str) -> Callable:
    return lambda g, x: g.float(op, x)


def _signed(op: str) -> Callable:
    def apply(g: _Builder, x: Any) -> Value:
        return g.make(op, x) if g.type(x) == "f" else _signed_integer(g, op, g.as_type(x, "i"))

    return apply


def _signed_integer(g: _Builder, op: str, x: Value) -> Value:
    if op == "sign":
        return _arithmetic("sub")(g, g.as_type(g.make("lt", 0, x), "i"), g.as_type(g.make("lt", x, 0), "i"))
    return g.make(op, x)


def _compare(op: str, swapped: bool = False) -> Callable:
    def apply(g: _Builder, x: Any, y: Any) -> Value:
        (x, y), _ = g.common(x, y)
        return g.make(op, *((y, x) if swapped else (x, y)))

    return apply


def _bits(op: str) -> Callable:
    def apply(g: _Builder, x: Any, y: Any) -> Value:
        (x, y), kind = g.common(x, y, least="b")
        if kind == "f":
            raise Refused(f"the bits of a float ({op})")
        return g.make(op, x, y)

    return apply


def _not(g: _Builder, x: Any) -> Value:
    if g.type(x) == "f":
        raise Refused("the bits of a float (not)")
    return g.make("not", x)


def _logical(op: str | None) -> Callable:
    def apply(g: _Builder, *operands: Any) -> Value:
        truths = [g.as_type(x, "b") for x in operands]
        return g.make(op, *truths) if op else g.make("not", *truths)

    return apply


def _integer_or_float(op: str) -> Callable:
    """floordiv, mod: of floats by floor."""

    def apply(g: _Builder, x: Any, y: Any) -> Value:
        (x, y), kind = g.common(x, y)
        if kind == "i":
            return g.make(op, x, y)
        quotient = g.make("floor", g.make("div", x, y))
        return quotient if op == "floordiv" else g.make("sub", x, g.make("mul", quotient, y))

    return apply


def _div(g: _Builder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return _integer_or_float("floordiv")(g, x, y)
    if rounding_mode == "trunc":
        raise Refused('torch.div with rounding_mode="trunc"; "floor" is served')
    return g.float("div", x, y)


def _where(g: _Builder, condition: Any, x: Any, y: Any) -> Value:
    if g.type(condition) != "b":
        raise Refused("torch.where with a condition that is no boolean")
    (x, y), _ = g.common(x, y, least="b")
    return g.make("select", condition, x, y)


def _clamp(g: _Builder, x: Any, min: Any = None, max: Any = None) -> Value:
    # a NaN passes, and the gradient on a bound is 1, as torch has them
    if min is not None:
        (a, b), _ = g.common(x, min)
        x = g.make("select", _compare("lt")(g, a, b), b, a)
    if max is not None:
        (a, b), _ = g.common(x, max)
        x = g.make("select", _compare("lt", True)(g, a, b), b, a)
    return x


def _two(op: str) -> Callable:
    def apply(g: _Builder, x: Any, y: Any) -> Value:
        return g.make(op, *g.common(x, y)[0])

    return apply


def _whole_power(g: _Builder, base: Value, exponent: int) -> Value:
    """By squaring; exponent is 1 at least."""
    if exponent == 1:
        return base
    half = _whole_power(g, g.make("mul", base, base), exponent // 2)
    return g.make("mul", half, base) if exponent % 2 else half


def _power(g: _Builder, x: Any, exponent: Any) -> Value:
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        if float(exponent).is_integer() and 1 <= abs(exponent) <= 64:
            negative = exponent < 0
            if negative and g.type(x) != "f":
                raise Refused("a negative power of an integer")
            base = g.as_type(x, "f") if isinstance(exponent, float) or negative else g.common(x)[0][0]
            result = _whole_power(g, base, int(abs(exponent)))
            return g.make("div", 1.0, result) if negative else result
        if exponent == 0.5:
            return g.float("sqrt", x)
        if exponent == 0:
            return g.value(g.graph.constant(1.0 if g.type(x) == "f" else 1))
    return g.float("pow", x, exponent)


# A branch that is not taken must be finite: its derivative is multiplied by 0.


def _softplus(g: _Builder, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Value:
    y = g.make("mul", g.as_type(x, "f"), float(beta))
    large = g.make("lt", float(threshold), y)
    small = g.make("log1p", g.make("exp", g.make("select", large, 0.0, y)))
    return g.make("div", g.make("select", large, y, small), float(beta))


def _logsigmoid(g: _Builder, x: Any) -> Value:
    # min(x, 0) - log(1 + e^-|x|), with -|x| by a select, whose derivative at 0 is not 0
    x = g.as_type(x, "f")
    negative = g.make("lt", x, 0.0)
    away = g.make("select", negative, x, g.make("neg", x))
    return g.make("sub", g.make("select", negative, x, 0.0), g.make("log1p", g.make("exp", away)))


def _gelu(g: _Builder, x: Any, *, approximate: str = "none") -> Value:
    half = g.make("mul", g.as_type(x, "f"), 0.5)
    if approximate == "none":
        return g.make("mul", half, g.make("add", g.make("erf", g.make("mul", x, math.sqrt(0.5))), 1.0))
    if approximate != "tanh":
        raise Refused(f"gelu with approximate={approximate!r}")
    cube = g.make("mul", g.make("mul", x, x), x)
    inner = g.make("mul", g.make("add", x, g.make("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
    return g.make("mul", half, g.make("add", g.make("tanh", inner), 1.0))


def _elu(g: _Builder, x: Any, alpha: float = 1.0) -> Value:
    x = g.as_type(x, "f")
    positive = g.make("lt", 0.0, x)
    below = g.make("mul", g.make("expm1", g.make("select", positive, 0.0, x)), float(alpha))
    return g.make("select", positive, x, below)


def _leaky_relu(g: _Builder, x: Any, negative_slope: float = 0.01) -> Value:
    x = g.as_type(x, "f")
    return g.make("select", g.make("lt", 0.0, x), x, g.make("mul", x, float(negative_slope)))


def _logaddexp(g: _Builder, x: Any, y: Any) -> Value:
    x, y = g.as_type(x, "f"), g.as_type(y, "f")
    apart = g.make("neg", g.make("abs", g.make("sub", x, y)))
    sum = g.make("add", g.make("max", x, y), g.make("log1p", g.make("exp", apart)))
    return g.make("select", g.make("eq", x, y), g.make("add", x, math.log(2)), sum)  # infinite ones too


def _to(g: _Builder, x: Any, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Value:
    kind = next((a for a in args if isinstance(a, torch.dtype)), dtype)
    kind = next((a.dtype for a in args if isinstance(a, (torch.Tensor, Value))), kind)
    if kind is None:
        return g.value(g.place(x))
    if kind.is_complex:
        raise Refused(f"a score as {kind}")
    # a score is float32 throughout, as in compiled kernels: a type of 16 bits does not round it
    return g.as_type(x, "f" if kind.is_floating_point else "b" if kind == torch.bool else "i")


def _filled(number: float) -> Callable:
    def apply(g: _Builder, x: Any, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Value:
        if any(isinstance(s, int) or len(s) for s in size):
            raise Refused("a new tensor that has dimensions")
        return _to(g, g.value(g.graph.constant(number)), dtype=dtype or g.value(g.place(x)).dtype)

    return apply


def _same(g: _Builder, x: Any, *_: Any, **__: Any) -> Value:
    return g.value(g.place(x))


def _getitem(g: _Builder, tensor: Any, indices: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        raise Refused("an index of one score; only captured tensors have indices")
    return _Row(g.graph, _captured(tensor), ())[indices]


class _Row:
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
            place = _operand(self._graph, i)
            if self._graph.nodes[place].type != "i":
                raise Refused("an index that is no integer")
            if self._graph.depends(place, S):
                raise Refused("an index that depends on the score")
            places.append(place)
        if len(places) > self._tensor.dim():
            raise IndexError(f"{len(places)} indices of a captured tensor of {self._tensor.dim()} dimensions")
        if len(places) < self._tensor.dim():
            return _Row(self._graph, self._tensor, tuple(places))
        return Value(self._graph, self._graph.load(self._tensor, tuple(places)))

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise next(v for v in _flat((args, kwargs or {})) if isinstance(v, _Row))._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refuse()

    def _operator(self, *_: Any) -> Any:
        raise self._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operator
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = __matmul__ = _operator
    __bool__ = __iter__ = __neg__ = __invert__ = __abs__ = _operator


OPERATIONS: dict[str, Callable] = {
    **{op: _arithmetic(op) for op in ("add", "sub", "mul")},
    **{
        op: _of_float(op)
        for op in ("exp", "log", "log1p", "expm1", "tanh", "sigmoid", "sqrt", "sin", "cos", "erf")
    },
    **{op: _signed(op) for op in ("neg", "abs", "sign", "floor")},
    **{op: _compare(op) for op in COMPARISONS},
    "gt": _compare("lt", True),
    "ge": _compare("le", True),
    **{op: _bits(op) for op in ("and", "or", "xor")},
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "logical_not": _logical(None),
    "not": _not,
    "shl": _bits("shl"),
    "shr": _bits("shr"),
    "floordiv": _integer_or_float("floordiv"),
    "mod": _integer_or_float("mod"),
    "div": _div,
    "where": _where,
    "masked_fill": lambda g, x, mask, value: _where(g, mask, value, x),
    "clamp": _clamp,
    "clamp_min": lambda g, x, min: _clamp(g, x, min),
    "clamp_max": lambda g, x, max: _clamp(g, x, None, max),
    "relu": lambda g, x: g.make("select", _compare("le")(g, x, 0), g.common(0, x)[0][0], x),
    "maximum": _two("max"),
    "minimum": _two("min"),
    "pow": _power,
    "exp2": lambda g, x: g.make("exp", g.make("mul", g.as_type(x, "f"), math.log(2))),
    "log2": lambda g, x: g.make("mul", g.float("log", x), 1 / math.log(2)),
    "rsqrt": lambda g, x: g.make("div", 1.0, g.float("sqrt", x)),
    "reciprocal": lambda g, x: g.float("div", 1.0, x),
    "square": lambda g, x: g.make("mul", *g.common(x, x)[0]),
    "lerp": lambda g, x, y, w: g.make("add", x, g.float("mul", w, g.float("sub", y, x))),
    "silu": lambda g, x: g.make("mul", g.as_type(x, "f"), g.float("sigmoid", x)),
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "log_sigmoid": _logsigmoid,
    "gelu": _gelu,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "logaddexp": _logaddexp,
    "isnan": lambda g, x: g.make("ne", g.as_type(x, "f"), g.as_type(x, "f")),
    "to": _to,
    "type": _to,
    **{name: (lambda g, x: g.as_type(x, "f")) for name in ("float", "double", "half", "bfloat16")},
    **{name: (lambda g, x: g.as_type(x, "i")) for name in ("int", "long", "short")},
    "bool": lambda g, x: g.as_type(x, "b"),
    "new_ones": _filled(1.0),
    "ones_like": _filled(1.0),
    "new_zeros": _filled(0.0),
    "zeros_like": _filled(0.0),
    "new_full": lambda g, x, size, value, **kw: _filled(value)(g, x, size, **kw),
    "full_like": lambda g, x, value, **kw: _filled(value)(g, x, **kw),
    "contiguous": _same,
    "clone": _same,
    "view": _same,
    "getitem": _getitem,
}


def line_of(error: BaseException, function: Callable) -> str:
    """Where in `function` an error was raised: "file.py:12", or its name."""
    code, at = getattr(function, "__code__", None), None
    frame = error.__traceback__
    while frame is not None and code is not None:
        if frame.tb_frame.f_code is code:
            at = f"{code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return at or str(getattr(function, "__qualname__", type(function).__name__))
