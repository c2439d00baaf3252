"""One self-contained page about a tuning run: no network, no scripts, pictures inline."""

from __future__ import annotations

import itertools
import math
import platform
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from fastattn.autotune.space import Bucket
from fastattn.autotune.tuner import BucketResult, Run

from fastattn.runtime.files import write_text
from fastattn.runtime.pages import header, section, table
from fastattn.runtime.pages import page as whole_page
from fastattn.runtime.pages import text as _text
from fastattn.runtime.pictures import GOOD, INK, LINES, MUTED, figure, framed


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


def outcome(tuned: Sequence[BucketResult]) -> str:
    """What was gained over the defaults, plainly."""
    gains = sorted(1 / one.comparison.ratio for one in tuned if not one.kept)
    if not gains and len(tuned) == 1:
        return "The default was already the fastest of what was tried."
    if not gains:
        return f"The defaults were already the fastest of what was tried, in all {len(tuned)} buckets."
    extent = f"{gains[-1]:.2f}×" if len(gains) == 1 else f"{gains[0]:.2f}× to {gains[-1]:.2f}×"
    rest = len(tuned) - len(gains)
    others = f" In the other {rest} the default was already the fastest of what was tried." if rest else ""
    return (
        f"{len(gains)} of {len(tuned)} buckets became faster, by {extent}; geometric mean gain over all "
        f"{gain(tuned):.2f}×.{others}"
    )


def page(run: Run) -> str:
    tuned = [one for one in run.results if one.comparison is not None]
    changed = [one for one in tuned if not one.kept]
    evaluated = sum(len(one.trials) for one in run.results)
    units = "cores" if run.target.kind == "cpu" else "multiprocessors"
    pictures = []
    if changed:  # what a run of defaults alone would show are the measurement's own differences
        pictures = [
            section("Gain over the default", _bars(changed)),
            section("Convergence", _convergence(changed), _CONVERGENCE_NOTE),
        ]
        if any(one.importances for one in changed):
            pictures.append(section("Which parameter mattered", _importances(changed), _IMPORTANCE_NOTE))
    return whole_page(
        f"fastattn tune: {run.target.name}",
        header(
            "fastattn tune", f"{run.target.name}, {run.target.arch}, {run.target.units} {units}", _lead(tuned)
        ),
        *pictures,
        section("Every bucket", _outcomes(tuned), _BUCKET_NOTE) if tuned else "",
        section("Not tuned", _untuned(run)) if run.skipped or run.failures or _failed(run) else "",
        section("What was tried", _rejections(run, evaluated)),
        section("Environment", _environment(run)),
    )


def _lead(tuned: Sequence[BucketResult]) -> str:
    return outcome(tuned) if tuned else "Nothing was tuned."


_BUCKET_NOTE = (
    "A bucket is an op with its shapes, sizes rounded to powers of two. Times are the median of a race against the default, "
    "in turns; the default is kept unless the gain exceeds the spread."
)
_CONVERGENCE_NOTE = (
    "Best time so far over the default's, after each configuration that was measured in this run. These are first looks of a few "
    "rounds; the race of the best ones decides."
)
_IMPORTANCE_NOTE = "How much each parameter sets the fastest configurations apart from the rest (PED-ANOVA over all trials known, shares of 1)."


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
            f'<span class=won>{1 / compared.ratio:.2f}×</span>' if not one.kept else "default"
        )  # fmt: skip
        rows.append(
            [
                f"{_text(one.bucket.name)}<br><span class=note>{_text(words(one.bucket))}</span>",
                verdict,
                duration(compared.default_seconds),
                duration(compared.seconds),
                f"± {100 * compared.spread:.1f} %",
                f"<code>{_text(difference)}</code>"
                if difference
                else f"<span class=note>{_text(one.kept)}</span>",
            ]
        )
    return table(rows, ["bucket", "#gain", "#default", "#tuned", "#spread", "change"])


def words(bucket: Bucket) -> str:
    """A bucket's key for a reader: "float32, softmax, head dim 64, query length 512"."""
    fields = (*bucket.structural.items(), *bucket.sizes.items())
    return ", ".join(
        value if isinstance(value, str) else f"{_NAMES.get(name, name.replace('_', ' '))} {value}"
        for name, value in fields
    )


