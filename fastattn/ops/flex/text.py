"""A program to read: what `fastattn.explain` prints of a call of flex_attention."""

from collections.abc import Iterator
from typing import Any

import torch

from ...masks import MaskArgs
from .prepare import EMPTY, FULL, MIXED, TILE
from .program import BY_KEY, INPUTS_OF_ROW, OPS, Section, arity, base, sections

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "floordiv": "//",
    "mod": "%",
}
_INFIX |= {"and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}


def describe(*members: Any) -> str:
    """Its mask, its tiles and its instructions, those of a row of scores apart from those of a score."""
    *_, program, classes, _, mask = members
    full, mixed, gradients, _ = sections(program)
    lines = _mask(mask)
    if classes is not None:
        counts = torch.bincount(classes.flatten().long(), minlength=3).tolist()
        names = ((FULL, "full"), (MIXED, "mixed"), (EMPTY, "empty"))
        lines.append(
            f"tiles of {TILE} x {TILE}: " + ", ".join(f"{counts[kind]} {name}" for kind, name in names)
        )
    for what, section in (
        ("score", full),
        ("score in mixed tiles", mixed),
        ("score and its derivatives", gradients),
    ):
        if section is not None:
            lines += _section(what, section)
    return "\n".join(lines)


def describe_weights(*members: Any) -> str:
    """`describe` of weights that are a program's."""
    *_, program, normalised, _, mask = members
    full, _, gradients, _ = sections(program)
    lines = _mask(mask)
    lines.append("weights: divided by their row sum" if normalised else "weights: as they are, undivided")
    for what, section in (("weight", full), ("weight and its derivatives", gradients)):
        if section is not None:
            lines += _section(what, section)
    return "\n".join(lines)


def _mask(mask: MaskArgs) -> list[str]:
    kinds = (
        ("causal", mask.causal),
        ("window", max(mask.window_left, mask.window_right) >= 0),
        ("documents", mask.cu_seqlens_q is not None),
        ("block lists", mask.list_offsets is not None),
    )
    said = [name for name, on in kinds if on]
    return [f"mask: {' and '.join(said)}, as ranges of keys"] if said else []


def _section(what: str, section: Section) -> Iterator[str]:
    of_score = sum(result >= section.scalars for _, result, *_ in section.instructions)
    of_row = len(section.instructions) - of_score
    yield f"{what}: {of_score} operations each, {of_row} a row, {section.vectors} registers"
    for code, result, *operands in section.instructions:
        name = OPS[code]
        args = [_register(section, r) for r in operands[: arity(name)]]
        yield f"  {'each' if result >= section.scalars else 'row '}  {_register(section, result)} = {_expression(name, args)}"
    results = [("score", section.score)] + ([] if section.slope == -1 else [("slope", section.slope)])
    for index, derivative in section.loads:
        element = _register(section, index & ~BY_KEY) + (" + k" if index & BY_KEY else "")
        results.append((f"derivative in tables[{element}]", derivative))
    for of, register in results:
        yield f"  {of}: {_register(section, register)}"


def _expression(name: str, args: list[str]) -> str:
    op = base(name)
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in ("load", "load_row"):
        table = "tables" if name.endswith("f") else "indices"
        return f"{table}[{args[0]}{' + k' if op == 'load_row' else ''}]"
    return f"{op}({', '.join(args)})"


def _register(section: Section, register: int) -> str:
    constants = (*section.floats, *section.integers)
    if register < INPUTS_OF_ROW:
        return "bhq"[register]
    if register < INPUTS_OF_ROW + len(constants):
        return f"{constants[register - INPUTS_OF_ROW]:g}"
    if register < section.scalars:
        return f"r{register - INPUTS_OF_ROW - len(constants)}"
    number = register - section.scalars
    return "sk"[number] if number < 2 else f"x{number - 2}"
