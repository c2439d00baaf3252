"""Tuned tables: which tile sizes a kernel launches with on this device.

An op declares its parameters (`declare`, in `ops/<op>/tuning.py`); its launch code asks `lookup`. Tables are
JSON made offline by `fastattn tune`, looked for in FASTATTN_CONFIG_DIR, then the user's cache, then what
ships; without one the built-in default holds. A table is untrusted: a bad one is a miss, never an error.
Nothing here tunes, and only the standard library is imported (platformdirs when the cache is first located).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import pkgutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastattn import _device

SCHEMA = 1
MAX_BYTES = 4 << 20  # a table is a few kilobytes; anything larger is not one
REACH = 3.0  # octaves a tuned size may be away from the call's before the default is the better guess
_MEMO = 4096  # sizes remembered for one structural key

Value = int | str
Key = Mapping[str, Any]
_Entry = tuple[tuple[float, ...], dict[str, Value]]  # (log2 of the sizes, values)
logger = logging.getLogger("fastattn")


@dataclass(frozen=True)
class Parameter:
    """One tunable: its built-in value and every value a table may give it."""

    default: Value
    allowed: tuple[Value, ...]

    def __post_init__(self) -> None:
        for value in (*self.allowed, self.default):
            if type(value) not in (int, str) or (type(value) is int and not -(2**31) <= value < 2**31):
                raise TypeError(f"parameter value {value!r} is neither a string nor a 32-bit integer")
        if not self.accepts(self.default):
            raise ValueError(f"default {self.default!r} is not among {self.allowed}")

    def accepts(self, value: Any) -> bool:
        # type first: True == 1 and 32.0 == 32 would pass `in`
        return any(type(value) is type(option) and value == option for option in self.allowed)


@dataclass(frozen=True)
class Declaration:
    """The parameters of one op on one backend and the key its tuned entries are found by."""

    op: str
    backend: str
    parameters: Mapping[str, Parameter]
    structural: tuple[str, ...]  # matched exactly
    sizes: tuple[str, ...]  # positive integers, matched to the nearest in log2
    feasible: Callable[[Mapping[str, Value], Key, _device.Target], str | None] | None = None
    default: Callable[[Key, _device.Target], Mapping[str, Value]] | None = None

    def defaults(self, key: Key, target: _device.Target) -> dict[str, Value]:
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        return values | dict(self.default(key, target)) if self.default is not None else values

    def refuses(self, values: Any, key: Key, target: _device.Target) -> str | None:
        """Why these values cannot be launched, or None."""
        if not isinstance(values, Mapping) or values.keys() != self.parameters.keys():
            return f"names are not {', '.join(self.parameters)}"
        for name, parameter in self.parameters.items():
            if not parameter.accepts(values[name]):
                return f"{name}={_brief(values[name])} is not allowed"
        return self.feasible(values, key, target) if self.feasible is not None else None


@dataclass(frozen=True)
class Choice:
    """The values a kernel launches with, and where they came from: "default", "override" or a table."""

    values: Mapping[str, Value]
    source: str


@dataclass
class _Bucket:
    """What one structural key has on one device: entries of every table, best rung first."""

    declaration: Declaration
    structural: dict[str, Any]
    target: _device.Target
    rungs: list[tuple[str, list[_Entry]]]  # (source, [(log2 sizes, values)])
    memo: dict[tuple, Choice] = field(default_factory=dict)
    default: Choice | None = None  # set where no size can change the answer


_declared: dict[tuple[str, str], Declaration] = {}
_buckets: dict[tuple, _Bucket] = {}
_tables: dict[_device.Target, list[tuple[str, dict]]] = {}
_installed: dict[_device.Target, dict] = {}
_override: dict[tuple[str, str], Choice] = {}
_complained: set[str] = set()
_lock = threading.RLock()


def declare(
    op: str,
    backend: str,
    *,
    parameters: Mapping[str, Parameter],
    structural: tuple[str, ...],
    sizes: tuple[str, ...],
    feasible: Callable[[Mapping[str, Value], Key, _device.Target], str | None] | None = None,
    default: Callable[[Key, _device.Target], Mapping[str, Value]] | None = None,
) -> Declaration:
    """Declare what an op's kernel on one backend can be tuned by.

    feasible(values, key, target) returns None, or why those values cannot work; key holds the structural and
    size fields together. default(key, target) returns the values that differ from the parameters' defaults
    for that key. Both are cheap and pure.
    """
    both = set(structural) & set(sizes)
    if both or not parameters:
        raise ValueError(f"{op}.{backend}: {sorted(both)} are both structural and sizes, or no parameters")
    declaration = Declaration(
        op, backend, MappingProxyType(dict(parameters)), tuple(structural), tuple(sizes), feasible, default
    )
    with _lock:
        _declared[op, backend] = declaration
        reload()
    return declaration


def declared() -> Mapping[tuple[str, str], Declaration]:
    """Everything declared so far, by (op, backend)."""
    return MappingProxyType(_declared)


def tunings() -> Mapping[tuple[str, str], Declaration]:
    """Import every op's tuning module and return what they declare."""
    from fastattn import ops

    for module in pkgutil.iter_modules(ops.__path__, "fastattn.ops."):
        if module.ispkg and importlib.util.find_spec(f"{module.name}.tuning") is not None:
            importlib.import_module(f"{module.name}.tuning")
    return declared()


