"""What a mask function says that `Mask` can: a causal mask, a window and documents, which kernels turn into ranges of keys."""

from typing import NamedTuple, cast

import torch

from ...masks import NO_MASK_ARGS, MaskArgs
from ...runtime.checks import has_contents
from .graph import B, Graph, H, K, Q

_NOTHING = cast(MaskArgs, NO_MASK_ARGS)


class _Linear(NamedTuple):
    """of_q * q + of_k * k + constant."""

    of_q: int
    of_k: int
    constant: int


def documents(graph: Graph, mask: int, length: int) -> torch.Tensor | None:
    """Offsets of documents, int32 from 0 to `length`, where a condition is t[q] == t[k] of captured integers that never decrease."""
    node = graph.nodes[mask]
    if node.op != "eq" or any(graph.nodes[a].op != "load" for a in node.args):
        return None
    x, y = (graph.nodes[a] for a in node.args)
    indices = {graph.nodes[i].value for load in (x, y) for i in load.args if graph.nodes[i].op == "input"}
    tensor = graph.tensors[x.value]
    if x.value != y.value or indices != {"q", "k"} or tensor.dim() != 1 or not has_contents(tensor):
        return None
    if tensor.is_floating_point():
        return None  # a NaN is not equal to itself, and plans are kept whatever captured floats hold
    if tensor.shape[0] < length:
        return None  # an index out of range, which is refused elsewhere
    numbers = tensor.detach()[:length]
    if length < 2 or bool((numbers[1:] < numbers[:-1]).any()):
        return None
    starts = torch.nonzero(numbers[1:] != numbers[:-1])[:, 0] + 1
    ends = torch.tensor([0, length], device=starts.device)
    return torch.cat([ends[:1], starts, ends[1:]]).to(torch.int32)


def recognise(graph: Graph, mask: int, *, square: bool) -> tuple[MaskArgs, int | None]:
    """(the part of a mask that `MaskArgs` says, a node with the rest or None).

    square: as many queries as keys, where the diagonal of `Mask` is q == k. Otherwise nothing is recognised.
    """
    if not square:
        return _NOTHING, mask
    sides: dict[str, int] = {}
    rest = [part for part in _parts(graph, mask) if not _take(graph, part, sides)]
    causal = sides.get("right") == 0
    if causal:
        sides.pop("right")
    node = None
    for part in rest:
        node = part if node is None else graph.make("and", node, part)
    if not causal and not sides:
        return _NOTHING, node
    left, right = sides.get("left", -1), sides.get("right", -1)
    return _NOTHING._replace(causal=causal, window_left=left, window_right=right), node


def _parts(graph: Graph, place: int) -> list[int]:
    node = graph.nodes[place]
    if node.op == "and" and node.type == "b":
        return [part for a in node.args for part in _parts(graph, a)]
    return [place]


def _take(graph: Graph, part: int, sides: dict[str, int]) -> bool:
    """Whether a condition bounds q - k or k - q by a constant; it is then in `sides`, the keys on each side of the query's own."""
    node = graph.nodes[part]
    if node.op == "constant" and node.value is True:
        return True
    if node.op not in ("lt", "le") or graph.nodes[node.args[0]].type != "i" or node.uses & (B | H):
        return False
    bounds = _bounds(graph, node.args[0], node.args[1], int(node.op == "lt"))
    if bounds is None or any(most < 0 for most in bounds.values()):
        return False
    for side, most in bounds.items():
        sides[side] = min(most, sides.get(side, most))
    return True


def _bounds(graph: Graph, x: int, y: int, less: int) -> dict[str, int] | None:
    """{side: most keys} of x + less <= y."""
    if graph.nodes[x].op == "abs":
        inner = graph.nodes[x].args[0]
        either = [_bounds(graph, inner, y, less), _bounds(graph, graph.make("neg", inner), y, less)]
        return None if either[0] is None or either[1] is None else either[0] | either[1]
    left, right = _linear(graph, x), _linear(graph, y)
    if left is None or right is None:
        return None
    of_q, of_k, constant = (a - b for a, b in zip(left, right, strict=True))
    if (of_q, of_k) == (1, -1):
        return {"left": -constant - less}
    if (of_q, of_k) == (-1, 1):
        return {"right": -constant - less}
    return None


def _linear(graph: Graph, place: int) -> _Linear | None:
    node = graph.nodes[place]
    if node.op == "constant":
        return _Linear(0, 0, int(node.value))
    if node.op == "input":
        return _Linear(int(node.uses == Q), int(node.uses == K), 0) if node.uses & (Q | K) else None
    if node.op not in ("add", "sub", "neg"):
        return None
    x, y = _linear(graph, node.args[0]), _linear(graph, node.args[-1])
    if x is None or y is None:
        return None
    if node.op == "neg":
        return _Linear(*(-a for a in x))
    sign = 1 if node.op == "add" else -1
    return _Linear(*(a + sign * b for a, b in zip(x, y, strict=True)))
