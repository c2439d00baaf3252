"""What does not need a score is computed once: parts of a function that depend on the distance of query and key, or on no query.

Such a part, `table[h, bucket(q - k)]` or `slopes[h] * (k - q)`, becomes a table of its own, (B or 1, H or 1, distances) or (B or 1, H or 1,
keys), computed in float64 and rounded once, and one load from neighbouring places for each score. Its gradient goes on to what the part
captures by the same derivatives that a program has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .derivative import derive
from .evaluate import evaluate
from .graph import B, Graph, H, K, Q, S
from .prepare import Sizes, Traced, of_distance

_LEAST_SAVED = 2  # operations a score, of which a load is one


class Source(NamedTuple):
    """Where a tensor of a program comes from: a captured one of the traced graph, or a table made of one of its nodes."""

    number: int  # of the captured tensor, -1: a table
    place: int
    inputs: dict[str, torch.Tensor] | None


def hoisted(call: Traced) -> tuple[Traced, tuple[Source, ...]]:
    """The same call with parts as tables, which are tensors of its graph, and where each of its tensors comes from."""
    hoisting = _Hoisting(call)
    return hoisting.result(), tuple(hoisting.sources)


def materialised(sources: Sequence[Source], graph: Graph) -> list[torch.Tensor]:
    """The tensors of these sources, of a graph that has the same nodes."""
    return [
        graph.tensors[x.number] if x.number >= 0 else _table(graph, x.place, x.inputs or {}) for x in sources
    ]


def _table(graph: Graph, place: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if graph.nodes[place].type == "f":
        return _Table.apply(graph, place, inputs, *(graph.tensors[n] for n in _captured(graph, place)))
    (table,) = evaluate(graph, [place], inputs)
    return _shaped(table, inputs)


class _Hoisting:
    def __init__(self, call: Traced) -> None:
        self.call, self.graph, self.sizes = call, call.graph, call.sizes
        self.new = Graph()
        self.places: dict[int, int] = {}
        self.sources: list[Source] = []

    def result(self) -> Traced:
        score = self._copy(self.call.score)
        mask = None if self.call.mask is None else self._copy(self.call.mask)
        return replace(self.call, graph=self.new, score=score, mask=mask)

    def _new_load(self, tensor: torch.Tensor, indices: tuple[int, ...], source: Source) -> int:
        place = self.new.load(tensor, indices)
        if len(self.new.tensors) > len(self.sources):
            self.sources.append(source)
        return place

    def _copy(self, out: int) -> int:
        stack = [out]
        while stack:
            place = stack[-1]
            if place in self.places:
                stack.pop()
                continue
            if self._worth(place):
                self.places[place] = self._load(place)
                continue
            node = self.graph.nodes[place]
            waiting = [a for a in node.args if a not in self.places]
            if waiting:
                stack += waiting
                continue
            args = tuple(self.places[a] for a in node.args)
            if node.op == "constant":
                self.places[place] = self.new.constant(node.value, node.type)
            elif node.op == "input":
                self.places[place] = self.new.input(node.value)
            elif node.op == "load":
                self.places[place] = self._new_load(
                    self.graph.tensors[node.value], args, Source(node.value, -1, None)
                )
            else:
                self.places[place] = self.new.make(node.op, *args)
        return self.places[out]

    def _worth(self, place: int) -> bool:
        uses = self.graph.nodes[place].uses
        if uses & S or not uses & K or (uses & Q and not of_distance(self.graph, place)):
            return False
        of_score = [n for n in self.graph.reach([place]) if self.graph.nodes[n].uses & K]
        ops = [self.graph.nodes[n].op for n in of_score]
        gathers = uses & Q and "load" in ops  # of elements that are no neighbours
        return bool(gathers) or sum(op not in ("input", "constant") for op in ops) >= _LEAST_SAVED

    def _load(self, place: int) -> int:
        """The load of a table made of a node."""
        graph, new, sizes = self.graph, self.new, self.sizes
        uses = graph.nodes[place].uses
        inputs = _inputs(uses, sizes)
        last = new.input("k")
        if uses & Q:
            last = new.make("add", new.make("sub", new.constant(sizes.queries - 1), new.input("q")), last)
        zero = new.constant(0)
        indices = new.input("b") if uses & B else zero, new.input("h") if uses & H else zero, last
        return self._new_load(_table(graph, place, inputs), indices, Source(-1, place, inputs))


def _inputs(uses: int, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Of every element of a table, (B or 1, H or 1, distances or keys): the distance k - q from -(Lq - 1) on."""
    b = torch.arange(sizes.batch if uses & B else 1).view(-1, 1, 1)
    h = torch.arange(sizes.heads if uses & H else 1).view(1, -1, 1)
    if not uses & Q:
        return {"b": b, "h": h, "k": torch.arange(sizes.keys).view(1, 1, -1)}
    distance = torch.arange(-(sizes.queries - 1), sizes.keys).view(1, 1, -1)
    # one pair of each distance
    return {"b": b, "h": h, "q": (-distance).clamp(min=0), "k": distance.clamp(min=0)}


def _shaped(table: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = torch.broadcast_shapes(*(t.shape for t in inputs.values()))
    return table.expand(shape).contiguous()


def _captured(graph: Graph, place: int) -> list[int]:
    """The numbers of the floating tensors that a node reads, each once."""
    return list(dict.fromkeys(graph.nodes[n].value for n in _loads(graph, place)))


def _loads(graph: Graph, place: int) -> list[int]:
    return graph.where(lambda node: node.op == "load" and node.type == "f", [place])


class _Table(torch.autograd.Function):
    """A node's values, with the gradients of the tensors that it loads from."""

    @staticmethod
    def forward(
        ctx: Any, graph: Graph, place: int, inputs: dict[str, torch.Tensor], *captured: torch.Tensor
    ) -> torch.Tensor:
        ctx.graph, ctx.place, ctx.inputs = graph, place, inputs
        ctx.save_for_backward(*captured)
        (value,) = evaluate(graph, [place], inputs)
        return _shaped(value, inputs).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        graph, inputs = ctx.graph, ctx.inputs
        captured = dict(zip(_captured(graph, ctx.place), ctx.saved_tensors, strict=True))
        wanted = [n for n in _loads(graph, ctx.place) if graph.tensors[graph.nodes[n].value].requires_grad]
        _, derivatives = derive(graph, ctx.place, tuple(wanted))
        values = evaluate(graph, list(derivatives.values()), inputs)
        sums = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in captured.items()}
        grad = grads[0].double()
        for load, value in zip(derivatives, values, strict=True):
            node = graph.nodes[load]
            # what no gradient reaches has none, whatever its derivative is
            part = torch.where(grad == 0, 0.0, grad * value)
            index = evaluate(graph, list(node.args), inputs)
            total = sums[node.value]
            if index:
                total.index_put_(tuple(i.expand(part.shape) for i in index), part, accumulate=True)
            else:
                total += part.sum()
        found = [sums[n].to(t.dtype) if t.requires_grad else None for n, t in captured.items()]
        return None, None, None, *found
