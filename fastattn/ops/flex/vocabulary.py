"""What a score function may do: torch's names, each as nodes of a graph."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .graph import COMPARISONS, Graph
from .tracing import Refused, Row, Value, captured, cast, operand


class Builder:
    """Nodes from operands of any kind, with torch's promotion."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def place(self, x: Any) -> int:
        return operand(self.graph, x)

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
    def apply(g: Builder, x: Any, y: Any, *, alpha: Any = 1) -> Value:
        if op in ("add", "sub") and alpha != 1:
            y = _arithmetic("mul")(g, y, alpha)
        return _pair(g, op, x, y)

    return apply


# of two booleans torch's results are booleans
_OF_BOOLEANS = {"add": "or", "mul": "and", "max": "or", "min": "and"}


def _pair(g: Builder, op: str, x: Any, y: Any) -> Value:
    (x, y), kind = g.common(x, y, least="b")
    if kind == "b":
        if op not in _OF_BOOLEANS:
            raise Refused(f"{op} of booleans; write &, | and ~")
        op = _OF_BOOLEANS[op]
    return g.make(op, x, y)


def _of_float(op: str) -> Callable:
    return lambda g, x: g.float(op, x)


def _signed(op: str) -> Callable:
    def apply(g: Builder, x: Any) -> Value:
        return g.make(op, x) if g.type(x) == "f" else _signed_integer(g, op, g.as_type(x, "i"))

    return apply


def _signed_integer(g: Builder, op: str, x: Value) -> Value:
    if op == "floor":
        return x
    if op == "sign":
        return _arithmetic("sub")(g, g.as_type(g.make("lt", 0, x), "i"), g.as_type(g.make("lt", x, 0), "i"))
    return g.make(op, x)


def _compare(op: str, swapped: bool = False) -> Callable:
    def apply(g: Builder, x: Any, y: Any) -> Value:
        (x, y), _ = g.common(x, y)
        return g.make(op, *((y, x) if swapped else (x, y)))

    return apply


def _bits(op: str) -> Callable:
    def apply(g: Builder, x: Any, y: Any) -> Value:
        (x, y), kind = g.common(x, y, least="b")
        if kind == "f":
            raise Refused(f"the bits of a float ({op})")
        return g.make(op, x, y)

    return apply


def _not(g: Builder, x: Any) -> Value:
    if g.type(x) == "f":
        raise Refused("the bits of a float (not)")
    return g.make("not", x)


def _logical(op: str | None) -> Callable:
    def apply(g: Builder, *operands: Any) -> Value:
        truths = [g.as_type(x, "b") for x in operands]
        return g.make(op, *truths) if op else g.make("not", *truths)

    return apply


def _of_integers(op: str) -> Callable:
    """floordiv, mod. Of floats torch's are exact, which no quotient that is rounded is: 1.0 // 0.1 is 9."""

    def apply(g: Builder, x: Any, y: Any) -> Value:
        (x, y), kind = g.common(x, y)
        if kind == "f":
            raise Refused("// or % of floats; write torch.floor(x / y), or use integers")
        return g.make(op, x, y)

    return apply


