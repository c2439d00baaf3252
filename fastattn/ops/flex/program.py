"""From a graph to a program: the words that the kernels run, with captured tensors as flat tables.

A program is an int64 tensor of four sections, one after another, their offsets first (0: none): the score, the score where a mask
counts, and both with their derivatives. A section is

    instructions, scalars, vectors, score, slope (-1: none), loads, float constants, integer constants
    the constants: floats as bits of float64, integers
    for each load whose gradient is wanted: the register of its index (+ BY_KEY: that scalar plus k), of its derivative
    for each instruction: op, result, three operands (-1: none)

Registers from 0 on are scalars, one value for a row of scores: b, h, q, the constants, then what depends on no key. Registers from
`scalars` on are vectors, one value a key: s, k, then the rest.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ...runtime import native
from .graph import Graph, K, Node, Q, S
from .tracing import Refused

OPS: tuple[str, ...] = native.score_ops
CODES = {name: code for code, name in enumerate(OPS)}
BY_KEY = 1 << 16
HEADER, SECTIONS = 8, 4
INPUTS_OF_ROW, INPUTS_OF_KEY = 3, 2  # registers that are set on entry: b, h, q; s, k

_PLAIN = {"select", "i2f", "f2i", "b2i"}


@dataclass(frozen=True)
class Section:
    """A program's section, read."""

    scalars: int
    vectors: int
    score: int
    slope: int
    floats: tuple[float, ...]
    integers: tuple[int, ...]
    loads: tuple[tuple[int, int], ...]
    instructions: tuple[tuple[int, ...], ...]  # op, result, three operands


# --- lowering --------------------------------------------------------------------------------------------------------


def _is(graph: Graph, place: int, on: int) -> bool:
    return graph.depends(place, on)


def _without_key(graph: Graph, place: int) -> int | None:
    """The node x, free of k, of a node that is x + k; None where it is no such sum."""
    node = graph.nodes[place]
    if node.op == "input" and node.value == "k":
        return graph.constant(0)
    if node.op == "add":
        for x, y in (node.args, node.args[::-1]):
            if not _is(graph, y, K):
                rest = _without_key(graph, x)
                return None if rest is None else graph.make("add", rest, y)
    if node.op == "sub" and not _is(graph, node.args[1], K):
        rest = _without_key(graph, node.args[0])
        return None if rest is None else graph.make("sub", rest, node.args[1])
    return None


class _Index(NamedTuple):
    place: int  # of the flat index, or of what k is added to
    by_key: bool


def _flat_index(
    graph: Graph, node: Node, offset: int, size: Sequence[int], from_start: Sequence[bool]
) -> _Index:
    """The index into a table of a load; an index from the end is counted from the start."""
    total, step = graph.constant(offset), 1
    by_key = False
    for position in reversed(range(len(size))):
        index = node.args[position]
        if not from_start[position]:
            negative = graph.make("lt", index, graph.constant(0))
            index = graph.make(
                "select", negative, graph.make("add", index, graph.constant(size[position])), index
            )
        elif position == len(size) - 1:
            rest = _without_key(graph, index)
            others = any(_is(graph, a, K) for a in node.args[:-1])
            if rest is not None and not others:
                index, by_key = rest, True
        total = graph.make("add", total, graph.make("mul", index, graph.constant(step)))
        step *= size[position]
    return _Index(total, by_key)


@dataclass
class Assembly:
    """What `assemble` needs to know of captured tensors and of the calls that a program is for."""

    offsets: tuple[int, ...]  # of each tensor of the graph in its table
    from_start: dict[int, tuple[bool, ...]]  # of each load, whether each index is at least 0
    wanted: tuple[int, ...]  # loads with a gradient


def section(
    graph: Graph, assembly: Assembly, score: int, slope: int | None, derivatives: dict[int, int]
) -> list[int]:
    """The words of one section."""
    wanted = [score, *([] if slope is None else [slope]), *derivatives.values()]
    order = graph.reach(wanted)
    indices: dict[int, _Index] = {}
    for place in order:
        node = graph.nodes[place]
        if node.op == "load":
            tensor = graph.tensors[node.value]
            offset = assembly.offsets[node.value]
            indices[place] = _flat_index(graph, node, offset, tensor.shape, assembly.from_start[place])
    for place in derivatives:
        if place not in indices:  # a derivative of 1 does not read the element
            node = graph.nodes[place]
            tensor, offset = graph.tensors[node.value], assembly.offsets[node.value]
            indices[place] = _flat_index(graph, node, offset, tensor.shape, assembly.from_start[place])
    return _Allocation(graph, indices, score, slope, derivatives).words()


