"""Instruction-response files: one JSON object a line, with the fields `instruction` and `response`, and if need be `input`
and `condition`."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastattn.runtime import files


@dataclass(frozen=True)
class Example:
    """One instruction and the response a model should give.

    condition: HRM-Text's tags, each a special token that comes before the instruction (see Tokenizer). where: the file
    and line it was read from.
    """

    instruction: str
    response: str
    condition: tuple[str, ...] = ()
    where: str = field(default="", compare=False)


def read_jsonl(path: str | os.PathLike) -> list[Example]:
    """Reads every line of `path`. `condition` is a tag or a list of tags. `input` follows the instruction after an empty
    line. What other fields hold is left alone; all of these may be null or empty.

    Raises FileNotFoundError, or ValueError naming the file and the line: not UTF-8, not JSON, not an object,
    a field that is missing, not text, or blank. Blank lines are skipped; a file with no example is an error.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a JSONL file is needed")
    examples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                examples.append(_parse(line, f"{path}:{number}"))
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples


def write_jsonl(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Writes one object a line, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"instruction": example.instruction, "response": example.response}
            if example.condition:
                row["condition"] = list(example.condition)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parse(line: bytes, where: str) -> Example:
    try:
        row = files.parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {_json_type(row)}; an object is needed")
    for name in ("instruction", "response"):
        if name not in row:
            raise ValueError(f"{where}: field '{name}' is missing; the line has {sorted(row)}")
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: field '{name}' holds a JSON {_json_type(row[name])}; text is needed")
        if not row[name].strip():
            raise ValueError(f"{where}: field '{name}' is empty")
    instruction, extra = row["instruction"], row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"{where}: field 'input' holds a JSON {_json_type(extra)}; text is needed")
    if extra and extra.strip():
        instruction = f"{instruction}\n\n{extra}"
    tags = row.get("condition")
    tags = [] if tags is None or tags == "" else [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise ValueError(f"{where}: field 'condition' must be a tag or a list of tags, as text")
    for name, text in (
        ("instruction", instruction),
        ("response", row["response"]),
        ("condition", "".join(tags)),
    ):
        if not files.is_unicode(text):
            raise ValueError(f"{where}: field '{name}' holds half of a surrogate pair")
    return Example(instruction, row["response"], tuple(tag.strip() for tag in tags), where)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