def _div(g: Builder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return _of_integers("floordiv")(g, x, y)
    if rounding_mode == "trunc":
        raise Refused('torch.div with rounding_mode="trunc"; "floor" is served')
    return g.float("div", x, y)


def _where(g: Builder, condition: Any, x: Any, y: Any) -> Value:
    if g.type(condition) != "b":
        raise Refused("torch.where with a condition that is no boolean")
    (x, y), _ = g.common(x, y, least="b")
    return g.make("select", condition, x, y)


def _clamp(g: Builder, x: Any, min: Any = None, max: Any = None) -> Value:
    # a NaN passes, and the gradient on a bound is 1, as torch has them
    if min is not None:
        (a, b), _ = g.common(x, min)
        x = g.make("select", _compare("lt")(g, a, b), b, a)
    if max is not None:
        (a, b), _ = g.common(x, max)
        x = g.make("select", _compare("lt", True)(g, a, b), b, a)
    return x


def _two(op: str) -> Callable:
    return lambda g, x, y: _pair(g, op, x, y)


def _whole_power(g: Builder, base: Value, exponent: int) -> Value:
    """By squaring; exponent is 1 at least."""
    if exponent == 1:
        return base
    half = _whole_power(g, g.make("mul", base, base), exponent // 2)
    return g.make("mul", half, base) if exponent % 2 else half


def _power(g: Builder, x: Any, exponent: Any) -> Value:
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


def _softplus(g: Builder, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Value:
    y = g.make("mul", g.as_type(x, "f"), float(beta))
    large = g.make("lt", float(threshold), y)
    small = g.make("log1p", g.make("exp", g.make("select", large, 0.0, y)))
    return g.make("div", g.make("select", large, y, small), float(beta))


def _logsigmoid(g: Builder, x: Any) -> Value:
    # min(x, 0) - log(1 + e^-|x|), with -|x| by a select, whose derivative at 0 is not 0
    x = g.as_type(x, "f")
    negative = g.make("lt", x, 0.0)
    away = g.make("select", negative, x, g.make("neg", x))
    return g.make("sub", g.make("select", negative, x, 0.0), g.make("log1p", g.make("exp", away)))


def _gelu(g: Builder, x: Any, *, approximate: str = "none") -> Value:
    half = g.make("mul", g.as_type(x, "f"), 0.5)
    if approximate == "none":
        return g.make("mul", half, g.make("add", g.make("erf", g.make("mul", x, math.sqrt(0.5))), 1.0))
    if approximate != "tanh":
        raise Refused(f"gelu with approximate={approximate!r}")
    cube = g.make("mul", g.make("mul", x, x), x)
    inner = g.make("mul", g.make("add", x, g.make("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
    return g.make("mul", half, g.make("add", g.make("tanh", inner), 1.0))


def _elu(g: Builder, x: Any, alpha: float = 1.0) -> Value:
    x = g.as_type(x, "f")
    positive = g.make("lt", 0.0, x)
    below = g.make("mul", g.make("expm1", g.make("select", positive, 0.0, x)), float(alpha))
    return g.make("select", positive, x, below)


def _leaky_relu(g: Builder, x: Any, negative_slope: float = 0.01) -> Value:
    x = g.as_type(x, "f")
    return g.make("select", g.make("lt", 0.0, x), x, g.make("mul", x, float(negative_slope)))


def _logaddexp(g: Builder, x: Any, y: Any) -> Value:
    x, y = g.as_type(x, "f"), g.as_type(y, "f")
    apart = g.make("neg", g.make("abs", g.make("sub", x, y)))
    sum = g.make("add", g.make("max", x, y), g.make("log1p", g.make("exp", apart)))
    return g.make("select", g.make("eq", x, y), g.make("add", x, math.log(2)), sum)  # infinite ones too


def _to(g: Builder, x: Any, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Value:
    kind = next((a for a in args if isinstance(a, torch.dtype)), dtype)
    kind = next((a.dtype for a in args if isinstance(a, (torch.Tensor, Value))), kind)
    if kind is None:
        return g.value(g.place(x))
    if kind.is_complex:
        raise Refused(f"a score as {kind}")
    # a score is float32 throughout, as in compiled kernels: a type of 16 bits does not round it
    return g.as_type(x, "f" if kind.is_floating_point else "b" if kind == torch.bool else "i")


def _filled(number: float) -> Callable:
    def apply(g: Builder, x: Any, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Value:
        if any(isinstance(s, int) or len(s) for s in size):
            raise Refused("a new tensor that has dimensions")
        return _to(g, g.value(g.graph.constant(number)), dtype=dtype or g.value(g.place(x)).dtype)

    return apply


def _same(g: Builder, x: Any, *_: Any, **__: Any) -> Value:
    return g.value(g.place(x))


def _getitem(g: Builder, tensor: Any, indices: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        raise Refused("an index of one score; only captured tensors have indices")
    return Row(g.graph, captured(tensor), ())[indices]


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
    "floordiv": _of_integers("floordiv"),
    "mod": _of_integers("mod"),
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
    "lerp": lambda g, x, y, w: g.make("add", g.as_type(x, "f"), g.float("mul", w, g.float("sub", y, x))),
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
