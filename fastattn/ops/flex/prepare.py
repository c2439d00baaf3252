"""From a user's functions and a call's sizes to what the op takes: a program, tables of captured numbers, classes of tiles."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...runtime.checks import has_contents
from .derivative import derive
from .evaluate import evaluate
from .graph import INT_MAX, INT_MIN, B, Graph, H, K, Q
from .intervals import Interval, intervals, overflowing
from .program import SECTIONS, Assembly, section
from .tracing import line_of, trace

TILE = 64  # queries and keys of a tile that is classed
EMPTY, FULL, MIXED = 0, 1, 2
_MOST_CHECKED = 1 << 24  # indices evaluated at a time
_MOST_ELEMENTS = INT_MAX  # of all captured tensors

_programs: OrderedDict[tuple, torch.Tensor] = OrderedDict()  # safe: a key says all that a program is made of
_MOST_PROGRAMS = 256


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    queries: int
    keys: int

    @cached_property
    def whole(self) -> dict[str, Interval]:
        """All of the attention as one box."""
        counts = {"b": self.batch, "h": self.heads, "q": self.queries, "k": self.keys}
        return {
            name: Interval(np.float64(0), np.float64(max(count - 1, 0))) for name, count in counts.items()
        }

    def tiles(self, uses: int) -> dict[str, Interval]:
        """A box for each tile, (B or 1, H or 1, tiles of queries, tiles of keys)."""
        boxes = {}
        for axis, (name, count) in enumerate((("q", self.queries), ("k", self.keys)), start=2):
            first = np.arange(0, count, TILE, dtype=np.float64)
            shape = [1] * 4
            shape[axis] = len(first)
            boxes[name] = Interval(first.reshape(shape), np.minimum(first + TILE, count).reshape(shape) - 1)
        for axis, (name, count, bit) in enumerate((("b", self.batch, B), ("h", self.heads, H))):
            each = np.arange(count if uses & bit else 1, dtype=np.float64)
            shape = [1] * 4
            shape[axis] = len(each)
            of_each = each.reshape(shape)
            boxes[name] = Interval(of_each, of_each)
        return boxes


@dataclass
class Traced:
    """A call's functions as one graph."""

    graph: Graph
    score: int
    mask: int | None
    sizes: Sizes
    op: str = "flex_attention"  # whose messages name what is wrong
    weighs: bool = False  # the score is the weight itself: no softmax follows

    def outs(self) -> list[int]:
        return [self.score, *([] if self.mask is None else [self.mask])]


def traced(
    score_mod: Callable | None,
    mask_mod: Callable | None,
    sizes: Sizes,
    *,
    op: str = "flex_attention",
    what: str = "score_mod",
    weighs: bool = False,
) -> Traced:
    """The graph of both functions. NotImplementedError, with the line, for what no kernel can do.

    what: how messages call score_mod. weighs: it gives weights, and no scores.
    """
    graph = Graph()
    score = graph.input("s")
    if score_mod is not None:
        score = _trace(op, what, score_mod, graph, of_score=True)
    mask = None
    if mask_mod is not None:
        mask = _trace(op, "mask_mod", mask_mod, graph, of_score=False)
    return Traced(graph, score, mask, sizes, op, weighs)


def check_devices(call: Traced, device: torch.device) -> None:
    """Captured tensors are where the query is, or numbers on the CPU."""
    for t in call.graph.tensors:
        if t.device != device and not (t.dim() == 0 and t.device.type == "cpu"):
            raise ValueError(
                f"fastattn.{call.op}: a captured tensor of shape {tuple(t.shape)} is on {t.device} but query is on {device}"
            )


def _trace(op: str, what: str, function: Callable, graph: Graph, *, of_score: bool) -> int:
    try:
        return trace(function, graph, of_score=of_score)
    except (NotImplementedError, OverflowError, ZeroDivisionError) as error:
        raise NotImplementedError(
            f"fastattn.{op}: {what} ({line_of(error, function)}) has {error}. "
            'backend="reference" evaluates any function with plain torch'
        ) from error
    except TypeError as error:
        raise TypeError(f"fastattn.{op}: {what} ({line_of(error, function)}): {error}") from error


# --- what indices and integers can be --------------------------------------------------------------------------------


def check_numbers(call: Traced) -> dict[int, tuple[bool, ...]]:
    """For each load, whether each of its indices is at least 0. IndexError for an index out of range, NotImplementedError for an
    integer that 32 bits may not hold."""
    graph, boxes = call.graph, call.sizes.whole
    known = all(has_contents(t) for t in graph.tensors)  # not while tracing, and not on the meta device
    for tensor in graph.tensors if known else ():
        if tensor.dtype == torch.int64 and tensor.numel():
            low, high = (int(x) for x in torch.aminmax(tensor.detach()))
            if low < INT_MIN or high > INT_MAX:
                raise NotImplementedError(
                    f"fastattn.{call.op}: a captured tensor of integers beyond 32 bits "
                    f"(from {low} to {high}); kernels count in int32"
                )
    place = overflowing(graph, call.outs(), boxes)
    if place is not None and known:
        raise NotImplementedError(
            f"fastattn.{call.op}: an integer ({graph.nodes[place].op}) may not fit 32 bits, in which scores are indexed"
        )
    from_start: dict[int, tuple[bool, ...]] = {}
    for load in graph.where(lambda node: node.op == "load", call.outs()):
        node = graph.nodes[load]
        ranges = intervals(graph, list(node.args), boxes)
        tensor = graph.tensors[node.value]
        flags = []
        for index, range_, size in zip(node.args, ranges, tensor.shape, strict=True):
            low, high = range_.low.min(), range_.high.max()
            if known and (low < -size or high >= size):
                low, high = _exact_range(call, index)
                if low <= high and (low < -size or high >= size):
                    raise IndexError(
                        f"fastattn.{call.op}: an index of a captured tensor of shape {tuple(tensor.shape)} is out of range: "
                        f"from {low} to {high} where the size is {size}. Indices of masked scores count too: clamp them"
                    )
            flags.append(bool(low >= 0))
        from_start[load] = tuple(flags)
    return from_start


