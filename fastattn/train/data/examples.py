"""Instructions and responses out of rows with the usual fields."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.runtime import files
from fastattn.train.data.jsonl import Example
from fastattn.train.data.records import json_type, read_records

# (instruction, response), the first pair whose names a row has
_PAIRS = (
    ("instruction", "response"),
    ("instruction", "output"),  # Alpaca
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
_TURNS = (("messages", "role", "content"), ("conversations", "from", "value"))  # OpenAI, ShareGPT
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass
class Read:
    """What a file held: its examples, how many rows had which fields, and how many responses were empty."""

    examples: list[Example] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    empty: int = 0

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} with {name}" for name, count in self.fields.most_common())
        left = f"; {self.empty:,} without a response were left out" if self.empty else ""
        return f"{len(self.examples):,} examples ({rows}){left}"


def read_examples(path: str | os.PathLike) -> Read:
    """Every example of a file (see `read_records` for what it may be).

    A row has `instruction` and `response`; `instruction` and `output` (Alpaca); `prompt` and `completion` or `response`;
    `question` and `answer`; `messages` (OpenAI: role, content) or `conversations` (ShareGPT: from, value). `input` follows the
    instruction after an empty line. `condition` is a tag, some with commas between them, or a list of tags. Of a conversation each of the assistant's turns is an
    example: what came before it, turns apart by an empty line, is its instruction. Other fields are left alone.

    A row whose response is empty is left out and counted. Raises ValueError naming file and row: no such fields, not text, an
    empty instruction; a file with no example.
    """
    path, read = Path(path), Read()
    for row, where in read_records(path):
        for example in _examples(row, where, read):
            if example.response.strip():
                read.examples.append(example)
            else:
                read.empty += 1
    if not read.examples:
        raise ValueError(
            f"{path}: holds no example{f' with a response, in {read.empty:,} rows' if read.empty else ''}"
        )
    return read


def _examples(row: dict[str, Any], where: str, read: Read) -> Iterator[Example]:
    tags = _tags(row.get("condition"), where)
    for name, role, text in _TURNS:
        if name in row:
            read.fields[name] += 1
            yield from _of_turns(row[name], name, role, text, tags, where)
            return
    pair = next((pair for pair in _PAIRS if all(name in row for name in pair)), None)
    if pair is None:
        missing = next((other for first, other in _PAIRS if first in row), "")
        what = f"field '{missing}' is missing" if missing else "no instruction and response"
        raise ValueError(
            f"{where}: {what}; the row has {sorted(map(str, row))}, expected instruction and response (or output), prompt and "
            "completion, question and answer, messages, or conversations"
        )
    read.fields[" and ".join(pair)] += 1
    instruction, response = (_text(row[name], name, where) for name in pair)
    if not instruction.strip():
        raise ValueError(f"{where}: field {pair[0]!r} is empty")
    extra = _text(row.get("input"), "input", where)
    if extra.strip():
        instruction = f"{instruction}\n\n{extra}"
    yield Example(instruction, response, tags, where)


def _of_turns(
    turns: Any, name: str, role: str, text: str, tags: tuple[str, ...], where: str
) -> Iterator[Example]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"{where}: field {name!r} holds a JSON {json_type(turns)}; a list of objects is needed"
        )
    before: list[str] = []
    for number, turn in enumerate(turns):
        at = f"{name}[{number}]"
        who = _ROLES.get(turn.get(role))
        if who is None:
            raise ValueError(f"{where}: {at} has {role} {turn.get(role)!r}; allowed are {', '.join(_ROLES)}")
        said = _text(turn.get(text), f"{at}.{text}", where)
        if who == "assistant":
            if not "".join(before).strip():
                raise ValueError(f"{where}: {at} answers nothing; a user's turn must come before it")
            yield Example("\n\n".join(before), said, tags, where)
        before.append(said)


def _text(value: Any, name: str, where: str) -> str:
    """The text of a field; "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} holds a JSON {json_type(value)}; text is needed")
    if not files.is_unicode(value):
        raise ValueError(f"{where}: field {name!r} holds half of a surrogate pair")
    return value


def _tags(tags: Any, where: str) -> tuple[str, ...]:
    tags = [] if tags is None or tags == "" else tags.split(",") if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise ValueError(f"{where}: field 'condition' must be a tag or a list of tags, as text")
    return tuple(_text(tag, "condition", where).strip() for tag in tags)
