"""Reading tuned tables: the folders that are searched, and the checks that a file must pass.

A table is untrusted: a truncated, foreign, huge or hostile file is a miss with one log line, never an error.
Only the standard library is imported (platformdirs when the user's cache is first located).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

from fastattn.runtime import device as _device

SCHEMA = 1
MAX_BYTES = 4 << 20  # a table has a few kilobytes; larger files are ignored

logger = logging.getLogger("fastattn")
_MOST_RELATIVES = 32  # files of other devices that are read in a folder
_read: dict[_device.Target, list[tuple[str, dict]]] = {}
_relatives: dict[_device.Target, list[tuple[str, dict]]] = {}
_installed: dict[_device.Target, dict] = {}
_complained: set[str] = set()
_lock = threading.RLock()


def forget() -> None:
    """Read the files again at the next look-up."""
    with _lock:
        _read.clear()
        _relatives.clear()
        _complained.clear()


def install(target: _device.Target, table: dict | None) -> None:
    """Use this table for a device instead of all files (None: read the files again)."""
    with _lock:
        if table is None:
            _installed.pop(target, None)
        else:
            _installed[target] = table


def cache_dir() -> Path:
    """The folder of this user's tables (`tables/`), studies (`studies/`) and functions printed for Triton (`flex/`)."""
    chosen = os.environ.get("FASTATTN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastattn", appauthor=False))


def shipped_dir() -> Path | None:
    """The folder of the tables that came with the package, or None."""
    spec = importlib.util.find_spec("fastattn.autotune")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / "configs" if places else None


def directories() -> list[Path]:
    """The folders in which tables are looked up, best first."""
    explicit = os.environ.get("FASTATTN_CONFIG_DIR")
    folders = [Path(explicit)] if explicit else []
    folders.append(cache_dir() / "tables")
    shipped = shipped_dir()
    return folders + ([shipped] if shipped is not None else [])


def tables(target: _device.Target) -> list[tuple[str, dict]]:
    """(source, table) of every readable table for a device, best first."""
    with _lock:
        if target in _installed:
            installed = _installed[target]
            if reason := unfit(installed, target):
                complain(f"synchronised table: {reason}, ignored")
                return []
            return [("synchronised", installed)]
        if target not in _read:
            _read[target] = []
            for directory in directories():
                path = directory / f"{target.slug}.json"
                table = read_table(path, target)
                if table is not None:
                    _read[target].append((str(path), table))
        return _read[target]


def relatives(target: _device.Target) -> list[tuple[str, dict]]:
    """(source, table) of other devices with this one's instruction set or architecture, best first: those of the same name, then
    by how near the number of units is; among equals, the earlier folder's."""
    with _lock:
        if target in _installed:
            return []
        if target not in _relatives:
            result = []
            for directory in directories():
                for path in sorted(directory.glob("*.json"))[:_MOST_RELATIVES]:
                    if path.stem == target.slug:  # `tables` reads this one
                        continue
                    table = read_table(path)
                    if table is None:
                        continue
                    if target.resembles(table.get("device")) and not target.matches(table["device"]):
                        result.append((str(path), table))
            result.sort(key=lambda item: _difference(item[1]["device"], target))
            _relatives[target] = result
        return _relatives[target]


def _difference(described: dict, target: _device.Target) -> tuple[bool, float]:
    units = described.get("units")
    distance = math.inf
    if isinstance(units, int) and not isinstance(units, bool) and 0 < units < 2**31:
        distance = abs(math.log2(units / target.units))
    return described.get("name") != target.name, distance


def read_table(path: Path, target: _device.Target | None = None) -> dict | None:
    """A table's contents, or None and one log line if the file cannot be used."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        complain(f"{path}: not a regular file under {MAX_BYTES >> 20} MiB, ignored")
        return None
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read(MAX_BYTES + 1).decode("utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        complain(f"{path}: unreadable ({type(error).__name__}), ignored")
        return None
    reason = unfit(table, target)
    if reason is not None:
        complain(f"{path}: {reason}, ignored")
        return None
    return table


def unfit(table: Any, target: _device.Target | None) -> str | None:
    """Why this value is not a table for the device, or None."""
    if not isinstance(table, dict):
        return "not a table"
    if type(table.get("schema")) is not int or table["schema"] != SCHEMA:
        return f"schema {brief(table.get('schema'))} is not {SCHEMA}"
    if target is not None and not target.matches(table.get("device")):
        return "made for another device"
    return None


def table_entries(table: dict, op: str, backend: str) -> list[dict]:
    """The entries of one op and backend; [] where the table's structure is wrong."""
    level: Any = table
    for name in ("ops", op, backend):
        level = level.get(name) if isinstance(level, dict) else None
    entries = level.get("entries") if isinstance(level, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def brief(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (int, float, str)) else type(value).__name__


def complain(message: str) -> None:
    """One log line, once for each message until tables are reloaded."""
    if message not in _complained and len(_complained) < 1000:
        _complained.add(message)
        logger.warning("%s", message)


def effective(device: Any) -> dict:
    """All readable tables for a device merged into one. Where two have an entry for a key, the earlier table's is taken."""
    target = _device.target(device)
    ops: dict[str, dict[str, dict[str, list]]] = {}
    seen = set()
    for _, table in (*tables(target), *relatives(target)):
        level = table.get("ops")
        for op, backends in level.items() if isinstance(level, dict) else ():
            for backend in backends if isinstance(backends, dict) else ():
                for entry in table_entries(table, op, backend):
                    fields = {name: entry.get(name) for name in ("key", "sizes", "config")}
                    entry_key = json.dumps([op, backend, fields["key"], fields["sizes"]], sort_keys=True)
                    if entry_key not in seen:
                        seen.add(entry_key)
                        ops.setdefault(op, {}).setdefault(backend, {"entries": []})["entries"].append(fields)
    return {"schema": SCHEMA, "device": target.describe(), "ops": ops}


def _set_level() -> None:
    level = os.environ.get("FASTATTN_LOG", "").upper()
    if level in logging.getLevelNamesMapping():
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("fastattn: %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False


_set_level()
