"""An instruction with its response, and files of them: one JSON object a line. `examples.py` reads them, and other files."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

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


def write_jsonl(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Writes one object a line, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"instruction": example.instruction, "response": example.response}
            if example.condition:
                row["condition"] = list(example.condition)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
