"""A program's section as the text of Triton device functions.

`user_score` gives the score of a tile, `user_slope` the score and its derivative, and `user_scatter` adds what a tile gives to the
gradients of the elements that the section loads. Each takes the scaled products s (rows, keys) or (keys, rows) and the numbers b, h, q and
k, which broadcast to it. The text says nothing of a number that a later call may have another of: float constants but the simplest, and
integers of sizes, are arguments (`Printed`).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from .program import BY_KEY, INPUTS_OF_ROW, OPS, Section, arity, base

_PLAIN_FLOATS = {0.0, 1.0, -1.0, 0.5, -0.5, math.inf, -math.inf}
_LARGEST_PLAIN = 16  # integers up to it stand in the text, and every divisor and count of bits
_NAMES = re.compile(r"\bn\d+\b")  # of a function's values
_OF_Q, _OF_K = 1, 2  # what a value differs by in a tile

_HEADER = '''"""Written by fastattn.flex_attention for one score function; not to be edited: another text has another name."""
import triton
import triton.language as tl

from fastattn.ops.flex.triton_values import add_elements, element, expm1, floordiv, log1p, mod, power, sign, spread, tanh, whole

'''

_INFIX = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_INFIX |= {"and": "&", "or": "|", "xor": "^"}
_FORMS = {name: f"{{0}} {sign} {{1}}" for name, sign in _INFIX.items()}
_FORMS |= {
    "div": "tl.div_rn({0}, {1})",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "sqrt": "tl.sqrt_rn({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "expm1": "expm1({0})",
    "tanh": "tanh({0})",
    "sigmoid": "tl.sigmoid({0})",
    "erf": "tl.erf({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "floor": "tl.floor({0})",
    "sign": "sign({0})",
    "pow": "power({0}, {1})",
    "floordiv": "floordiv({0}, {1})",
    "mod": "mod({0}, {1})",
    "shl": "{0} << ({1} & 31)",
    "shr": "{0} >> ({1} & 31)",
    "select": "tl.where({0}, {1}, {2})",
    "i2f": "{0}.to(tl.float32)",
    "f2i": "whole({0})",
    "b2i": "-{0}",
    "not": "~{0}",
}
_COMPARISONS = {"lt", "le", "eq", "ne"}
_OF_CONDITIONS = {"and", "or", "xor", "not"}
_BAKED = {"floordiv", "mod", "shl", "shr"}  # what the second operand is compiled for


class Printed(NamedTuple):
    """The text of a section's functions, and the constants that they take."""

    text: str
    numbers: tuple[float, ...]
    counts: tuple[int, ...]
    gathers: int  # loads of an element for each score


class _Value(NamedTuple):
    text: str
    condition: bool
    uses: int


