"""The page a training run leaves: one HTML file with its pictures inside, readable without a network."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.runtime import files, pages
from fastattn.runtime.pages import section as _section
from fastattn.runtime.pictures import ACCENT, GRID, INK, MUTED, PALE, WARM, figure, framed

if TYPE_CHECKING:
    from .puzzles import Shown


@dataclass(frozen=True)
class OpTime:
    """Time spent in one op itself, not in what it calls."""

    name: str  # as torch's profiler has it: aten::mm, fastattn::attention_forward
    seconds: float
    calls: int

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastattn::")


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, what the model said, and what the documentation says."""

    prompt: str
    said: str
    documented: str


@dataclass(frozen=True)
class Report:
    """What the page shows.

    history: rows with step, loss, tokens, seconds and, for HRM-Text, bp_steps; rows of an evaluation have held_out, or
    cells and exact, instead. guesses: shares of the cells that guessing gets right, by how it guesses. boards: one puzzle
    as it is solved. step_times: seconds of one step by each way to compute it.
    """

    title: str
    summary: str
    history: Sequence[dict[str, Any]]
    answers: Sequence[Answer] = ()
    op_times: Sequence[OpTime] = ()
    environment: Sequence[tuple[str, str]] = ()
    notes: Sequence[tuple[str, str]] = field(default=())  # (figure, what it counts), shown large at the top
    guesses: Mapping[str, float] = field(default_factory=dict)
    boards: "Sequence[Shown]" = ()
    step_times: Mapping[str, float] = field(default_factory=dict)


def write(path: str | os.PathLike, report: Report) -> Path:
    """Writes the page, whole or not at all, and returns its path. Needs matplotlib."""
    parts = [pages.header(report.title, report.summary), pages.tiles(report.notes)]
    steps = [row for row in report.history if "loss" in row]
    if any("exact" in row for row in report.history):
        drawing = accuracy_picture(report.history, report.guesses)
        parts.append(_section("Accuracy", framed(drawing, "Held-out accuracy by minutes"), _ACCURACY_TEXT))
    if report.boards:
        parts.append(_section("A held-out puzzle, segment by segment", _boards(report.boards), _BOARDS_TEXT))
    if steps:
        scheduled = "bp_steps" in steps[0]
        parts.append(
            _section("Loss", _loss_picture(report.history), _LOSS_TEXT if scheduled else _PUZZLE_LOSS_TEXT)
        )
        parts.append(
            _section("Speed", _speed_picture(steps), _SPEED_TEXT + (_SCHEDULE_TEXT if scheduled else ""))
        )
    if report.step_times:
        parts.append(_section("This step, three ways", _step_picture(report.step_times), _STEP_TEXT))
    if report.op_times:
        parts.append(_section("Where the time went", _op_picture(report.op_times), _OPS_TEXT))
    if report.answers:
        parts.append(_section("Answers to held-out prompts", _answers(report.answers), _ANSWERS_TEXT))
    if report.environment:
        parts.append(_section("Environment", _table(report.environment)))
    files.write_text(path, pages.page(report.title, *parts))
    return Path(path)


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out


_LOSS_TEXT = (
    "Cross-entropy in nats per response token; lower is better. The thin line is each step's batch, the thick "
    "one its moving average, the points the held-out examples under the averaged weights. The dashed line is "
    "where the untrained model stood."
)
_PUZZLE_LOSS_TEXT = (
    "StableMax cross-entropy in nats per cell, givens included, and half the loss of the halting value. The thin line is "
    "each step's batch, the thick one its moving average."
)
_SPEED_TEXT = "Tokens through forward, backward and optimizer step in a second."
_SCHEDULE_TEXT = (
    " The step-like fall in the first fifth is warm-up deep credit assignment: gradients reach further and further back "
    "through the recurrence."
)
_ACCURACY_TEXT = (
    "On held-out puzzles, under the averaged weights and after 16 segments. Copying the givens gets no blank cell right; "
    "the dashed lines are what guessing gets."
)
_BOARDS_TEXT = (
    "The model fills in the whole board after each segment; segments that change nothing are left out. Bold: given. Green: right. "
    "Red and struck through: wrong. Sure: how sure the model is that all of it is right."
)
_STEP_TEXT = (
    "One training step of this model on this machine, the median of a few in turns: the model's parts in plain torch with attention "
    "as products and a softmax, the same with torch's scaled_dot_product_attention (SDPA), and fastattn. Shorter is faster."
)
_OPS_TEXT = (
    "Self time of each op over a few training steps, from torch's profiler. Dark bars are fastattn's own ops."
)
_ANSWERS_TEXT = (
    "None of these objects was trained on. A model this small, trained for minutes, knows the shape of an "
    "answer and guesses the rest from the name."
)


