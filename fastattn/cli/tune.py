"""`fastattn tune`: find this device's configurations."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn.cli._console import busy, make_console


def register(app: typer.Typer) -> None:
    app.command()(tune)


def seconds_of(text: str) -> float:
    """A budget such as 90, 90s, 5m or 1.5h in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"tune: budget is {text!r}, expected a time such as 60s, 5m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def fields_of(text: str, where: str = "tune: shapes are") -> dict[str, Any]:
    """Fields such as "length=4096 dtype=bfloat16 causal=true" of one call."""
    fields: dict[str, Any] = {}
    for part in re.split(r"[\s,]+", text.strip()):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{where} {text!r}, expected fields such as length=4096,heads=8")
        if value.lower() in ("true", "false"):
            fields[name] = value.lower() == "true"
        else:
            fields[name] = int(value) if re.fullmatch(r"-?\d+", value) else value
    return fields


def _option(text: str) -> Any:
    return typer.Option(help=text)


def tune(
    ops: Annotated[str, _option("Ops, separated by commas (attention, attention.cpu). Default: all.")] = "",
    shapes: Annotated[
        list[str] | None, _option("Fields of a call to tune for: length=4096,heads=8. May be repeated.")
    ] = None,
    budget: Annotated[
        str, _option("Time for the whole run: 60s, 10m, 1.5h. Default: that of --effort.")
    ] = "",
    effort: Annotated[str, _option("quick (within a minute) or full (more shapes, half an hour).")] = "quick",
    storage: Annotated[
        str,
        _option(
            "Where trials are kept, to share them between machines: journal:PATH, grpc://HOST:PORT, or a database."
        ),
    ] = "",
    device: Annotated[str, _option("cpu, cuda or cuda:1.")] = "cpu",
    report: Annotated[Path | None, _option("Write a page about the run to this HTML file.")] = None,
    seed: Annotated[int, _option("Seed of the search.")] = 0,
    threads: Annotated[int | None, _option("CPU threads of timed calls. Default: torch's.")] = None,
) -> None:
    """Find this device's fastest kernel configurations and keep them in your table.

    A candidate is checked against the reference before it is timed, and replaces the default only where it is
    faster by more than the measurement's spread. Run it again to go on where the last run ended.
    """
    started = time.monotonic()
    given = [fields_of(text) for text in shapes or ()]
    seconds = seconds_of(budget) if budget else None
    wanted = [op for op in re.split(r"[\s,]+", ops) if op]
    if threads is not None and threads < 1:
        raise ValueError(f"tune: threads is {threads}, expected 1 or more")
    for extra in ("optuna", "matplotlib"):  # told before a minute's work rather than after
        if importlib.util.find_spec(extra) is None and (extra == "optuna" or report is not None):
            raise ModuleNotFoundError(f"tune: {extra} is not installed: pip install 'fastattn[tune]'")
    console = make_console(soft_wrap=False)
    with console.status("starting"):
        from fastattn.autotune import tuner
        from fastattn.runtime import device as _device

        _device.present(device, "tune")
        load = busy(os.cpu_count() or 1)  # before the run itself is the load
        from ._tune_progress import Progress, summary
    with Progress(console, started) as progress:
        run = tuner.tune(
            ops=wanted,
            shapes=given,
            budget=seconds,
            effort=effort,
            storage=storage,
            device=device,
            seed=seed,
            threads=threads,
            listener=progress,
            started=started,
        )
    summary(console, run, load)
    if report is not None:
        from fastattn.autotune.report import write

        write(run, report)
        console.print(f"report: {report}")
    if not any(result.comparison is not None for result in run.results):
        raise typer.Exit(1)
