"""Tuned tables: which tile sizes a kernel launches with on this device.

An op declares its parameters (`declare`, in `ops/<op>/tuning.py`); its launch code calls `lookup`. Tables are
JSON files made offline by `fastattn tune`. They are looked up in FASTATTN_CONFIG_DIR, then the user's cache, then the
package; without a table the built-in default is used. A table is untrusted: a bad one is a miss, never an error.
Nothing here tunes, and only the standard library is imported (platformdirs when the cache is first located).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import math
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastattn.runtime import device as _device
from fastattn.runtime import tables as _tables

REACH = 2.0  # octaves between a tuned size and the call's, beyond which the default is the better guess
_MEMO = 4096  # sizes remembered for one structural key

Value = int | str
Key = Mapping[str, Any]
_Entry = tuple[tuple[float, ...], dict[str, Value], str]  # (log2 of the sizes, values, source)


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
        # the type too: True == 1 and 32.0 == 32 would pass `in`
        return any(type(value) is type(option) and value == option for option in self.allowed)


@dataclass(frozen=True)
class Declaration:
    """The parameters of one op on one backend, and the fields of the key by which its tuned entries are looked up."""

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
                return f"{name}={_tables.brief(values[name])} is not allowed"
        return self.feasible(values, key, target) if self.feasible is not None else None

    def refuses_entry(self, entry: Mapping[str, Any], target: _device.Target) -> str | None:
        """Why a look-up on this device must skip this entry of a table, or None."""
        key, sizes = entry.get("key"), entry.get("sizes")
        if not isinstance(key, dict) or key.keys() != set(self.structural):
            return f"key fields are not {', '.join(self.structural)}"
        if not isinstance(sizes, dict) or sizes.keys() != set(self.sizes):
            return f"sizes are not {', '.join(self.sizes)}"
        if any(type(size) is not int or not 0 < size < 2**63 for size in sizes.values()):
            return "a size is not a positive integer"
        try:
            return self.refuses(entry.get("config"), {**key, **sizes}, target)
        except Exception as error:  # a feasibility test may fail for a key that no call makes
            return f"no such key ({type(error).__name__})"


@dataclass(frozen=True)
class Choice:
    """The values a kernel launches with, and where they came from: "default", "override" or a table."""

    values: Mapping[str, Value]
    source: str


@dataclass(frozen=True)
class Lookup:
    """One look-up as a kernel made it."""

    op: str
    backend: str
    structural: dict[str, Any]
    sizes: dict[str, int]


@dataclass
class _Bucket:
    """The entries and the choices remembered for one structural key on one device."""

    declaration: Declaration
    structural: dict[str, Any]
    target: _device.Target
    # this device's entries, then those of its instruction set or architecture
    steps: tuple[list[_Entry], ...]
    memo: dict[tuple, Choice] = field(default_factory=dict)
    default: Choice | None = None  # set where no size can change the answer


_declared: dict[tuple[str, str], Declaration] = {}
_buckets: dict[tuple, _Bucket] = {}
_override: dict[tuple[str, str], Choice] = {}
_watchers: list[list[Lookup]] = []
_remembered: list[dict[tuple, Choice]] = []
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
    """Declare the tunable parameters of an op's kernel on one backend.

    feasible(values, key, target) returns None, or why those values cannot work; key holds the structural and
    size fields together. default(key, target) returns the values that differ from the parameters' defaults
    for that key. Both are cheap and pure.
    """
    overlap = set(structural) & set(sizes)
    if overlap:
        raise ValueError(f"{op}.{backend}: {sorted(overlap)} are both structural and sizes")
    if not parameters:
        raise ValueError(f"{op}.{backend}: no parameters to tune")
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
    if _watchers:
        made = Lookup(op, backend, dict(structural), dict(sizes))
        for watcher in _watchers:
            watcher.append(made)
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


def remembered(choose: Callable[..., Choice]) -> Callable[..., Choice]:
    """Remember a look-up's choices by its hashable arguments until tables change: a warm call then costs even less."""
    memo: dict[tuple, Choice] = {}
    with _lock:
        _remembered.append(memo)

    def run(*key):
        if _watchers or _override:
            return choose(*key)
        choice = memo.get(key)
        if choice is None:
            with _lock:  # no table may change between choosing and storing
                choice = choose(*key)
                if len(memo) > _MEMO:
                    memo.clear()
                if not _override:
                    memo[key] = choice
        return choice

    return run


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
        steps = tuple(
            _usable(declaration, tables, structural, target)
            for tables in (_tables.tables(target), _tables.relatives(target))
        )
        bucket = _Bucket(declaration, dict(structural), target, steps)
        if not any(steps) and declaration.default is None:
            bucket.default = Choice(MappingProxyType(declaration.defaults({}, target)), "default")
        if len(_buckets) > _MEMO:
            _buckets.clear()
        _buckets[(op, backend, device, *structural.items())] = bucket
    return bucket