def accuracy_picture(history: Sequence[dict[str, Any]], guesses: Mapping[str, float]):
    """A figure: puzzles solved and blank cells right over minutes of training, evaluations left out."""
    drawing, axes = figure(3.4)
    seconds, points = 0.0, []
    for row in history:
        if "loss" in row:
            seconds += row["seconds"]
        elif "exact" in row:
            points.append((seconds / 60, 100 * row["cells"], 100 * row["exact"]))
    minutes, cells, exact = zip(*points, strict=True)
    axes.plot(minutes, exact, "o-", color=ACCENT, linewidth=2.0, markersize=3, label="puzzles solved")
    axes.plot(minutes, cells, "o-", color=WARM, linewidth=1.2, markersize=3, label="blank cells right")
    for name, share in guesses.items():
        axes.axhline(100 * share, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
        axes.annotate(
            f"guessing {name}", (1, 100 * share), (-2, 3), ("axes fraction", "data"), "offset points", color=MUTED,
            fontsize=8, ha="right",
        )  # fmt: skip
    axes.set_ylim(0, 102)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("%")
    axes.legend(frameon=False, labelcolor=INK, loc="best")
    return drawing


def _loss_picture(history: Sequence[dict[str, Any]]) -> str:
    steps = [row for row in history if "loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in history if "held_out" in row]
    drawing, axes = figure(3.4)
    x = [row["step"] for row in steps]
    losses = [row["loss"] for row in steps]
    axes.plot(x, losses, color=PALE, linewidth=0.7, label="training batch")
    axes.plot(x, smoothed(losses), color=ACCENT, linewidth=2.0, label="moving average")
    if held_out:
        axes.axhline(held_out[0][1], color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
        axes.plot(
            *zip(*held_out, strict=True), "o-", color=WARM, linewidth=1.2, markersize=4, label="held out"
        )
        last_step, last = held_out[-1]
        axes.annotate(f"{last:.2f}", (last_step, last), (6, 4), textcoords="offset points", color=WARM)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, labelcolor=INK)
    return framed(drawing, "Loss by training step")


def _speed_picture(steps: Sequence[dict[str, Any]]) -> str:
    drawing, axes = figure(2.6)
    x = [row["step"] for row in steps]
    speeds = [row["tokens"] / row["seconds"] for row in steps]
    axes.plot(x, speeds, color=PALE, linewidth=0.7)
    axes.plot(x, smoothed(speeds), color=ACCENT, linewidth=2.0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens / s")
    return framed(drawing, "Tokens per second by training step")


def _step_picture(times: Mapping[str, float]) -> str:
    ranked = sorted(times.items(), key=lambda row: -row[1])
    drawing, axes = figure(0.5 + 0.42 * len(ranked), grid="x")
    fastest = min(times.values())
    names, seconds = zip(*reversed(ranked), strict=True)
    milliseconds = [1e3 * one for one in seconds]
    colors = [ACCENT if name == "fastattn" else PALE for name in names]
    bars = axes.barh(names, milliseconds, color=colors, height=0.66)
    labels = [
        f"{one:.0f} ms" + (f" ({one / 1e3 / fastest:.2f}×)" if one / 1e3 > fastest else "")
        for one in milliseconds
    ]
    axes.bar_label(bars, labels=labels, padding=4, color=INK, fontsize=9)
    axes.set_xlim(0, 1.22 * max(milliseconds))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    return framed(drawing, "Time of one training step by plain torch, torch with SDPA, and fastattn")


def _op_picture(times: Sequence[OpTime], shown: int = 12) -> str:
    total = sum(t.seconds for t in times)
    ranked = sorted(times, key=lambda t: t.seconds, reverse=True)
    rows = [(t.name, t.seconds / total, ACCENT if t.ours else PALE) for t in ranked[:shown]]
    rest = sum(t.seconds for t in ranked[shown:]) / total
    if rest:
        rows.append((f"{len(ranked) - shown} others", rest, GRID))
    names, shares, colors = zip(*reversed(rows), strict=True)
    drawing, axes = figure(0.5 + 0.29 * len(rows))
    bars = axes.barh(names, [100 * share for share in shares], color=colors, height=0.72)
    axes.bar_label(
        bars, labels=[f"{100 * share:.1f} %" for share in shares], padding=4, color=INK, fontsize=9
    )
    axes.set_xlim(0, 112 * max(shares))
    axes.xaxis.set_visible(False)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return framed(drawing, "Share of time by op")


def _boards(steps: "Sequence[Shown]") -> str:
    drawn = (
        f"<figure><figcaption>{pages.text(step.title)}</figcaption>{_board(step)}</figure>" for step in steps
    )
    return f'<div class="boards">{"".join(drawn)}</div>'


def _board(step: "Shown") -> str:
    """A board as a table with lines around its boxes: givens dark, right digits green, wrong ones red and struck through."""
    side = len(step.board)
    box = round(side**0.5)
    rows = []
    for r in range(side):
        cells = []
        for c in range(side):
            digit, given = int(step.board[r, c]), step.puzzle[r, c] != 0
            kind = "given" if given else "right" if digit == step.solution[r, c] else "wrong"
            edges = (" first-row" if r % box == 0 and r else "") + (
                " first-column" if c % box == 0 and c else ""
            )
            mark = "" if digit == 0 else f"<s>{digit}</s>" if kind == "wrong" else str(digit)
            cells.append(f'<td class="{kind}{edges}">{mark}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="board">{"".join(rows)}</table>'


def _answers(answers: Sequence[Answer]) -> str:
    rows = [
        [pages.text(a.prompt), f"<span class=said>{pages.text(a.said)}</span>", pages.text(a.documented)]
        for a in answers
    ]
    return pages.table(rows, ["prompt", "the model", "the documentation"])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return pages.table([[pages.text(cell) for cell in row] for row in rows])
