"""Derivatives of a graph by reverse accumulation: of a score in s, and in each element that it loads from captured tensors."""

import math
from collections.abc import Callable

from .graph import Graph, S


def derive(graph: Graph, out: int, loads: tuple[int, ...]) -> tuple[int, dict[int, int]]:
    """(d out / d s, d out / d load for each of `loads`) as nodes of the same graph.

    Ties of a maximum halve the gradient, as torch has it. A branch of a select that is not taken has the derivative 0, whatever its
    value; the caller takes a product with a gradient of 0 as 0, so that what is masked with -inf adds nothing.
    """
    goal = S
    path = _leading_to(graph, out, goal, set(loads))
    adjoint: dict[int, int] = {out: graph.constant(1.0)}

    def push(place: int, value: int) -> None:
        if place in path:
            before = adjoint.get(place)
            adjoint[place] = value if before is None else _add(graph, before, value)

    for place in reversed(graph.reach([out])):
        if place in path and place in adjoint:
            _push(graph, place, adjoint[place], push)
    s = graph.input("s")
    zero = graph.constant(0.0)
    return adjoint.get(s, zero), {n: adjoint.get(n, zero) for n in loads}


def _leading_to(graph: Graph, out: int, goal: int, loads: set[int]) -> set[int]:
    """The float nodes whose derivative is wanted on the way: those that depend on s or on a wanted load."""
    path: set[int] = set()
    for place in graph.reach([out]):
        node = graph.nodes[place]
        if node.type == "f" and (place in loads or node.value == "s" or any(a in path for a in node.args)):
            path.add(place)
    return path


def _is_zero(graph: Graph, place: int) -> bool:
    node = graph.nodes[place]
    return node.op == "constant" and node.value == 0


def _add(graph: Graph, x: int, y: int) -> int:
    if _is_zero(graph, x):
        return y
    return x if _is_zero(graph, y) else graph.make("add", x, y)


def _push(graph: Graph, place: int, d: int, push: Callable[[int, int], None]) -> None:
    """The adjoints of a node's operands, of its own adjoint d."""
    node, make = graph.nodes[place], graph.make
    args = node.args

    def constant(x: float) -> int:
        return graph.constant(float(x))

    def product(x: int) -> int:
        # an adjoint of 0 is of a branch that is not taken: it stays 0 whatever x is
        return d if _is_zero(graph, d) else make("mul", d, x)

    def chosen(condition: int, x: int, y: int) -> int:
        return make("select", condition, x, y)

    zero = constant(0)
    match node.op:
        case "add":
            push(args[0], d)
            push(args[1], d)
        case "sub":
            push(args[0], d)
            push(args[1], make("neg", d))
        case "mul":
            push(args[0], product(args[1]))
            push(args[1], product(args[0]))
        case "div":
            push(args[0], make("div", d, args[1]))
            push(args[1], make("neg", make("div", product(place), args[1])))
        case "neg":
            push(args[0], make("neg", d))
        case "abs":
            push(args[0], product(make("sign", args[0])))
        case "exp":
            push(args[0], product(place))
        case "expm1":
            push(args[0], product(make("exp", args[0])))
        case "log":
            push(args[0], make("div", d, args[0]))
        case "log1p":
            push(args[0], make("div", d, make("add", args[0], constant(1))))
        case "tanh":
            push(args[0], product(make("sub", constant(1), make("mul", place, place))))
        case "sigmoid":
            push(args[0], product(make("mul", place, make("sub", constant(1), place))))
        case "sqrt":
            push(args[0], make("div", product(constant(0.5)), place))
        case "sin":
            push(args[0], product(make("cos", args[0])))
        case "cos":
            push(args[0], make("neg", product(make("sin", args[0]))))
        case "erf":
            bell = make("exp", make("neg", make("mul", args[0], args[0])))
            push(args[0], product(make("mul", bell, constant(2 / math.sqrt(math.pi)))))
        case "pow":
            below = make("pow", args[0], make("sub", args[1], constant(1)))
            push(args[0], product(make("mul", args[1], below)))
            # 0 to a power has the derivative 0 in it, where log(0) is -inf
            log = make("mul", place, make("log", args[0]))
            push(args[1], product(chosen(make("eq", args[0], zero), zero, log)))
        case "max" | "min":
            first = make("lt", *(args[::-1] if node.op == "max" else args))
            tie, half = make("eq", *args), product(constant(0.5))
            push(args[0], chosen(tie, half, chosen(first, d, zero)))
            push(args[1], chosen(tie, half, chosen(first, zero, d)))
        case "select":
            push(args[1], chosen(args[0], d, zero))
            push(args[2], chosen(args[0], zero, d))
        case "sign" | "floor" | "i2f" | "load" | "input" | "constant":
            pass
        case _:
            raise AssertionError(f"no derivative of {node.op}")