def lookup(op: str, backend: str, *, structural: Key, sizes: Mapping[str, int], device: Any) -> Choice:
    """The configuration to launch with; a warm call costs a microsecond or two.

    structural and sizes hold the declared names; device is a torch.device, a string or a Target.
    """
    if _override:
        forced = _override.get((op, backend))
        if forced is not None:
            return forced
    bucket = _buckets.get((op, backend, device, *structural.items()))
    if bucket is None:
        bucket = _open_bucket(op, backend, structural, sizes, device)
    if bucket.default is not None:
        return bucket.default
    choice = bucket.memo.get((*sizes.items(),))
    return choice if choice is not None else _choose(bucket, sizes)


def _open_bucket(op: str, backend: str, structural: Key, sizes: Mapping[str, int], device: Any) -> _Bucket:
    declaration = _declared.get((op, backend))
    if declaration is None:
        raise KeyError(f"{op}.{backend} has declared no tuning")
    if structural.keys() != set(declaration.structural) or sizes.keys() != set(declaration.sizes):
        raise KeyError(
            f"{op}.{backend}: key fields are {declaration.structural} and {declaration.sizes}, "
            f"given {tuple(structural)} and {tuple(sizes)}"
        )
    for name, value in structural.items():
        if type(value) not in (bool, int, str):
            raise TypeError(f"{op}.{backend}: {name}={value!r} must be a string, integer or bool")
    target = _device.target(device)
    with _lock:
        rungs = []
        for source, table in tables(target):
            found = entries(declaration, table, structural, target, source)
            if found:
                rungs.append((source, found))
        bucket = _Bucket(declaration, dict(structural), target, rungs)
        if not rungs and declaration.default is None:
            bucket.default = Choice(MappingProxyType(declaration.defaults({}, target)), "default")
        if len(_buckets) > _MEMO:
            _buckets.clear()
        _buckets[(op, backend, device, *structural.items())] = bucket
    return bucket


def entries(
    declaration: Declaration, table: dict, structural: Key, target: _device.Target, source: str
) -> list[_Entry]:
    """The table's usable entries for one structural key: (log2 of the sizes, values)."""
    usable = []
    for entry in table_entries(table, declaration.op, declaration.backend):
        key, sizes = entry.get("key"), entry.get("sizes")
        if not isinstance(key, dict) or not _same_key(key, structural):
            continue
        if not isinstance(sizes, dict) or sizes.keys() != set(declaration.sizes):
            continue
        if any(type(size) is not int or not 0 < size < 2**63 for size in sizes.values()):
            complain(f"{source}: {declaration.op}.{declaration.backend} has a bad size, entry ignored")
            continue
        config = entry.get("config")
        reason = declaration.refuses(config, {**structural, **sizes}, target)
        if reason is not None:
            complain(f"{source}: {declaration.op}.{declaration.backend}: {reason}, entry ignored")
            continue
        place = tuple(math.log2(sizes[name]) for name in declaration.sizes)
        usable.append((place, {name: config[name] for name in declaration.parameters}))
    return usable


def _same_key(key: dict, structural: Key) -> bool:
    return key.keys() == structural.keys() and all(
        type(key[name]) is type(value) and key[name] == value for name, value in structural.items()
    )


def _choose(bucket: _Bucket, sizes: Mapping[str, int]) -> Choice:
    declaration, target = bucket.declaration, bucket.target
    if sizes.keys() != set(declaration.sizes):
        raise KeyError(f"{declaration.op}.{declaration.backend}: sizes are {declaration.sizes}")
    place = tuple(math.log2(max(1, sizes[name])) for name in declaration.sizes)
    key = {**bucket.structural, **sizes}
    choice = None
    for source, found in bucket.rungs:
        for values in nearest(found, place):
            # tuned for a neighbouring size, so feasibility is asked again for this one
            if declaration.refuses(values, key, target) is None:
                choice = Choice(MappingProxyType(values), source)
                break
        if choice is not None:
            break
    if choice is None:
        choice = Choice(MappingProxyType(declaration.defaults(key, target)), "default")
    with _lock:
        if len(bucket.memo) > _MEMO:
            bucket.memo.clear()
        bucket.memo[(*sizes.items(),)] = choice
    return choice


