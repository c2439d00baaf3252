"""The expression graph of a score or a mask: typed nodes, equal ones made once, constants folded.

A node has a type, "f" (float32), "i" (int32) or "b" (boolean), and `uses`, the set of inputs that it depends on: what does not depend on
both the row and the column of a score is computed once for many scores. The inputs are s, the scaled product, and b, h, q and k, the
numbers of batch entry, query head, query and key.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

S, B, H, Q, K = 1, 2, 4, 8, 16
INPUTS = {"s": ("f", S), "b": ("i", B), "h": ("i", H), "q": ("i", Q), "k": ("i", K)}

COMPARISONS = ("lt", "le", "eq", "ne")
_SYMMETRIC = {"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"}
# the type of a result, where it is not that of the operands
_RESULT = {"i2f": "f", "f2i": "i", "b2i": "i"} | dict.fromkeys(COMPARISONS, "b")

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Node(NamedTuple):
    op: str
    args: tuple[int, ...]
    value: Any  # of a constant; an input's name; the number of a load's tensor
    type: str
    uses: int


class Graph:
    """Nodes in an order in which each stands after its operands. A number of a node is its place."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.tensors: list[torch.Tensor] = []  # captured
        self._places: dict[tuple, int] = {}

    def _add(self, node: Node) -> int:
        # a constant is known by its type and its bits too: 0.0 and -0.0, True and 1 are equal
        key = (
            node.op,
            node.args,
            node.type,
            repr(node.value) if node.op == "constant" else node.value,
        )
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.nodes)
            self.nodes.append(node)
        return place

    def constant(self, value: float | int | bool, type: str | None = None) -> int:
        if type is None:
            type = "b" if isinstance(value, bool) else "i" if isinstance(value, int) else "f"
        value = {"b": bool, "i": int, "f": float}[type](value)
        if type == "i" and not INT_MIN <= value <= INT_MAX:
            raise OverflowError(f"the integer {value} does not fit 32 bits")
        return self._add(Node("constant", (), value, type, 0))

    def input(self, name: str) -> int:
        type, uses = INPUTS[name]
        return self._add(Node("input", (), name, type, uses))

    def load(self, tensor: torch.Tensor, indices: tuple[int, ...]) -> int:
        """An element of a captured tensor, one index a dimension."""
        number = next((i for i, t in enumerate(self.tensors) if t is tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        type = "f" if tensor.is_floating_point() else "b" if tensor.dtype == torch.bool else "i"
        return self._add(Node("load", indices, number, type, self._uses(indices)))

    def key(self) -> tuple:
        """All that the graph says of its nodes; of captured tensors their numbers."""
        return tuple(self._places)

    def copy(self, tensors: list[torch.Tensor]) -> "Graph":
        """The same nodes with these captured tensors."""
        other = Graph()
        other.nodes, other.tensors, other._places = list(self.nodes), list(tensors), dict(self._places)
        return other

    def _uses(self, args: Iterable[int]) -> int:
        uses = 0
        for a in args:
            uses |= self.nodes[a].uses
        return uses

    def make(self, op: str, *args: int) -> int:
        """A node whose operands have the types that the op takes; a simpler equal one where there is one."""
        types = [self.nodes[a].type for a in args]
        type = _RESULT.get(op, types[-1])
        simpler = self._simpler(op, args, type)
        if simpler is not None:
            return simpler
        if op in _SYMMETRIC:
            args = tuple(sorted(args))
        return self._add(Node(op, args, None, type, self._uses(args)))

    def _simpler(self, op: str, args: tuple[int, ...], type: str) -> int | None:
        nodes = [self.nodes[a] for a in args]
        values = [n.value if n.op == "constant" else None for n in nodes]
        if all(v is not None for v in values):
            return self._folded(op, nodes, values, type)
        if op == "add":
            # of floats x + 0 is not x for -0, which nothing after it can tell but a division or a sign
            for x, v in zip(args, reversed(values), strict=True):
                if v == 0 and (type == "i" or math.copysign(1, v) < 0):
                    return x
        if op == "sub" and values[1] == 0 and (type == "i" or math.copysign(1, values[1]) > 0):
            return args[0]
        if op == "mul":
            for x, v in zip(args, reversed(values), strict=True):
                if v == 1:
                    return x
        if op == "div" and values[1] is not None and _power_of_two(values[1]):
            return self.make("mul", args[0], self.constant(1 / values[1]))  # exact
        if op == "floordiv" and values[1] == 1:
            return args[0]
        if op == "select" and values[0] is not None:
            return args[1] if values[0] else args[2]
        if op == "select" and args[1] == args[2]:
            return args[1]
        if op in ("and", "or") and type == "b":
            for x, v in zip(args, reversed(values), strict=True):
                if v is not None:
                    return x if bool(v) is (op == "and") else self.constant(bool(v))
            if args[0] == args[1]:
                return args[0]
        if op == "not" and type == "b":
            inner = nodes[0]
            if inner.op == "not":
                return inner.args[0]
            if inner.op in ("eq", "ne"):
                return self.make("ne" if inner.op == "eq" else "eq", *inner.args)
            # of floats not (a < b) is no b <= a: one may be NaN
            if inner.op in ("lt", "le") and self.nodes[inner.args[0]].type == "i":
                return self.make("le" if inner.op == "lt" else "lt", *inner.args[::-1])
        return None

    def _folded(self, op: str, nodes: list[Node], values: list, type: str) -> int | None:
        """The value of an op of constants, as torch computes it."""
        from .evaluate import TORCH  # it imports this module for its types

        dtypes = {"f": torch.float64, "i": torch.int64, "b": torch.bool}
        operands = [torch.tensor(v, dtype=dtypes[n.type]) for v, n in zip(values, nodes, strict=True)]
        if op in ("floordiv", "mod") and values[1] == 0:
            raise ZeroDivisionError("an integer is divided by 0")
        return self.constant(TORCH[op](*operands).item(), type)

    def reach(self, outs: Iterable[int]) -> list[int]:
        """What the nodes `outs` are computed from, and these, in order."""
        wanted = set(outs)
        for place in range(max(wanted, default=-1), -1, -1):
            if place in wanted:
                wanted.update(self.nodes[place].args)
        return sorted(wanted)

    def depends(self, place: int, on: int) -> bool:
        return bool(self.nodes[place].uses & on)

    def where(self, kind: Callable[[Node], bool], outs: Iterable[int]) -> list[int]:
        return [n for n in self.reach(outs) if kind(self.nodes[n])]


def _power_of_two(x: float) -> bool:
    return 2.0**-126 <= abs(x) <= 2.0**126 and math.frexp(x)[0] in (0.5, -0.5)