class _Allocation:
    """Registers by last use, and the words."""

    def __init__(
        self,
        graph: Graph,
        indices: dict[int, _Index],
        score: int,
        slope: int | None,
        derivatives: dict[int, int],
    ) -> None:
        self.graph, self.indices = graph, indices
        self.score, self.slope, self.derivatives = score, slope, derivatives
        self.outs = [score, *([] if slope is None else [slope]), *derivatives.values()]
        self.outs += [indices[n].place for n in derivatives]
        self.order: list[int] = []
        self._visit(self.outs)
        self.constants = [n for n in self.order if graph.nodes[n].op == "constant"]
        self.constants.sort(key=lambda n: graph.nodes[n].type != "f")  # floats first
        self.register: dict[int, tuple[bool, int]] = {}  # (is a vector, number)

    def _visit(self, outs: Sequence[int]) -> None:
        """Nodes that are computed, each after its operands; a load reads its flat index alone."""
        seen: set[int] = set()
        stack = [(n, False) for n in reversed(outs)]
        while stack:
            place, done = stack.pop()
            if done:
                self.order.append(place)
                continue
            if place in seen:
                continue
            seen.add(place)
            stack.append((place, True))
            stack += [(a, False) for a in reversed(self._operands(place))]

    def _operands(self, place: int) -> tuple[int, ...]:
        return (self.indices[place].place,) if place in self.indices else self.graph.nodes[place].args

    def words(self) -> list[int]:
        graph, register = self.graph, self.register
        for name, number in (("b", 0), ("h", 1), ("q", 2)):
            register[graph.input(name)] = False, number
        for name, number in (("s", 0), ("k", 1)):
            register[graph.input(name)] = True, number
        for i, n in enumerate(self.constants):
            register[n] = False, INPUTS_OF_ROW + i
        computed = [n for n in self.order if n not in register]
        last = {a: i for i, n in enumerate(computed) for a in self._operands(n)}
        last |= dict.fromkeys(self.outs, len(computed))
        fixed = set(register)
        # what is the same in every row is computed once for many rows, so its registers are not those of what differs
        free: dict[tuple[bool, bool], list[int]] = {(x, y): [] for x in (False, True) for y in (False, True)}
        used = {False: INPUTS_OF_ROW + len(self.constants), True: INPUTS_OF_KEY}
        for i, n in enumerate(computed):
            for a in set(self._operands(n)):
                if last[a] == i and a not in fixed:
                    kind, number = register[a]
                    free[kind, _is(graph, a, S | Q)].append(number)
            kind = _is(graph, n, S | K)
            reusable = free[kind, _is(graph, n, S | Q)]
            if reusable:
                register[n] = kind, reusable.pop()
            else:
                register[n] = kind, used[kind]
                used[kind] += 1
        limits = native.limits
        for what, count, most in (
            ("instructions", len(computed), limits.program_instructions),
            ("values at a time", used[True], limits.program_vectors),
            ("constants and values of a row", used[False], limits.program_scalars),
            ("elements that have gradients", len(self.derivatives), limits.program_loads),
        ):
            if count > most:
                raise Refused(f"a function of {count} {what}; the kernels take {most}")
        self.scalars = used[False]
        floats = [n for n in self.constants if graph.nodes[n].type == "f"]
        words = [len(computed), used[False], used[True], self._number(self.score)]
        words += [-1 if self.slope is None else self._number(self.slope), len(self.derivatives)]
        words += [len(floats), len(self.constants) - len(floats)]
        words += [_word(graph.nodes[n]) for n in self.constants]
        for n, derivative in self.derivatives.items():
            index = self.indices[n]
            words += [self._number(index.place) + BY_KEY * index.by_key, self._number(derivative)]
        for n in computed:
            operands = [self._number(a) for a in self._operands(n)]
            words += [CODES[self._name(n)], self._number(n), *operands, *[-1] * (3 - len(operands))]
        return words

    def _number(self, place: int) -> int:
        is_vector, number = self.register[place]
        return number + self.scalars * is_vector

    def _name(self, place: int) -> str:
        node = self.graph.nodes[place]
        if node.op == "load":
            kind = "f" if node.type == "f" else "i"
            return f"load_row_{kind}" if self.indices[place].by_key else f"load_{kind}"
        if node.op in _PLAIN:
            return node.op
        kind = self.graph.nodes[node.args[0]].type
        return f"{node.op}_{'f' if kind == 'f' else 'i'}"


