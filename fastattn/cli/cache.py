"""`fastattn cache`: look into the tuned tables, check them, move them between machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn.cli._console import NARROW, flag, join, json_text, make_console

_Json = Annotated[bool, flag("--json", "Print JSON, for programs.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
_File = Annotated[Path, typer.Argument()]
_Ops = Annotated[list[str] | None, typer.Argument(help="Ops, such as attention; all by default.")]


def register(app: typer.Typer) -> None:
    cache = typer.Typer(
        help="The tuned tables: show, why, verify, export, import, clear.", no_args_is_help=True
    )
    cache.command()(show)
    cache.command()(why)
    cache.command()(verify)
    cache.command("export")(export)
    cache.command("import")(import_)
    cache.command()(clear)
    app.add_typer(cache, name="cache")


def show(ops: _Ops = None, device: _Device = "cpu", json: _Json = False) -> None:
    """Show every entry of every table that serves a device, best table first."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from fastattn.autotune.table import every_entry
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables, tuning

    console = _console()
    tuning.tunings()
    target = _device.present(device, "cache")
    found = (*tables.tables(target), *tables.relatives(target))
    if json:
        kept = [
            {
                "table": str(source),
                "made_for": table["device"],
                "entries": [
                    {"op": op, "backend": backend, **entry}
                    for op, backend, entry in every_entry(table)
                    if not ops or op in ops or f"{op}.{backend}" in ops
                ],
            }
            for source, table in found
        ]
        print(json_text({"device": target.describe(), "tables": kept}))
        return
    console.print(f"{target.name}, {target.arch}, {target.units} units", markup=False)
    shown, narrow = False, console.width < NARROW
    for source, table in found:
        made_for = "" if target.matches(table["device"]) else f" (made for {_made_for(table)})"
        rows = Table(box=None, pad_edge=False)
        heading = _plain(source + made_for)
        for name in ("op", "bucket", "configuration"):
            rows.add_column(name, overflow="fold")
        for name in ("time", "gain", "spread"):
            rows.add_column(name, justify="right", no_wrap=True)
        for op, backend, entry in every_entry(table):
            if not ops or op in ops or f"{op}.{backend}" in ops:
                bucket = f"{_fields(entry.get('key'))} {_fields(entry.get('sizes'))}"
                cells = (f"{op}.{backend}", bucket, _fields(entry.get("config")), *_figures(entry))
                shown = True
                if heading:
                    console.print(heading, markup=False, soft_wrap=True)
                    heading = ""
                if narrow:
                    console.print(_plain(f"{cells[0]}  {' '.join(filter(None, cells[3:]))}"), markup=False)
                    for cell in cells[1:3]:
                        console.print(Padding(Text(_plain(cell)), (0, 0, 0, 2)))
                else:
                    rows.add_row(*(escape(_plain(cell)) for cell in cells))
        if rows.row_count:
            console.print(rows)
    if not shown:
        console.print("no tuned entries: built-in defaults are in use (fastattn tune makes some)")


