"""`fastattn doctor`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fastattn.runtime.examples import Example

_DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Show the device, the versions, which backend serves each op, the tuned tables in use, and what is slow.

    Nothing is run or changed: each op is only asked which kernel it would take.
    """
    import torch
    from rich.table import Table

    import fastattn
    from fastattn.cli._environment import environment, versions
    from fastattn.cli._run import console
    from fastattn.runtime.examples import examples

    facts = Table.grid(padding=(0, 3))
    for name, value in environment():
        facts.add_row(f"[dim]{name}[/dim]", value)
    console.print(facts)
    missing = [name for name, version in versions() if not version]
    if missing:
        console.print(f"[dim]not installed:[/dim] {', '.join(missing)}")

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        table = Table(title=f"\nbackends on {device}", title_justify="left")
        for column in ("op", *_DTYPES, "gradients"):
            table.add_column(column, overflow="fold")  # whole names on a narrow terminal
        reasons: dict[str, list[str]] = {}
        calls = {dtype: examples(getattr(torch, dtype), device) for dtype in _DTYPES}
        for name in filter(fastattn.__all__.__contains__, calls[_DTYPES[0]]):
            served = [_served(name, calls[dtype][name]) for dtype in _DTYPES]
            table.add_row(
                name, *(text for text, _ in served), _gradients(name, calls[_DTYPES[0]][name], device)
            )
            for why in dict.fromkeys(why for _, why in served if why):
                reasons.setdefault(why, []).append(name)
        console.print(table)
        _print_tables(console, device)
        console.print("\n[bold]why something is not fast[/bold]")
        for line in [*_hints(), *(f"{', '.join(names)}: {why}" for why, names in reasons.items())]:
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


def _print_tables(console: Any, device: str) -> None:
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables

    target = _device.target(device)
    tables = _tables.tables(target)
    relatives = [(f"{source} (another {target.arch} device)", t) for source, t in _tables.relatives(target)]
    console.print("tuned tables in use:" if tables or relatives else "tuned tables in use: none")
    for source, table in (*tables, *relatives):
        console.print(f"  {source}: {', '.join(table.get('ops', ()))}", markup=False)


def _hints() -> list[str]:
    import torch

    import fastattn
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables
    from fastattn.runtime.native import cpu_isa

    target = _device.target("cpu")
    hints = []
    if torch.get_num_threads() < target.units:
        why = " (OMP_NUM_THREADS says so)" if os.environ.get("OMP_NUM_THREADS") else ""
        hints.append(f"torch uses {torch.get_num_threads()} of {target.units} cores{why}")
    if cpu_isa() != fastattn.cpu_isas()[-1]:
        hints.append(f"the CPU kernels use {cpu_isa()}, though this machine runs {fastattn.cpu_isas()[-1]}")
    if os.environ.get("FASTATTN_BACKEND"):
        hints.append(f"FASTATTN_BACKEND={os.environ['FASTATTN_BACKEND']} rules out every other backend")
    if not _tables.tables(target):
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
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * target.units:
        hints.append(f"the machine is busy: load {load:.1f} on {target.units} cores")
    return hints