def nearest(found: list[_Entry], place: tuple[float, ...]) -> Iterator[dict[str, Value]]:
    """Values of the entries within REACH octaves in every size, nearest first."""

    def gaps(entry: _Entry) -> list[float]:
        return [abs(tuned - wanted) for tuned, wanted in zip(entry[0], place, strict=True)]

    near = [entry for entry in found if max(gaps(entry), default=0.0) <= REACH]
    return (values for _, values in sorted(near, key=lambda entry: sum(gap * gap for gap in gaps(entry))))


@contextlib.contextmanager
def override(configs: Mapping[tuple[str, str], Mapping[str, Value]]) -> Iterator[None]:
    """Launch with these values, process-wide, until the context ends: {(op, backend): {name: value}}.

    Names left out keep their parameter's default. Raises ValueError for a value the op does not allow.
    """
    forced = {}
    for (op, backend), values in configs.items():
        declaration = _declared[op, backend]
        full = {name: parameter.default for name, parameter in declaration.parameters.items()} | dict(values)
        for name, value in full.items():
            if name not in declaration.parameters or not declaration.parameters[name].accepts(value):
                raise ValueError(f"{op}.{backend}: {name}={value!r} is not allowed")
        forced[op, backend] = Choice(MappingProxyType(full), "override")
    with _lock:
        before = dict(_override)
        _override.update(forced)
    try:
        yield
    finally:
        with _lock:
            _override.clear()
            _override.update(before)


def reload() -> None:
    """Forget every table and choice; the next look-up reads the files again."""
    with _lock:
        _tables.clear()
        _buckets.clear()
        _complained.clear()


def install(device: Any, table: dict | None) -> None:
    """Use this table in place of every file's on a device (None: the files again)."""
    target = _device.target(device)
    with _lock:
        if table is None:
            _installed.pop(target, None)
        else:
            _installed[target] = table
        reload()


def cache_dir() -> Path:
    """Where this user's tables (`tables/`) and studies (`studies/`) live."""
    chosen = os.environ.get("FASTATTN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastattn", appauthor=False))


def shipped_dir() -> Path | None:
    """The tables that came with the package."""
    spec = importlib.util.find_spec("fastattn.autotune")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / "configs" if places else None


def directories() -> list[Path]:
    """Where tables are looked for, best first."""
    explicit = os.environ.get("FASTATTN_CONFIG_DIR")
    ladder = [Path(explicit)] if explicit else []
    ladder.append(cache_dir() / "tables")
    shipped = shipped_dir()
    return ladder + ([shipped] if shipped is not None else [])


def tables(target: _device.Target) -> list[tuple[str, dict]]:
    """(source, table) of every readable table for a device, best first."""
    with _lock:
        if target in _installed:
            table = _installed[target]
            if reason := unfit(table, target):
                complain(f"synchronised table: {reason}, ignored")
                return []
            return [("synchronised", table)]
        if target not in _tables:
            _tables[target] = []
            for directory in directories():
                path = directory / f"{target.slug}.json"
                table = read_table(path, target)
                if table is not None:
                    _tables[target].append((str(path), table))
        return _tables[target]


def read_table(path: Path, target: _device.Target | None = None) -> dict | None:
    """A table's contents, or None with one log line where the file is not one that can be used."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
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
    """Why this is not a table for the device, or None."""
    if not isinstance(table, dict):
        return "not a table"
    if type(table.get("schema")) is not int or table["schema"] != SCHEMA:
        return f"schema {_brief(table.get('schema'))} is not {SCHEMA}"
    if target is not None and not target.matches(table.get("device")):
        return "made for another device"
    return None


def table_entries(table: dict, op: str, backend: str) -> list[dict]:
    """The entries of one op and backend, or nothing where the table's shape is wrong."""
    level: Any = table
    for name in ("ops", op, backend):
        level = level.get(name) if isinstance(level, dict) else None
    found = level.get("entries") if isinstance(level, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _brief(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (int, float, str)) else type(value).__name__


def complain(message: str) -> None:
    """One log line, once for each message until tables are reloaded."""
    if message not in _complained and len(_complained) < 1000:
        _complained.add(message)
        logger.warning("%s", message)


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
