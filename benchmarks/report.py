"""Results as a table on screen, as JSON and as a picture."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import limits as limits_module
from benchmarks.registry import DTYPE_NAMES, OWN
from benchmarks.runner import Result, Timing

MET = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}


def environment(device: str = "cpu") -> dict[str, object]:
    """Everything a reader needs to judge the figures, nothing about whose machine it was."""
    import fastattn
    from fastattn.runtime import device as _device

    target = _device.target(device)
    on_gpu = {
        "target": target.describe(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
    }
    on_cpu = {
        "isas": list(fastattn.cpu_isas()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return {
        "device": target.name,
        **(on_cpu if target.kind == "cpu" else on_gpu),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _commit() -> str:
    """Of what is measured: results and pages, which the measurements change, do not make it dirty."""

    def git(*command: str) -> str:
        where = ["git", "-C", str(Path(__file__).parents[1])]
        return subprocess.run([*where, *command], capture_output=True, text=True, check=False).stdout.strip()

    with contextlib.suppress(OSError):
        others = ("--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
        changed = git("status", "--porcelain", "--untracked-files=no", *others)
        commit = git("rev-parse", "--short", "HEAD")
        return commit + "-dirty" if commit and changed else commit
    return ""


def print_limits(console: Console, limits: Mapping[str, float]) -> None:
    table = Table("limit", "measured", title="this machine")
    for name, value in limits.items():
        table.add_row(name, f"{value:.3g} {limits_module.unit(name)}")
    console.print(table)


def milliseconds(t: Timing) -> str:
    return f"{t.median * 1e3:.3g} ms"


def add_row(table: Table, result: Result) -> None:
    name = result.case.name
    missing = [f"[dim]{peer}: {why}[/]" for peer, why in result.not_run.items() if peer != OWN]
    if not result.correct:
        colour = "red" if result.wrong else "yellow"
        table.add_row(name, f"[{colour}]{result.error}[/]", "", "", "\n".join(missing), "")
        return
    own = result.times[OWN]
    rate = ""
    if result.flops:
        rate = f"{result.flops / own.median / 1e9:.0f} GFLOP/s"
    elif result.bytes:
        rate = f"{result.bytes / own.median / 1e9:.1f} GB/s"
    share = f"{result.share:.0%} of {result.limit}" if result.share is not None else ""
    against = [
        f"{ratio.median:.2f}x {peer} [dim]({ratio.low:.2f}-{ratio.high:.2f},"
        f" {milliseconds(result.times[peer])})[/]"
        for peer, ratio in result.ratios.items()
    ]
    bars = [f"{bar}: {MET[result.bar_met(bar)]}" for bar in result.case.bars]
    table.add_row(name, milliseconds(own), rate, share, "\n".join(against + missing), "\n".join(bars))


def table(group: str, results: Sequence[Result]) -> Table:
    made = Table(
        "case", "time", "rate", "share", "against (10-90 % of rounds)", "bar", title=group, show_lines=True
    )
    for result in results:
        add_row(made, result)
    return made


def as_json(group: str, env: Mapping, limits: Mapping[str, float], results: Sequence[Result]) -> dict:
    def timing(t: Timing, factor: float = 1.0) -> dict:
        return {
            "median": _round(t.median * factor),
            "low": _round(t.low * factor),
            "high": _round(t.high * factor),
        }

    rows = []
    for r in results:
        row: dict[str, object] = {
            "name": r.case.name,
            "op": r.case.op,
            "shape": {k: str(v) if not isinstance(v, (int, float)) else v for k, v in r.case.shape.items()},
            "dtype": DTYPE_NAMES[r.case.dtype],
            "direction": r.case.direction,
            "correct": r.correct,
            "measured": when(env),
        }
        if r.correct:
            row["rounds"] = r.rounds
            row["milliseconds"] = {name: timing(t, 1e3) for name, t in r.times.items()}
            row["ratios"] = {name: timing(t) for name, t in r.ratios.items()}
            if r.flops:
                row["gflops"] = _round(r.flops / r.times[OWN].median / 1e9)
            if r.bytes:
                row["gbytes"] = _round(r.bytes / r.times[OWN].median / 1e9)
            if r.share is not None:
                row["share"] = {"of": r.limit, "value": _round(r.share)}
            row["bars"] = [
                {"bar": str(bar), "value": _round(r.bar_value(bar)), "met": r.bar_met(bar)}
                for bar in r.case.bars
            ]
        else:
            row["error"] = r.error
        if r.not_run:
            row["not_run"] = r.not_run
        rows.append(row)
    return {
        "group": group,
        "environment": dict(env),
        "limits": {name: _round(value) for name, value in limits.items()},
        "results": rows,
    }


def joined(path: Path, data: dict) -> dict:
    """`data` and the rows that the file at `path` has besides, each with the date and commit it was measured at."""
    if not path.exists():
        return data
    earlier = json.loads(path.read_text())
    names = {row["name"] for row in data["results"]}
    others = [row for row in earlier["results"] if row["name"] not in names]
    others = [{"measured": when(earlier["environment"])} | row for row in others]
    return data | {"results": data["results"] + others}


def when(env: Mapping) -> dict[str, object]:
    return {key: env[key] for key in ("date", "commit", "load") if key in env}


def _round(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def write_json(path: Path, data: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)


def write_picture(path: Path, group: str, results: Sequence[Result], limits: Mapping[str, float]) -> bool:
    """Rate against length for rows with a series, one panel a series; bars of the ratios where there is none.

    False where matplotlib is not installed or nothing was measured.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    measured = [r for r in results if r.correct]
    if not measured:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[Result]] = {}
    for r in measured:
        if r.case.series and r.flops:
            series.setdefault(r.case.series, []).append(r)
    if series:
        columns = min(3, len(series))
        rows = -(-len(series) // columns)
        figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
        for axis in axes.flat[len(series) :]:
            axis.set_visible(False)
        for axis, (title, members) in zip(axes.flat, series.items(), strict=False):
            _rate_against_length(axis, title, sorted(members, key=lambda r: r.case.shape["L"]), limits)
    else:
        figure, axis = pyplot.subplots(figsize=(9, 1 + 0.5 * len(measured)))
        _ratio_bars(axis, measured)
    figure.suptitle(f"fastattn benchmarks: {group}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _rate_against_length(axis, title: str, members: Sequence[Result], limits: Mapping[str, float]) -> None:
    names = list(dict.fromkeys(name for r in members for name in r.times))
    for name in names:
        points = [
            (r.case.shape["L"], r.flops / r.times[name].median / 1e9) for r in members if name in r.times
        ]
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2 if name == OWN else 1, label=name)
    if members[0].limit in limits:
        axis.axhline(limits[members[0].limit], color="black", linestyle="--", linewidth=1)
        axis.annotate(f"measured {members[0].limit} peak", (0.02, limits[members[0].limit]),
                      xycoords=("axes fraction", "data"), va="bottom", fontsize=8)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("length")
    axis.set_ylabel("GFLOP/s")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)


def _ratio_bars(axis, measured: Sequence[Result]) -> None:
    rows = [(r.case.name, name, ratio.median) for r in measured for name, ratio in r.ratios.items()]
    axis.barh([f"{case}\nagainst {peer}" for case, peer, _ in rows], [ratio for *_, ratio in rows])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlabel("times as fast")
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
