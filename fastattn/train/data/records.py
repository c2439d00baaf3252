"""Rows of data files as people have them: JSONL, a JSON array, CSV, TSV or parquet, plain or compressed."""

import contextlib
import csv
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastattn.runtime import files

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of a file. Its name says what it is: .json, .csv, .tsv or .parquet, anything else JSONL; .gz or
    .zst after it, that it is compressed.

    Raises FileNotFoundError; ValueError that names the file and the line or row; ModuleNotFoundError for what parquet and zst
    need (extra `[data]`).
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a file is needed")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    kind = suffixes[-1] if suffixes else ""
    with path.open("rb") as file:
        try:
            yield from _rows(path, kind, _unpacked(path, file, packed))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not whole or not gzip: {error}") from None


def _rows(path: Path, kind: str, file: BinaryIO) -> Iterator[tuple[dict[str, Any], str]]:
    if kind == ".parquet":
        yield from _parquet_rows(path, file)
    elif kind in (".csv", ".tsv"):
        yield from _table_rows(path, file, "\t" if kind == ".tsv" else ",")
    elif kind == ".json":
        yield from _json_rows(path, file.read())
    else:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _text(line, where, first=number == 1)
            if text.strip():
                yield _object(_parsed(text, where), where), where


def _unpacked(path: Path, file: BinaryIO, packed: str) -> BinaryIO:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=file)
    if packed == ".zst":
        _needs(path, "zstandard")
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
    return file


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[dict[str, Any], str]]:
    text = _text(content, str(path), first=True)
    if text.lstrip()[:1] == "[":
        for number, row in enumerate(_parsed(text, str(path))):
            yield _object(row, f"{path}[{number}]"), f"{path}[{number}]"
        return
    with contextlib.suppress(ValueError):  # one object over several lines
        yield _object(files.parse_json(text), str(path)), str(path)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}"


def _table_rows(path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[dict[str, Any], str]]:
    csv.field_size_limit(1 << 30)  # answers may be long
    text = io.StringIO(_text(file.read(), str(path), first=True), newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row.get(None):
                raise ValueError(f"{where}: has more cells than the first line has names")
            yield row, where
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[dict[str, Any], str]]:
    _needs(path, "pyarrow")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file)).iter_batches():
            for row in batch.to_pylist():
                yield row, f"{path}[{number}]"
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not parquet: {error}") from None


def _needs(path: Path, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{path}: {module} is not installed: pip install {module}, or the extra [data]"
        )


def _text(content: bytes, where: str, first: bool) -> str:
    if first and content.startswith(_UTF16):
        raise ValueError(f"{where}: is UTF-16; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return files.parse_json(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {json_type(row)}; an object is needed")
    return row


def json_type(value: object) -> str:
    """What JSON calls a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