def why(
    op: Annotated[str, typer.Argument(help="op.backend, such as attention.cpu.")],
    key: Annotated[
        list[str] | None,
        typer.Argument(
            help="Fields as `tune --shapes` takes them, such as dtype=bfloat16 length=512; others are tune's."
        ),
    ] = None,
    device: _Device = "cpu",
) -> None:
    """Show which configuration a call gets and from which table, and why entries of other tables were passed over."""
    from fastattn.autotune.table import every_entry, refusal
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables, tuning

    from .tune import fields_of

    console = _console()
    name, _, backend = op.partition(".")
    declared = tuning.tunings()
    backends = [other for known, other in declared if known == name]
    backend = backend or (backends[0] if len(backends) == 1 else "")
    if (name, backend) not in declared:
        known = sorted(".".join(one) for one in declared)
        close = [one for one in known if one.startswith(f"{name}.")] or known
        raise ValueError(f"cache why: no tuned op {op}; there is {', '.join(close)}")
    declaration, target = declared[name, backend], _device.present(device, "cache")
    given = fields_of(" ".join(key), "cache why: the key is") if key else {}
    if given.keys() == {*declaration.structural, *declaration.sizes}:
        structural = {field: given[field] for field in declaration.structural}
        sizes = {field: given[field] for field in declaration.sizes}
    else:
        structural, sizes = _key_of(f"{name}.{backend}", given, target)
        console.print(f"{_fields(structural)} {_fields(sizes)}", markup=False, soft_wrap=True)
    choice = tuning.lookup(name, backend, structural=structural, sizes=sizes, device=target)
    console.print(f"{_fields(choice.values)}  from {_plain(choice.source)}", markup=False)
    sources = dict(tables.tables(target))
    relatives = dict(tables.relatives(target))
    for path in (*(str(d / f"{target.slug}.json") for d in tables.directories()), *relatives):
        table = sources.get(path) or relatives.get(path)
        if table is None:
            reason = "cannot be used" if Path(path).exists() else "is not there"
            console.print(f"  {path} {reason}", markup=False, soft_wrap=True)
            continue
        made_for = f", made for {_made_for(table)}" if path in relatives else ""
        console.print(_plain(f"  {path}{made_for}"), markup=False, soft_wrap=True)
        for found_op, found_backend, entry in every_entry(table):
            if (found_op, found_backend) != (name, backend):
                continue
            reason = refusal(name, backend, entry, target)
            if reason is None and entry["key"] != structural:
                continue
            reason = reason or _distance(entry["sizes"], sizes)
            console.print(
                f"    {_fields(entry.get('sizes'))}: {_plain(reason)}", markup=False, soft_wrap=True
            )


def _key_of(name: str, given: dict, target: Any) -> tuple[dict, dict]:
    """The key that a call of tune's has, whose fields are given in part: it is made and asked what it looked up."""
    import torch

    from fastattn.autotune import measure, space

    found = space.load_workloads(space.workload_modules()).get(name)
    if found is None or target.kind not in found[1].devices:
        raise ValueError(
            f"cache why: {name} has no call to try on {target.kind}; give the key of one, every field of it"
        )
    workload = found[1]
    shape = space.with_fields(workload, given, target, "cache why")
    look = measure.looked_up(workload, shape, torch.device(target.kind))
    return look.structural, look.sizes


def _made_for(table: dict) -> str:
    device = table["device"]
    return f"{device.get('name')}, {device.get('units')} units"


