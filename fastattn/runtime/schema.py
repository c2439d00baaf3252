"""torch's schema of an op, from the types of its `Call`."""

import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import torch


@dataclass(frozen=True)
class Written:
    """`Annotated[torch.Tensor, Written("a")]`: a tensor that the op writes to. Each has its own letter in the schema."""

    letter: str


class _Symbolic:
    """An integer that is symbolic in a compiled graph, not a constant."""


Size = Annotated[int, _Symbolic]

_NAMES = {
    torch.Tensor: "Tensor",
    list[torch.Tensor]: "Tensor[]",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}


def is_group(kind: Any) -> bool:
    """Whether a member is a NamedTuple, which is flattened in the schema."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def type_of(kind: Any) -> str:
    """A member's type in a schema."""
    if typing.get_origin(kind) is Annotated:
        mark = kind.__metadata__[0]
        return f"Tensor({mark.letter}!)" if isinstance(mark, Written) else "SymInt"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind, _ = typing.get_args(kind)
        return _NAMES[kind] + "?"
    return _NAMES[kind]


def flat_fields(fields: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, kind in fields.items():
        flat.update(typing.get_type_hints(kind, include_extras=True) if is_group(kind) else {name: kind})
    return flat


def schema_of(fields: dict[str, Any], outputs: int) -> str:
    arguments = ", ".join(f"{type_of(kind)} {name}" for name, kind in flat_fields(fields).items())
    result = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return f"({arguments}, str backend) -> {result}"
