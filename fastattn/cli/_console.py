"""The terminal: one way to write to it, wide or narrow, and into a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console

_PIPE = 400  # columns where nobody looks: no cell wraps
NARROW = 72  # below it a table of four columns breaks its words


def make_console(**options: object) -> Console:
    """A console that breaks no line in a pipe or a file; COLUMNS sets another width."""
    console = Console(**{"highlight": False, "soft_wrap": True, **options})
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE
    return console


def flag(name: str, help: str, **options: object) -> Any:
    """A typer option that is there or not, without `<bool>` in the help."""
    import typer

    return typer.Option(name, help=help, metavar="", **options)


def busy(cores: int) -> str:
    """What to say where other work takes the cores, else ""."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"the machine is busy: load {load:.1f} on {cores} cores" if load > 1.5 * cores else ""


def json_text(value: object) -> str:
    """JSON for `--json`: indented, any name as it is."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)


def join(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