def _exact_range(call: Traced, index: int) -> tuple[int, int]:
    """The least and the largest value of an integer node over all scores."""
    graph, sizes = call.graph, call.sizes
    uses = graph.nodes[index].uses
    counts = {"b": sizes.batch, "h": sizes.heads, "q": sizes.queries, "k": sizes.keys}
    if 0 in counts.values():
        return 0, -1
    grids = []
    if uses & Q and uses & K and of_distance(graph, index):
        # each distance of a query from a key, once
        grids += [{"q": torch.arange(sizes.queries)[:, None], "k": torch.zeros(1, 1, dtype=torch.int64)}]
        grids += [{"q": torch.zeros(1, 1, dtype=torch.int64), "k": torch.arange(sizes.keys)[None]}]
    else:
        rows = sizes.queries if uses & Q else 1
        keys = torch.arange(sizes.keys if uses & K else 1)[None]
        step = max(1, _MOST_CHECKED // keys.numel())
        for first in range(0, rows, step):
            grids.append({"q": torch.arange(first, min(first + step, rows))[:, None], "k": keys})
    low, high = INT_MAX, INT_MIN
    for b in range(sizes.batch if uses & B else 1):
        for h in range(sizes.heads if uses & H else 1):
            for grid in grids:
                try:
                    (value,) = evaluate(
                        graph,
                        [index],
                        {"b": torch.tensor(b), "h": torch.tensor(h), "s": torch.zeros(()), **grid},
                    )
                except IndexError as error:
                    raise IndexError(f"fastattn.{call.op}: a captured tensor's {error}") from error
                low, high = min(low, int(value.min())), max(high, int(value.max()))
    return low, high


def of_distance(graph: Graph, out: int) -> bool:
    """Whether a node sees q and k only as q - k or k - q."""
    q, k = graph.input("q"), graph.input("k")
    for place in graph.reach([out]):
        node = graph.nodes[place]
        if (q in node.args or k in node.args) and not (node.op == "sub" and set(node.args) == {q, k}):
            return False
    return True


# --- captured tensors ------------------------------------------------------------------------------------------------


def tables(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, ...]]:
    """(floats, integers as int32 with booleans as 0 and -1, where each tensor begins in its own): captured tensors, one after another."""
    floats: list[torch.Tensor] = []
    integers: list[torch.Tensor] = []
    counts, offsets = {True: 0, False: 0}, []
    for t in tensors:
        kind = t.is_floating_point()
        offsets.append(counts[kind])
        counts[kind] += t.numel()
        if kind:
            floats.append(t.reshape(-1).to(device, dtype))
        else:
            whole = t.detach().reshape(-1).to(device, torch.int32)
            integers.append(-whole if t.dtype == torch.bool else whole)
    if max(counts.values()) > _MOST_ELEMENTS:
        raise NotImplementedError(
            f"fastattn.flex_attention: captured tensors of more than {_MOST_ELEMENTS} elements"
        )

    def joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)

    return joined(floats), joined(integers), tuple(offsets)


# --- the program -----------------------------------------------------------------------------------------------------


def program(
    call: Traced, offsets: tuple[int, ...], from_start: Mapping[int, tuple[bool, ...]], gradients: bool
) -> torch.Tensor:
    """The words of a call's program, int64."""
    graph = call.graph
    wanted = tuple(
        n
        for n in graph.where(lambda node: node.op == "load" and node.type == "f", [call.score])
        if gradients and graph.tensors[graph.nodes[n].value].requires_grad
    )
    key = (
        graph.key(),
        tuple(tuple(t.shape) for t in graph.tensors),
        call.score,
        call.mask,
        offsets,
        tuple(from_start.items()),
        wanted,
        gradients,
    )
    found = _programs.get(key)
    if found is not None:
        return found
    assembly = Assembly(offsets, dict(from_start), wanted)
    scores = [call.score]
    if call.mask is not None:
        scores.append(graph.make("select", call.mask, call.score, graph.constant(float("-inf"))))
    words: list[int] = [0] * SECTIONS
    for i, score in enumerate(scores):
        words[i] = len(words)
        words += section(graph, assembly, score, None, {})
    for i, score in enumerate(scores if gradients else ()):
        slope, derivatives = derive(graph, score, wanted)
        words[2 + i] = len(words)
        words += section(graph, assembly, score, slope, derivatives)
    result = torch.tensor(words, dtype=torch.int64)
    _programs[key] = result
    if len(_programs) > _MOST_PROGRAMS:
        _programs.popitem(last=False)
    return result


# --- tiles -----------------------------------------------------------------------------------------------------------


def classes(call: Traced, device: torch.device) -> torch.Tensor | None:
    """uint8 (B or 1, H or 1, tiles of queries, tiles of keys): which tiles of TILE rows and keys a mask leaves empty, full or mixed."""
    if call.mask is None:
        return None
    uses = call.graph.nodes[call.mask].uses
    boxes = call.sizes.tiles(uses)
    (found,) = intervals(call.graph, [call.mask], boxes)
    shape = np.broadcast_shapes(*(boxes[n].low.shape for n in "bhqk"))
    kind = np.where(found.high == 0, EMPTY, np.where(found.low == 1, FULL, MIXED)).astype(np.uint8)
    return torch.from_numpy(np.broadcast_to(kind, shape).copy()).to(device)