def _usable(
    declaration: Declaration, tables: list[tuple[str, dict]], structural: Key, target: _device.Target
) -> list[_Entry]:
    """The tables' entries for one structural key. If two tables have an entry for the same sizes, the earlier table's is taken."""
    usable: dict[tuple[float, ...], _Entry] = {}
    for source, table in tables:
        earlier = set(usable)
        for entry in _tables.table_entries(table, declaration.op, declaration.backend):
            key = entry.get("key")
            if not isinstance(key, dict) or not _same_key(key, structural):
                continue
            reason = declaration.refuses_entry(entry, target)
            if reason is not None:
                _tables.complain(f"{source}: {declaration.op}.{declaration.backend}: {reason}, entry ignored")
                continue
            point = tuple(math.log2(entry["sizes"][name]) for name in declaration.sizes)
            if point not in earlier:
                values = {name: entry["config"][name] for name in declaration.parameters}
                usable.setdefault(point, (point, values, source))
    return list(usable.values())


def _same_key(key: dict, structural: Key) -> bool:
    return key.keys() == structural.keys() and all(
        type(key[name]) is type(value) and key[name] == value for name, value in structural.items()
    )


def _choose(bucket: _Bucket, sizes: Mapping[str, int]) -> Choice:
    declaration, target = bucket.declaration, bucket.target
    if sizes.keys() != set(declaration.sizes):
        raise KeyError(f"{declaration.op}.{declaration.backend}: sizes are {declaration.sizes}")
    point = tuple(math.log2(max(1, sizes[name])) for name in declaration.sizes)
    key = {**bucket.structural, **sizes}
    choice = None
    for _, values, source in itertools.chain.from_iterable(nearest(step, point) for step in bucket.steps):
        # tuned for a neighbouring size, so check that it is feasible for this one
        if declaration.refuses(values, key, target) is None:
            choice = Choice(MappingProxyType(values), source)
            break
    if choice is None:
        choice = Choice(MappingProxyType(declaration.defaults(key, target)), "default")
    with _lock:
        if len(bucket.memo) > _MEMO:
            bucket.memo.clear()
        bucket.memo[(*sizes.items(),)] = choice
    return choice


def nearest(entries: list[_Entry], point: tuple[float, ...]) -> list[_Entry]:
    """The entries within REACH octaves in every size, nearest first; among equals the earlier table's."""

    def gaps(entry: _Entry) -> list[float]:
        return [abs(tuned - requested) for tuned, requested in zip(entry[0], point, strict=True)]

    near = [entry for entry in entries if max(gaps(entry), default=0.0) <= REACH]
    return sorted(near, key=lambda entry: sum(gap * gap for gap in gaps(entry)))


@contextlib.contextmanager
def override(configs: Mapping[tuple[str, str], Mapping[str, Value]]) -> Iterator[None]:
    """Launch with these values, process-wide, until the context ends: {(op, backend): {name: value}}.

    Names left out keep their parameter's default. Raises ValueError for a value the op does not allow.
    """
    forced = {}
    for (op, backend), values in configs.items():
        declaration = _declared.get((op, backend)) or tunings()[op, backend]
        full = {name: parameter.default for name, parameter in declaration.parameters.items()} | dict(values)
        for name, value in full.items():
            if name not in declaration.parameters or not declaration.parameters[name].accepts(value):
                raise ValueError(f"{op}.{backend}: {name}={value!r} is not allowed")
        forced[op, backend] = Choice(MappingProxyType(full), "override")
    with _lock:
        previous = dict(_override)
        _override.update(forced)
    try:
        yield
    finally:
        with _lock:
            _override.clear()
            _override.update(previous)


@contextlib.contextmanager
def watch() -> Iterator[list[Lookup]]:
    """Collect every look-up made inside the block. The tuner thereby learns which keys a call uses."""
    seen: list[Lookup] = []
    with _lock:
        _watchers.append(seen)
    try:
        yield seen
    finally:
        with _lock:
            _watchers[:] = [watcher for watcher in _watchers if watcher is not seen]


def reload() -> None:
    """Forget every table and choice; the next look-up reads the files again."""
    with _lock:
        _tables.forget()
        _buckets.clear()
        for memo in _remembered:
            memo.clear()


def install(device: Any, table: dict | None) -> None:
    """Use this table in place of every file's on a device (None: the files again)."""
    with _lock:
        _tables.install(_device.target(device), table)
        reload()
