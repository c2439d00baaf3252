"""What `fastattn tune` shows while it runs and when it is done."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastattn.autotune.report import duration, outcome
from fastattn.autotune.space import Bucket, Config
from fastattn.autotune.study import Outcome
from fastattn.autotune.tuner import BucketResult, Listener, Run
from fastattn.cli._console import join


class Progress(Listener):
    """A live line on a terminal; one line a bucket elsewhere."""

    def __init__(self, console: Console, started: float):
        self.console, self.run_started = console, started
        self.buckets = self.done = 0
        self.ends = math.inf  # of the run, monotonic
        self.counts: Counter[str] = Counter()
        self.result: BucketResult | None = None
        self.best = math.inf
        self.stage = "looking for what to tune"
        self._live = Live(get_renderable=self._line, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def budgeted(self, seconds: float) -> None:
        self.ends = self.run_started + seconds

    def planned(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = len(buckets)

    def started(self, result: BucketResult, seconds: float) -> None:
        self.result, self.best, self.stage = result, math.inf, "starting"

    def tried(self, result: BucketResult, config: Config, outcome: Outcome) -> None:
        self.stage = "exploring"
        self.counts[outcome.reason or "ok"] += 1
        if outcome.ratio is not None:
            self.best = min(self.best, outcome.ratio)

    def deciding(self, result: BucketResult) -> None:
        self.stage = "racing the best"

    def finished(self, result: BucketResult) -> None:
        self.done += 1
        name = f"{escape(result.bucket.name)} [dim]{escape(result.bucket.label())}[/dim]"
        if result.comparison is None:
            self.console.print(f"[yellow]✗[/yellow] {name} [yellow]{escape(result.failure)}[/yellow]")
        elif result.kept:
            self.console.print(f"· {name} default kept [dim]({escape(result.kept)})[/dim]")
        else:
            self.console.print(f"[green]✓[/green] {name} [green]{1 / result.comparison.ratio:.2f}×[/green]")

    def _line(self) -> Text:
        remaining = self.ends - time.monotonic()
        parts = [f"{max(0, remaining):.0f} s left" if math.isfinite(remaining) else "", self.stage]
        if self.result is not None:
            parts.insert(
                1, f"bucket {min(self.done + 1, self.buckets)}/{self.buckets} {self.result.bucket.name}"
            )
            if math.isfinite(self.best):
                parts.append(f"best {1 / self.best:.2f}× the default")
            counts = (f"{count} {reason}" for reason, count in self.counts.most_common())
            parts.append("tried: " + (", ".join(counts) or "none yet"))
        return Text(" · ".join(filter(None, parts)), no_wrap=True, overflow="ellipsis")


def summary(console: Console, run: Run, load: str = "") -> None:
    """Default against tuned for every bucket, and in a sentence what was gained. `load`: what was said of a busy machine before the run."""
    tuned = [result for result in run.results if result.comparison is not None]
    table = Table(
        title=f"{run.target.name}, {run.target.arch}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("op")
    table.add_column("bucket", style="dim", overflow="fold")
    for name in ("default", "tuned", "gain", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in tuned:
        compared = result.comparison
        table.add_row(
            escape(result.bucket.name),
            escape(result.bucket.label()),
            duration(compared.default_seconds),
            duration(compared.seconds),
            "default" if result.kept else f"{1 / compared.ratio:.2f}×",
            f"± {100 * compared.spread:.1f} %",
        )
    if tuned:
        console.print(table)
    for reason in dict.fromkeys(run.failures.values()):
        names = [name for name, other in run.failures.items() if other == reason]
        console.print(f"[yellow]not tuned: {escape(join(names))}: {escape(reason)}[/yellow]")
    if run.skipped and run.results:
        console.print(
            f"[yellow]{len(run.skipped)} buckets were not begun for want of time: give a longer --budget, or run it again[/yellow]"
        )
    elif run.skipped:
        console.print(
            f"[yellow]Nothing was tuned: starting up took {run.seconds:.0f} s, all of --budget. Give a minute or more.[/yellow]"
        )
    if load:
        console.print(
            f"[yellow]{load}: fewer buckets are reached, and small gains cannot be told from noise[/yellow]"
        )
    trials = sum(len(result.trials) for result in run.results)
    known = sum(result.inherited for result in run.results)
    rejected = sum((result.rejected for result in run.results), Counter())
    reasons = "".join(f", {count} {reason}" for reason, count in rejected.most_common())
    earlier = f" ({known} more known from before)" if known else ""
    console.print(f"{trials} configurations tried{earlier}{reasons} in {run.seconds:.0f} s")
    if tuned:
        console.print(f"[bold]{outcome(tuned)}[/bold]")
        console.print(f"table: {escape(run.path)}", soft_wrap=True)
