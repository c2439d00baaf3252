"""Instruction-response files: one JSON object a line, with the fields `instruction` and `response`."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastattn.runtime import files


class Example(NamedTuple):
    """One instruction and the response a model should give."""

    instruction: str
    response: str


def read_jsonl(path: str | os.PathLike) -> list[Example]:
    """Reads every line of `path`; fields beside `instruction` and `response` are left alone.

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
            file.write(json.dumps(example._asdict(), ensure_ascii=False) + "\n")


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
    for field in Example._fields:
        if field not in row:
            raise ValueError(f"{where}: field '{field}' is missing; the line has {sorted(row)}")
        if not isinstance(row[field], str):
            raise ValueError(
                f"{where}: field '{field}' holds a JSON {_json_type(row[field])}; text is needed"
            )
        if not row[field].strip():
            raise ValueError(f"{where}: field '{field}' is empty")
        if not files.is_unicode(row[field]):
            raise ValueError(f"{where}: field '{field}' holds half of a surrogate pair")
    return Example(row["instruction"], row["response"])


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