def verify(
    device: _Device = "cpu",
    measure: Annotated[
        bool, flag("--measure", "Time every entry against the default again (20 rounds).")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Rounds of --measure.")] = 20,
) -> None:
    """Check that every entry is one a look-up would take; exits with 1 where one is not.

    With --measure the shapes of each entry that departs from the default run again, interleaved with the default,
    and one that is slower by more than the spread fails as well.
    """
    from fastattn.autotune.table import every_entry, refusal
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables, tuning

    console = _console()
    tuning.tunings()
    target = _device.present(device, "cache")
    bad = good = 0
    for source, table in tables.tables(target):
        for op, backend, entry in every_entry(table):
            reason = refusal(op, backend, entry, target)
            if reason is not None:
                bad += 1
                text = f"{source}: {op}.{backend} {_fields(entry.get('key'))}: {reason}"
                console.print(_plain(text), markup=False, soft_wrap=True)
            else:
                good += 1
    for directory in tables.directories():
        path = directory / f"{target.slug}.json"
        if path.exists() and tables.read_table(path, target) is None:
            bad += 1
            console.print(f"{path}: not a table for this device", markup=False, soft_wrap=True)
    console.print(f"{good} entries are good, {bad} problems")
    slower = _measure(console, target, device, rounds) if measure else 0
    if bad or slower:
        raise typer.Exit(1)


def export(path: _File, device: _Device = "cpu") -> None:
    """Write your table for a device to a file, to share or to ship."""
    from fastattn.autotune.table import user_path, write
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables

    target = _device.present(device, "cache")
    table = tables.read_table(user_path(target), target)
    if table is None:
        raise ValueError(f"cache export: there is no table at {user_path(target)} (fastattn tune makes one)")
    write(path, table)
    _console().print(f"wrote {path}", markup=False, soft_wrap=True)


def import_(path: _File) -> None:
    """Merge a table from elsewhere into yours, after checking every entry; it may be for another device."""
    from fastattn.autotune.table import import_table
    from fastattn.runtime import tuning

    if not path.exists():
        raise FileNotFoundError(f"cache import: {path}: no such file")
    tuning.tunings()
    written, count = import_table(path)
    _console().print(f"{count} entries merged into {written}", markup=False, soft_wrap=True)


def clear(
    ops: _Ops = None,
    device: _Device = "cpu",
    trials: Annotated[bool, flag("--trials", "Forget the measured trials as well.")] = False,
    yes: Annotated[bool, flag("--yes", "Do not ask.")] = False,
) -> None:
    """Remove your tuned entries for a device, those of the named ops or all of them; shipped tables stay."""
    from fastattn.autotune.table import every_entry, remove, user_path
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables

    target = _device.present(device, "cache")
    table = tables.read_table(user_path(target), target)
    entries = sum(not ops or op in ops for op, *_ in every_entry(table)) if table else 0
    journals = sorted((tables.cache_dir() / "studies").glob(f"{target.slug}.journal*")) if trials else []
    of = f" ({join(ops)})" if ops else ""
    what = join([f"{entries} tuned entries{of}"] * bool(entries) + ["every measured trial"] * bool(journals))
    if not what:
        _console().print("there was nothing to remove")
        return
    if not yes:
        typer.confirm(f"Remove {what} for {target.name} from {tables.cache_dir()}?", abort=True)
    remove(user_path(target), target, ops or ())
    for file in journals:
        file.unlink()
    _console().print(f"removed {what}", markup=False)


def _measure(console: Any, target: Any, device: str, rounds: int) -> int:
    """Re-measure the entries in effect; returns how many are slower than their default."""
    import math

    from fastattn.autotune.remeasure import remeasure
    from fastattn.runtime import tables

    slower, ratios = 0, []
    for name, label, compared, failure in remeasure(tables.tables(target), target, device, rounds):
        if compared is None:
            console.print(f"{name} {label}: {failure}", markup=False, soft_wrap=True)
            continue
        slower += compared.slower
        ratios.append(compared.ratio)
        verdict = "SLOWER" if compared.slower else f"{1 / compared.ratio:.2f}×"
        text = f"{name} {label}: {verdict} ± {100 * compared.spread:.1f} %"
        console.print(text, markup=False, soft_wrap=True)
    if ratios:
        mean = math.exp(-sum(map(math.log, ratios)) / len(ratios))
        console.print(f"measured {len(ratios)} entries: geometric mean gain {mean:.2f}×, {slower} slower")
    return slower


def _console() -> Any:
    return make_console(soft_wrap=False)


def _fields(values: Any) -> str:
    if not hasattr(values, "items"):
        return "?"
    return _plain(" ".join(f"{name}={value}" for name, value in values.items()))


def _plain(text: str) -> str:
    """`text` without control characters, which a terminal would obey: a table may come from anywhere."""
    return "".join(character if character.isprintable() else "?" for character in str(text))[:500]


def _figures(entry: dict) -> tuple[str, str, str]:
    from fastattn.autotune.report import duration

    def number(name: str) -> float | None:
        value = entry.get(name)
        return float(value) if isinstance(value, (int, float)) and 0 < value < 1e15 else None

    time, ratio, spread = number("time_us"), number("ratio"), number("spread")
    return (
        duration(time * 1e-6) if time else "",
        f"{1 / ratio:.2f}×" if ratio else "",
        f"± {100 * spread:.1f} %" if spread else "",
    )


def _distance(tuned: dict[str, int], sizes: dict[str, int]) -> str:
    from math import log2

    from fastattn.runtime.tuning import REACH

    octaves = {name: abs(log2(tuned[name]) - log2(max(1, sizes[name]))) for name in sizes}
    worst = max(octaves, key=octaves.__getitem__, default=None)
    if worst is None or octaves[worst] == 0:
        return "the same sizes"
    far = f", more than the {REACH:g} that a tuned size reaches" if octaves[worst] > REACH else ""
    return f"{octaves[worst]:.1f} octaves away in {worst}{far}"
