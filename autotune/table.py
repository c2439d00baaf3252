"""Writing tables: merged under a lock, whole to a temporary file, then renamed. Readers take no lock."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastattn.runtime import device, files, tables, tuning

LOCK_SECONDS = 30.0

_PLAIN = device.Target("", "", "").describe()  # the type of each field

Entry = dict[str, Any]  # key, sizes, config, time_us, default_us, ratio, spread, trials, shapes


def user_path(target: device.Target) -> Path:
    """This user's table for a device."""
    return tables.cache_dir() / "tables" / f"{target.slug}.json"


def tuned_with() -> dict[str, str]:
    """Versions of what a table's times depend on."""
    import torch

    versions = {"torch": torch.__version__}
    for name in ("fastattn", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.version.hip:
        versions["hip"] = torch.version.hip
    return versions


def merge(path: Path, target: device.Target, entries: Mapping[tuple[str, str], Iterable[Entry]]) -> dict:
    """Add entries, {(op, backend): [...]}, to a table, in place of those with their key and sizes; the whole.

    Raises TimeoutError where another process holds the table for longer than LOCK_SECONDS.
    """
    with _locked(path):
        table = _read_or_set_aside(path, target)
        if table is None:
            table = {"schema": tables.SCHEMA, "device": target.describe(), "ops": {}}
        table["tuned_with"] = tuned_with()
        ops = table["ops"] if isinstance(table.get("ops"), dict) else {}
        table["ops"] = ops
        for (op, backend), new in entries.items():
            kept = {_place(entry): entry for entry in tables.table_entries(table, op, backend)}
            kept.update((_place(entry), entry) for entry in new)
            if not isinstance(ops.get(op), dict):
                ops[op] = {}
            ops[op][backend] = {"entries": [kept[place] for place in sorted(kept)]}
            declaration = tuning.declared().get((op, backend))
            if declaration is not None:
                ops[op][backend]["default"] = {
                    name: parameter.default for name, parameter in declaration.parameters.items()
                }
        write(path, table)
    tuning.reload()
    return table


def remove(path: Path, target: device.Target, ops: Iterable[str] = ()) -> bool:
    """Take these ops out of a table, or the whole table away; whether there was anything to remove."""
    with _locked(path):
        table = tables.read_table(path, target)
        ops = set(ops)
        if not ops or table is None:
            found = path.exists()
            path.unlink(missing_ok=True)
        else:
            found = any(table["ops"].pop(op, None) is not None for op in ops)
            write(path, table)
    tuning.reload()
    return found


def write(path: Path, table: dict) -> None:
    """Replace a file by this table in one step."""
    files.write_text(path, dumps(table))


def dumps(table: dict) -> str:
    """Sorted JSON with an entry's every field on a line of its own, so that a diff shows what changed."""

    def lines(value: Any, depth: int) -> Iterator[str]:
        pad = " " * depth
        if isinstance(value, dict) and depth < _FLAT and value:
            yield "{"
            for at, name in enumerate(sorted(value)):
                inner = list(lines(value[name], depth + 1))
                comma = "," if at < len(value) - 1 else ""
                yield from _joined(f"{pad} {json.dumps(name)}: ", inner, comma)
            yield pad + "}"
        elif isinstance(value, list) and depth < _FLAT and value:
            yield "["
            for at, item in enumerate(value):
                comma = "," if at < len(value) - 1 else ""
                yield from _joined(f"{pad} ", list(lines(item, depth + 1)), comma)
            yield pad + "]"
        else:
            yield json.dumps(value, sort_keys=True)

    return "\n".join(lines(table, 0)) + "\n"


_FLAT = 6  # ops > op > backend > entries > entry > field: deeper than that stays on one line


def _joined(prefix: str, inner: list[str], comma: str) -> Iterator[str]:
    inner = [*inner[:-1], inner[-1] + comma]
    yield prefix + inner[0]
    yield from inner[1:]


def import_table(source: Path) -> tuple[Path, int]:
    """Merge a table from elsewhere into the user's cache; returns the file and how many entries it brought.

    Raises ValueError where the file is no table, or an entry is one that a look-up would refuse.
    """
    table = tables.read_table(source)
    if table is None:
        raise ValueError(f"cache import: {source} is not a table")
    try:
        target = device.Target(**table["device"])
        right = all(type(value) is type(_PLAIN[name]) for name, value in target.describe().items())
    except (KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f"cache import: {source} does not describe its device")
    entries: dict[tuple[str, str], list[Entry]] = {}
    for op, backend, entry in every_entry(table):
        reason = refusal(op, backend, entry, target)
        if reason is not None:
            raise ValueError(f"cache import: {source}: {op}.{backend}: {reason}")
        entries.setdefault((op, backend), []).append(entry)
    path = user_path(target)
    merge(path, target, entries)
    return path, sum(map(len, entries.values()))


def every_entry(table: dict) -> Iterator[tuple[str, str, Entry]]:
    """(op, backend, entry) of everything in a table that has the shape of an entry."""
    ops = table.get("ops")
    for op, backends in ops.items() if isinstance(ops, dict) else ():
        for backend in backends if isinstance(backends, dict) else ():
            for entry in tables.table_entries(table, op, backend):
                yield op, backend, entry


def refusal(op: str, backend: str, entry: Entry, target: device.Target) -> str | None:
    """Why a look-up would pass over an entry, or None."""
    declaration = tuning.declared().get((op, backend))
    if declaration is None:
        return "no such op and backend here"
    return declaration.refuses_entry(entry, target)


def _place(entry: Entry) -> str:
    """What identifies an entry: its key, then its sizes by number rather than by spelling."""
    sizes = entry.get("sizes")
    ordered = sorted(sizes.items()) if isinstance(sizes, dict) else []
    numbers = [[name, f"{size:020d}" if type(size) is int else repr(size)] for name, size in ordered]
    return json.dumps([entry.get("key"), numbers], sort_keys=True)


def _read_or_set_aside(path: Path, target: device.Target) -> dict | None:
    table = tables.read_table(path, target)
    if table is None and path.exists():
        aside = path.with_name(f"{path.name}.unusable-{time.time_ns()}")
        os.replace(path, aside)
    return table


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock").acquire(timeout=LOCK_SECONDS, poll_interval=0.01):
            yield
    except Timeout:
        raise TimeoutError(f"{path} was held by another process for {LOCK_SECONDS:.0f} s") from None
