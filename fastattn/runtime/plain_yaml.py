"""The YAML that a program writes of its options: nested mappings and lists of plain values, in block style."""

import ast
import re
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_CONSTANTS = {"null": None, "~": None, "": None, "true": True, "false": False}


def parse(text: str) -> Any:
    """What the text holds. ValueError naming a line with anything else: anchors, flow style, blocks of text."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare and not bare.startswith("#") and bare != "---":
            lines.append((number, len(line) - len(line.lstrip(" ")), bare))
    if not lines:
        return None
    value, end = _block(lines, 0, lines[0][1])
    if end != len(lines):
        raise ValueError(f"line {lines[end][0]}: indented otherwise than what is before it")
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
            rest = line[1:].strip()
            if re.match(r"[\w.]+:(\s|$)", rest):  # a mapping that begins beside the dash
                inner = indent + len(line) - len(rest)
                lines[start] = (number, inner, rest)
                value, start = _block(lines, start, inner)
                result.append(value)
                continue
            key = None
        else:
            key, colon, rest = line.partition(":")
            if not colon or (rest and not rest.startswith(" ")):
                raise ValueError(f"line {number}: {line!r} is no `key: value`")
            key, rest = _scalar(key, number), rest.strip()
        start += 1
        nested = start < len(lines) and (
            lines[start][1] > indent
            or (not is_list and lines[start][1] == indent and lines[start][2][0] == "-")
        )
        if not rest and nested:
            value, start = _block(lines, start, lines[start][1])
        else:
            value = _scalar(rest, number)
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
            raise ValueError(f"line {number}: {text!r} is no text in quotes") from None
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if text in ("[]", "{}"):
        return [] if text == "[]" else {}
    if _NUMBER.fullmatch(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    if text[0] in "[{&*!|>%@`":
        raise ValueError(f"line {number}: {text!r} is not served; only plain values in block style are")
    return text.partition(" #")[0].strip()
