"""One self-contained page about a tuning run: no network, no scripts, pictures inline."""

from __future__ import annotations

import html
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from fastattn.autotune.tuner import BucketResult, Run

from fastattn.runtime.files import write_text
from fastattn.runtime.pictures import figure, framed

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.lead { font-size: 1.1rem } .note { color: #5b6675 } figure { margin: 0 } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #dfe4ea; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { font-size: .92em; overflow-wrap: anywhere }
.won { color: #0b6e4f; font-weight: 600 }
"""
_TUNED, _DEFAULT = "#0b6e4f", "#9aa5b1"


def gain(results: Iterable[BucketResult]) -> float:
    """Geometric mean over buckets of default time / tuned time; 1 for a bucket that keeps its default."""
    ratios = [1.0 if one.kept else one.comparison.ratio for one in results if one.comparison is not None]
    return math.exp(-sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0


def duration(seconds: float) -> str:
    """A time with three digits and the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def write(run: Run, path: Path) -> None:
    """Write the page about a run."""
    write_text(path, page(run))


def page(run: Run) -> str:
    tuned = [one for one in run.results if one.comparison is not None]
    changed = [one for one in tuned if not one.kept]
    evaluated = sum(len(one.trials) for one in run.results)
    lead = (
        f"{_count(len(tuned), 'bucket')} tuned in {run.seconds:.0f} s with "
        f"{_count(evaluated, 'configuration')} measured: {len(changed)} changed from the default, "
        f"geometric mean gain {gain(tuned):.2f}×."
    )
    sections = [
        f"<h1>fastattn tune</h1><p class=note>{_text(run.target.name)}, {_text(run.target.arch)}, "
        f"{run.target.units} {'cores' if run.target.kind == 'cpu' else 'multiprocessors'}</p>"
        f"<p class=lead>{lead}</p>",
        _section("Default against tuned", _bars(tuned), _outcomes(tuned)) if tuned else "",
        _section("Convergence", _convergence(run.results), _CONVERGENCE_NOTE) if evaluated else "",
        _section("Which parameter mattered", _importances(tuned), _IMPORTANCE_NOTE)
        if any(one.importances for one in tuned)
        else "",
        _section("What was ruled out", _rejections(run)),
        _section("Not tuned", _untuned(run)) if run.skipped or run.failures or _failed(run) else "",
        _section("Environment", _environment(run)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastattn tune: {_text(run.target.name)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )


_CONVERGENCE_NOTE = (
    "<p class=note>Best time so far over the default's, after each configuration that was measured in this "
    "run. First looks of a few rounds: the race of the finalists above decides, not these.</p>"
)
_IMPORTANCE_NOTE = (
    "<p class=note>How much each parameter sets the fastest configurations apart from the rest "
    "(PED-ANOVA over all trials known, shares of 1).</p>"
)


def _outcomes(tuned: Sequence[BucketResult]) -> str:
    rows = []
    for one in tuned:
        difference = ", ".join(
            f"{name} {one.default[name]} → {value}"
            for name, value in one.config.items()
            if value != one.default[name]
        )
        compared = one.comparison
        verdict = (
            f'<span class=won>{1 / compared.ratio:.2f}×</span>' if not one.kept else "default kept"
        )  # fmt: skip
        rows.append(
            [
                f"{_text(one.bucket.name)}<br><span class=note>{_text(one.bucket.label())}</span>",
                duration(compared.default_seconds),
                duration(compared.seconds),
                f"± {100 * compared.spread:.1f} %",
                verdict,
                f"<code>{_text(difference)}</code>"
                if difference
                else f"<span class=note>{_text(one.kept)}</span>",
            ]
        )
    head = ["bucket", "#default", "#tuned", "#spread", "#gain", "change"]
    return _table(head, rows)


def _rejections(run: Run) -> str:
    infeasible: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for one in run.results:
        infeasible.update({f"{one.bucket.name}: {reason}": n for reason, n in one.refused.items()})
        failed.update(one.rejected)
        for config, outcome in one.trials:
            if outcome.ratio is None and outcome.reason not in examples:
                shown = ", ".join(f"{name}={value}" for name, value in config.items())
                examples[outcome.reason] = f"{one.bucket.name} {shown}: {outcome.detail}"
    total, feasible = (sum(getattr(one, name) for one in run.results) for name in ("total", "feasible"))
    text = f"<p>{feasible} of {total} points were feasible on this device; the others were never run.</p>"
    if infeasible:
        rows = [[_text(reason), str(count)] for reason, count in infeasible.most_common(12)]
        text += _table(["ruled out before running", "#points"], rows)
    if not failed:
        return text + "<p>Every configuration that ran gave the right result.</p>"
    rows = [
        [_text(reason), str(count), f"<code>{_text(examples[reason][:300])}</code>"]
        for reason, count in failed.most_common()
    ]
    return text + _table(["failed when run", "#trials", "for example"], rows)


def _failed(run: Run) -> list[BucketResult]:
    return [one for one in run.results if one.failure]


def _untuned(run: Run) -> str:
    rows = [[_text(name), "", _text(reason)] for name, reason in run.failures.items()]
    rows += [[_text(one.bucket.name), _text(one.bucket.label()), _text(one.failure)] for one in _failed(run)]
    rows += [[_text(one.name), _text(one.label()), "no time left"] for one in run.skipped]
    return _table(["op", "bucket", "why"], rows)


def _environment(run: Run) -> str:
    described = run.target.describe()
    bytes_ = ("l1", "l2", "l3", "shared", "memory")
    rows = [
        [name, f"{value >> 10} KiB" if name in bytes_ else _text(str(value))]
        for name, value in described.items()
        if value
    ]
    rows += [[_text(name), _text(version)] for name, version in sorted(run.versions.items())]
    rows += [
        ["python", platform.python_version()],
        ["system", _text(platform.platform())],
        ["table", f"<code>{_text(run.path)}</code>"],
        ["trials", f"<code>{_text(run.storage)}</code>"],
        ["written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")],
    ]
    return _table(["", ""], rows)


def _bars(tuned: Sequence[BucketResult]) -> str:
    drawing, axes = figure(0.34 * len(tuned) + 1.0, grid="x")
    order = list(reversed(tuned))
    for place, one in enumerate(order):
        ratio = 1.0 if one.kept else one.comparison.ratio
        axes.barh(place + 0.19, 1.0, 0.34, color=_DEFAULT, label="default" if place == 0 else None)
        axes.barh(
            place - 0.19,
            ratio,
            0.34,
            color=_TUNED,
            xerr=0 if one.kept else one.comparison.spread,
            error_kw={"lw": 1, "capsize": 2, "ecolor": "#1c2430"},
            label="tuned" if place == 0 else None,
        )
    axes.set_yticks(range(len(order)), [_short(one) for one in order], fontsize=7.5)
    axes.set_xlabel("time over the default's (shorter is faster)")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return framed(drawing, "Time of each bucket's tuned configuration over its default's")


def _convergence(results: Sequence[BucketResult]) -> str:
    drawing, axes = figure(3.0)
    for one in results:
        best, steps = math.inf, []
        for _, outcome in one.trials:
            best = min(best, outcome.ratio if outcome.ratio is not None else math.inf)
            steps.append(best)
        if any(map(math.isfinite, steps)):
            axes.step(range(1, len(steps) + 1), steps, where="post", lw=1.4, alpha=0.85, label=_short(one))
    axes.axhline(1.0, color=_DEFAULT, lw=1, ls="--")
    axes.set_xlabel("configurations measured")
    axes.set_ylabel("best time / default's")
    if len(results) <= 12:
        axes.legend(frameon=False, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return framed(drawing, "Best time so far against the number of configurations measured")


def _importances(tuned: Sequence[BucketResult]) -> str:
    """One row an op: its parameters' shares, averaged over its buckets."""
    shares: dict[str, dict[str, list[float]]] = {}
    for one in tuned:
        for name, share in one.importances.items():
            shares.setdefault(one.bucket.name, {}).setdefault(name, []).append(share)
    labels = [(op, name, sum(one) / len(one)) for op, names in shares.items() for name, one in names.items()]
    labels.sort(key=lambda row: (row[0], row[2]))
    drawing, axes = figure(0.26 * len(labels) + 0.8, grid="x")
    axes.barh(range(len(labels)), [share for *_, share in labels], 0.7, color=_TUNED)
    axes.set_yticks(range(len(labels)), [f"{op}  {name}" for op, name, _ in labels], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share")
    return framed(drawing, "Importance of each parameter")


def _short(one: BucketResult) -> str:
    values = (*one.bucket.structural.values(), *one.bucket.sizes.values())
    return f"{one.bucket.name} {' '.join(map(str, values))}"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{title}</h2>" + "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows are HTML; a column whose head starts with # holds numbers."""
    kinds = [" class=number" if name.startswith("#") else "" for name in head]
    top = "".join(f"<th{kind}>{name.lstrip('#')}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _text(value: str) -> str:
    return html.escape(str(value))
