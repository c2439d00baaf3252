"""`fastattn doctor`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn.cli._console import NARROW, busy, flag, json_text

if TYPE_CHECKING:
    from fastattn.runtime.examples import Example

_DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    json: Annotated[bool, flag("--json", "Print JSON, for programs.")] = False,
) -> None:
    """Show the device, the versions, which backend serves each op, the tuned tables in use, and what is slow.

    Nothing is run or changed: each op is only asked which kernel it would take.
    """
    import torch

    from fastattn.cli._environment import environment, versions

    devices = {
        device: _backends(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    }
    missing = [name for name, version in versions() if not version]
    if json:
        facts = {"environment": dict(environment()), "not_installed": missing, "devices": devices}
        print(json_text(facts | {"why_not_fast": _hints()}))
        return
    _show_facts(environment(), missing)
    for device, found in devices.items():
        _show_device(device, found)


def _backends(device: str) -> dict[str, Any]:
    """{"ops": {op: {dtype: backend, "gradients": backend}}, "tables": {file: ops}, "reasons": [...]} of a device."""
    import torch

    import fastattn
    from fastattn.runtime.examples import examples

    reasons: dict[str, list[str]] = {}
    calls = {dtype: examples(getattr(torch, dtype), device) for dtype in _DTYPES}
    ops = {}
    for name in filter(fastattn.__all__.__contains__, calls[_DTYPES[0]]):
        served = [_served(name, calls[dtype][name]) for dtype in _DTYPES]
        ops[name] = dict(zip(_DTYPES, (text for text, _ in served), strict=True))
        ops[name]["gradients"] = _gradients(name, calls[_DTYPES[0]][name], device)
        for why in dict.fromkeys(why for _, why in served if why):
            reasons.setdefault(why, []).append(name)
    said = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    return {"ops": ops, "tables": _tables_in_use(device), "reasons": said}


def _show_facts(facts: list[tuple[str, str]], missing: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fastattn.cli._run import console

    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(escape(name), escape(value))
    console.print(grid)
    if missing:
        console.print(f"[dim]not installed:[/dim] {', '.join(missing)}")


def _show_device(device: str, found: dict[str, Any]) -> None:
    from rich.table import Table

    from fastattn.cli._run import console

    title = f"\nbackends on {device}"
    if console.width < NARROW:
        console.print(f"{title} (float32, bfloat16, float16; gradients)")
        for name, served in found["ops"].items():
            *kinds, gradients = served.values()
            one = kinds[0] if len(set(kinds)) == 1 else ", ".join(kinds)
            console.print(f"- {name}: {one}; {gradients}", markup=False)
    else:
        table = Table(title=title, title_justify="left")
        for column in ("op", *_DTYPES, "gradients"):
            table.add_column(column, overflow="fold")  # whole names on a narrow terminal
        for name, served in found["ops"].items():
            table.add_row(name, *served.values())
        console.print(table)
    console.print("tuned tables in use:" if found["tables"] else "tuned tables in use: none")
    for source, ops in found["tables"].items():
        console.print(f"  {source}: {', '.join(ops)}", markup=False)
    console.print("\n[bold]why something is not fast[/bold]")
    for line in (*_hints(), *found["reasons"]):
        console.print(f"- {line}", markup=False)


def _served(name: str, example: Example) -> tuple[str, str]:
    """(the table's cell, why the reference serves the call or "")."""
    import fastattn

    try:
        explanation = fastattn.explain(name, **example.arguments)
    except NotImplementedError:
        return "-", ""
    text = f"{explanation.backend} (tuned)" if os.path.exists(explanation.source) else explanation.backend
    if explanation.backend != "reference":
        return text, ""
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in explanation.ruled_out.items())
    return text, f"served by the reference, for {reasons}" if reasons else "only the reference serves it"


def _gradients(name: str, example: Example, device: str) -> str:
    """The first backend of the op's backward on a device: of `<op>_backward`, or of an op that is its own backward."""
    import fastattn
    from fastattn.runtime.registry import OPS

    if not example.gradients:
        return "-"
    op = fastattn.explain(name, **example.arguments).op
    backends = OPS.get(f"{op}_backward", OPS[op]).backends
    return next(b.name for b in backends if b.devices is None or device in b.devices)


def _tables_in_use(device: str) -> dict[str, list[str]]:
    """{file: the ops in it} of the tuned tables that serve a device, best first."""
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables

    target = _device.target(device)
    own = {str(source): list(table.get("ops", ())) for source, table in _tables.tables(target)}
    others = {
        f"{source} (another {target.arch} device)": list(table.get("ops", ()))
        for source, table in _tables.relatives(target)
    }
    return own | others


def _hints() -> list[str]:
    import torch

    import fastattn
    from fastattn.cli._environment import NO_KERNELS
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables
    from fastattn.runtime.native import cpu_isa

    target = _device.target("cpu")
    hints = []
    if torch.get_num_threads() < target.units:
        why = " (OMP_NUM_THREADS says so)" if os.environ.get("OMP_NUM_THREADS") else ""
        hints.append(f"torch uses {torch.get_num_threads()} of {target.units} cores{why}")
    if not fastattn.cpu_isas():
        hints.append(
            f"{NO_KERNELS}, and plain torch serves CPU tensors; Linux (x86-64, arm64) and macOS (arm64) have wheels with kernels, "
            "and `pip install .` in a clone compiles them"
        )
    elif cpu_isa() != fastattn.cpu_isas()[-1]:
        hints.append(f"the CPU kernels use {cpu_isa()}, though this machine runs {fastattn.cpu_isas()[-1]}")
    if os.environ.get("FASTATTN_BACKEND"):
        hints.append(f"FASTATTN_BACKEND={os.environ['FASTATTN_BACKEND']} rules out every other backend")
    if fastattn.cpu_isas() and not _tables.tables(target):
        used = (
            f"those of other {target.arch} processors are"
            if _tables.relatives(target)
            else "built-in tile sizes are"
        )
        hints.append(f"no tuned table for this processor: {used} used; `fastattn tune` makes one")
    if not torch.cuda.is_available():
        kind = (
            "torch is a CPU build"
            if torch.version.cuda is None and torch.version.hip is None
            else "none is visible"
        )
        hints.append(f"no GPU: {kind}")
    hints.append(busy(target.units))
    return list(filter(None, hints))