def _word(constant: Node) -> int:
    if constant.type == "f":
        return struct.unpack("<q", struct.pack("<d", constant.value))[0]
    return -int(constant.value) if constant.type == "b" else int(constant.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def read(contents: bytes) -> tuple[Section | None, ...]:
    """The sections of a program from its bytes. ValueError for words that are no program."""
    words = struct.unpack(f"<{len(contents) // 8}q", contents)
    if len(words) < SECTIONS:
        raise ValueError(f"a program has {SECTIONS} offsets first, given {len(words)} words")
    return tuple(_section(words, offset) if offset else None for offset in words[:SECTIONS])


def sections(program: torch.Tensor) -> tuple[Section | None, ...]:
    """The sections of a program that has contents."""
    return read(program.detach().contiguous().numpy().tobytes())


def _section(words: tuple[int, ...], offset: int) -> Section:
    def take(count: int) -> tuple[int, ...]:
        nonlocal offset
        if not (offset >= SECTIONS and count >= 0 and offset + count <= len(words)):
            raise ValueError(f"a section of a program ends past its {len(words)} words")
        offset += count
        return words[offset - count : offset]

    instructions, scalars, vectors, score, slope, loads, floats, integers = take(HEADER)
    of_floats = struct.unpack(f"<{floats}d", struct.pack(f"<{floats}q", *take(floats)))
    of_integers = take(integers)
    pairs, codes = take(2 * loads), take(5 * instructions)
    result = Section(
        scalars,
        vectors,
        score,
        slope,
        of_floats,
        of_integers,
        tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        tuple(tuple(codes[i : i + 5]) for i in range(0, len(codes), 5)),
    )
    _verify(result)
    return result


_UNARY = {
    "neg",
    "abs",
    "sqrt",
    "exp",
    "log",
    "log1p",
    "expm1",
    "tanh",
    "sigmoid",
    "erf",
    "sin",
    "cos",
    "floor",
    "sign",
    "not",
}
_UNARY |= {"i2f", "f2i", "b2i", "load", "load_row"}


def base(name: str) -> str:
    """The op of a graph that an op of programs is."""
    return name[:-2] if name.endswith(("_f", "_i")) else name


def arity(name: str) -> int:
    return 3 if name == "select" else 1 if base(name) in _UNARY else 2


def _verify(section: Section) -> None:
    """Every register exists and is written before it is read, or ValueError."""
    limits = native.limits
    fixed = INPUTS_OF_ROW + len(section.floats) + len(section.integers)
    if not (
        fixed <= section.scalars <= limits.program_scalars
        and INPUTS_OF_KEY <= section.vectors <= limits.program_vectors
    ):
        raise ValueError(f"a program of {section.scalars} scalars and {section.vectors} vectors")
    if len(section.instructions) > limits.program_instructions:
        raise ValueError(f"a program of {len(section.instructions)} instructions")
    if any(not -(2**31) <= x < 2**31 for x in section.integers):
        raise ValueError("an integer of a program that does not fit 32 bits")
    written = set(range(fixed)) | set(range(section.scalars, section.scalars + INPUTS_OF_KEY))
    registers = section.scalars + section.vectors

    def check(register: int) -> None:
        if register not in written:
            raise ValueError(f"a program reads register {register} of {registers} before it is written")

    for code, result, *operands in section.instructions:
        if not 0 <= code < len(OPS):
            raise ValueError(f"a program has the op {code}; there are {len(OPS)}")
        count = arity(OPS[code])
        for register in operands[:count]:
            check(register)
        if any(register != -1 for register in operands[count:]):
            raise ValueError(f"a program gives {OPS[code]} more operands than {count}")
        if not fixed <= result < registers:
            raise ValueError(f"a program writes register {result} of {registers}")
        of_key = any(r >= section.scalars for r in operands[:count]) or "load_row" in OPS[code]
        if of_key and result < section.scalars:
            raise ValueError("a program writes a scalar from a vector")
        if "load_row" in OPS[code] and operands[0] >= section.scalars:
            raise ValueError("a program adds keys to a vector of indices")
        written.add(result)
    check(section.score)
    if len(section.loads) > limits.program_loads:
        raise ValueError(f"a program of {len(section.loads)} loads with gradients")
    if section.slope != -1:
        check(section.slope)
    for index, derivative in section.loads:
        check(index & ~BY_KEY)
        check(derivative)
        if index & BY_KEY and index & ~BY_KEY >= section.scalars:
            raise ValueError("a program adds keys to a vector of indices")
