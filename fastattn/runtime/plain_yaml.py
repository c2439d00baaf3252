"""The subset of YAML in which programs write their options: nested mappings and lists of plain values, in block style."""

import ast
import re
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_CONSTANTS = {"null": None, "~": None, "": None, "true": True, "false": False}


def parse(text: str) -> Any:
    """The value in `text`. Raises ValueError naming the line for all other YAML, such as anchors, flow style and block scalars."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and stripped != "---":
            lines.append((number, len(line) - len(line.lstrip(" ")), stripped))
    if not lines:
        return None
    value, end = _block(lines, 0, lines[0][1])
    if end != len(lines):
        raise ValueError(f"line {lines[end][0]}: its indentation does not fit the lines before it")
    return value


def _block(lines: list[tuple[int, int, str]], start: int, indent: int) -> tuple[Any, int]:
    """(the mapping or list that begins at lines[start], the index after it)."""
    is_list = lines[start][2].startswith("- ") or lines[start][2] == "-"
    result: Any = [] if is_list else {}
    while start < len(lines):
        number, depth, line = lines[start]
        if depth != indent or (line.startswith("- ") or line == "-") != is_list:
            break
        if is_list:
            remainder = line[1:].strip()
            if re.match(r"[\w.]+:(\s|$)", remainder):  # a mapping that begins beside the dash
                inner = indent + len(line) - len(remainder)
                lines[start] = (number, inner, remainder)
                value, start = _block(lines, start, inner)
                result.append(value)
                continue
            key = None
        else:
            key, colon, remainder = line.partition(":")
            if not colon or (remainder and not remainder.startswith(" ")):
                raise ValueError(f"line {number}: {line!r} is not `key: value`")
            key, remainder = _scalar(key, number), remainder.strip()
        start += 1
        nested = start < len(lines) and (
            lines[start][1] > indent
            or (not is_list and lines[start][1] == indent and lines[start][2][0] == "-")
        )
        if not remainder and nested:
            value, start = _block(lines, start, lines[start][1])
        else:
            value = _scalar(remainder, number)
        if is_list:
            result.append(value)
        else:
            result[key] = value
    return result, start


def _scalar(text: str, number: int) -> Any:
    if text[:1] in ("'", '"'):
        try:
            if text[0] == "'" and text.endswith("'") and len(text) > 1:
                return text[1:-1].replace("''", "'")
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"line {number}: {text!r} is not a quoted string") from None
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if text in ("[]", "{}"):
        return [] if text == "[]" else {}
    if _NUMBER.fullmatch(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    if text[0] in "[{&*!|>%@`":
        raise ValueError(f"line {number}: {text!r} is not supported; only plain values in block style are")
    return text.partition(" #")[0].strip()