class _Section:
    def __init__(self, section: Section) -> None:
        self.section = section
        self.numbers: list[float] = []
        self.counts: list[int] = []
        baked = {
            operands[1]
            for code, _, *operands in section.instructions
            if base(OPS[code]) in _BAKED and operands[1] < section.scalars
        }
        values = {
            0: _Value("b", False, 0),
            1: _Value("h", False, 0),
            2: _Value("q", False, _OF_Q),
            section.scalars: _Value("s", False, _OF_Q | _OF_K),
            section.scalars + 1: _Value("k", False, _OF_K),
        }
        constants = [self._float(x) for x in section.floats]
        first = INPUTS_OF_ROW + len(constants)
        constants += [self._integer(x, first + i in baked) for i, x in enumerate(section.integers)]
        values |= {INPUTS_OF_ROW + i: _Value(text, False, 0) for i, text in enumerate(constants)}
        self.values: dict[int, _Value] = values
        self.lines: list[tuple[str, str]] = []  # each name and what it is
        self.gathers = 0
        for i, (code, result, *operands) in enumerate(section.instructions):
            name = OPS[code]
            args = [values[r] for r in operands[: arity(name)]]
            text, condition = self._expression(name, args)
            uses = 0
            for a in args:
                uses |= a.uses
            if base(name) == "load_row":
                uses |= _OF_K
            self.gathers += base(name) in ("load", "load_row") and uses == _OF_Q | _OF_K
            self.lines.append((f"n{i}", text))
            values[result] = _Value(f"n{i}", condition, uses)

    def _float(self, x: float) -> str:
        if math.isnan(x):
            return 'float("nan")'
        if x in _PLAIN_FLOATS:
            return f'float("{x}")' if math.isinf(x) else repr(x)
        self.numbers.append(x)
        return f"captured.numbers[{len(self.numbers) - 1}]"

    def _integer(self, x: int, baked: bool) -> str:
        if baked or abs(x) <= _LARGEST_PLAIN:
            return repr(x)
        self.counts.append(x)
        return f"captured.counts[{len(self.counts) - 1}]"

    def _expression(self, name: str, args: list[_Value]) -> tuple[str, bool]:
        """(text, whether it is a condition)."""
        op = base(name)
        if op in ("load", "load_row"):
            index = args[0].text + (" + k" if op == "load_row" else "")
            kind = "float" if name.endswith("f") else "integer"
            return f"element(captured.{kind}s, {index}, captured.last_{kind})", False
        if op == "select":
            test = args[0].text if args[0].condition else f"({args[0].text} != 0)"
            return _FORMS[op].format(test, _counted(args[1]), _counted(args[2])), False
        if op == "b2i" and args[0].condition:
            return f"tl.where({args[0].text}, 1, 0)", False
        if op in _OF_CONDITIONS and all(a.condition for a in args):
            return _FORMS[op].format(*(a.text for a in args)), True
        return _FORMS[op].format(*map(_counted, args)), op in _COMPARISONS

    def whole(self, register: int) -> str:
        value = self.values[register]
        return value.text if value.uses == _OF_Q | _OF_K else f"spread({_counted(value)}, s)"


def _counted(value: _Value) -> str:
    """A condition as 0 and -1, in an operand that counts."""
    return f"tl.where({value.text}, -1, 0)" if value.condition else value.text


def printed(section: Section) -> Printed:
    """The functions of a section: `user_score` of one without derivatives, else `user_slope` and `user_scatter`."""
    of = _Section(section)
    if section.slope == -1:
        functions = [_function(of, "user_score", [f"return {of.whole(section.score)}"])]
    else:
        results = f"return {of.whole(section.score)}, {of.whole(section.slope)}"
        functions = [_function(of, "user_slope", [results])]
        if section.loads:
            lines = [line for load in section.loads for line in _scattered(of, *load)]
            functions.append(_function(of, "user_scatter", lines, "ds, "))
    text = _HEADER + "\n\n".join(functions)
    return Printed(text, tuple(of.numbers), tuple(of.counts), of.gathers)


def _function(of: _Section, name: str, results: list[str], more: str = "") -> str:
    """A function of these last lines, and of what they are made of."""
    needed = set(_NAMES.findall(" ".join(results)))
    lines = []
    for result, text in reversed(of.lines):
        if result in needed:
            needed.update(_NAMES.findall(text))
            lines.append(f"{result} = {text}")
    body = "".join(f"    {line}\n" for line in (*reversed(lines), *results))
    return f"@triton.jit\ndef {name}({more}s, b, h, q, k, captured):\n{body}"


def _scattered(of: _Section, index: int, derivative: int) -> Iterator[str]:
    """The lines that add the part of one load's gradient, first summed along the dims that its index does not differ along."""
    at, by_key = of.values[index & ~BY_KEY], bool(index & BY_KEY)
    uses = at.uses | (_OF_K if by_key else 0)
    part = f"tl.where(ds == 0.0, 0.0, ds * {of.values[derivative].text})"
    if uses == _OF_Q:
        part = f"tl.sum({part}, 1, keep_dims=True)"
    elif uses == _OF_K:
        part = f"tl.sum({part}, 0, keep_dims=True)"
    elif not uses:
        part = f"tl.sum(tl.sum({part}, 1), 0)"
    yield f"part = {part}"
    text = at.text + (" + k" if by_key else "")
    yield f"add_elements(captured.gradients, {text}, captured.last_float, part)"