_NAMES = {"q_length": "query length", "k_length": "key length", "kv_heads": "key heads"}


def _rejections(run: Run, evaluated: int) -> str:
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
    text = (
        f"<p>{_count(evaluated, 'configuration')} measured in {run.seconds:.0f} s. {feasible} of {total} points of the search spaces "
        "are possible on this device; the others were never run.</p>"
    )
    if infeasible:
        rows = [[_text(reason), str(count)] for reason, count in infeasible.most_common(12)]
        text += table(rows, ["ruled out before running", "#points"])
    if not failed:
        return text + ("<p>Every configuration that ran gave the right result.</p>" if evaluated else "")
    rows = [
        [_text(reason), str(count), f"<code>{_text(examples[reason][:300])}</code>"]
        for reason, count in failed.most_common()
    ]
    return text + table(rows, ["failed when run", "#trials", "for example"])


def _failed(run: Run) -> list[BucketResult]:
    return [one for one in run.results if one.failure]


def _untuned(run: Run) -> str:
    rows = [[_text(name), "", _text(reason)] for name, reason in run.failures.items()]
    rows += [[_text(one.bucket.name), _text(words(one.bucket)), _text(one.failure)] for one in _failed(run)]
    rows += [[_text(one.name), _text(words(one)), "no time left"] for one in run.skipped]
    return table(rows, ["op", "bucket", "why"])


def _environment(run: Run) -> str:
    described = run.target.describe()
    bytes_ = ("l1", "l2", "l3", "shared", "memory")
    rows = [
        [name, _size(value) if name in bytes_ else _text(str(value))]
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
    return table(rows)


def _size(count: int) -> str:
    return f"{count >> 30} GiB" if count >> 30 else f"{count >> 10} KiB"


def _bars(changed: Sequence[BucketResult]) -> str:
    drawing, axes = figure(0.42 * len(changed) + 0.9, grid="x")
    order = sorted(changed, key=lambda one: -one.comparison.ratio)
    gains = [1 / one.comparison.ratio for one in order]
    errors = [one.comparison.spread * value for one, value in zip(order, gains, strict=True)]
    bars = axes.barh(
        range(len(order)),
        gains,
        0.6,
        color=GOOD,
        xerr=errors,
        error_kw={"lw": 1, "capsize": 2, "ecolor": INK},
    )
    axes.bar_label(bars, labels=[f"{value:.2f}×" for value in gains], padding=5, color=INK, fontsize=9)
    axes.axvline(1.0, color=MUTED, lw=1, ls="--")
    axes.set_yticks(range(len(order)), [_short(one) for one in order], fontsize=8)
    axes.set_xlim(0, 1.12 * max(map(sum, zip(gains, errors, strict=True))))
    axes.set_xlabel("default's time over tuned time (longer is better; the dashed line is the default)")
    return framed(drawing, "Gain of each bucket's tuned configuration over its default")


def _convergence(results: Sequence[BucketResult]) -> str:
    drawing, axes = figure(3.0)
    colours = itertools.cycle(LINES)
    for one in results:
        best, steps = math.inf, []
        for _, outcome in one.trials:
            best = min(best, outcome.ratio if outcome.ratio is not None else math.inf)
            steps.append(best)
        if any(map(math.isfinite, steps)):
            axes.step(
                range(1, len(steps) + 1), steps, where="post", lw=1.4, color=next(colours), label=_short(one)
            )
    axes.axhline(1.0, color=MUTED, lw=1, ls="--")
    axes.set_xlabel("configurations measured")
    axes.set_ylabel("best time / default's")
    if len(results) <= len(LINES):
        axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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
    axes.barh(range(len(labels)), [share for *_, share in labels], 0.7, color=GOOD)
    axes.set_yticks(range(len(labels)), [f"{op}  {name}" for op, name, _ in labels], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share")
    return framed(drawing, "Importance of each parameter")


def _short(one: BucketResult) -> str:
    """Two lines beside a bar: the op, and what tells its buckets apart."""
    return "\n".join((one.bucket.name, *textwrap.wrap(words(one.bucket), 46)[:2]))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
