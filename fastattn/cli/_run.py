"""What `train` and `demo` share: starting a run, its progress on the screen, its end."""

import contextlib
import math
import signal
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn

from fastattn.cli._console import make_console
from fastattn.runtime import files

if TYPE_CHECKING:
    from fastattn.models import HrmText, HrmTextConfig
    from fastattn.train.data.jsonl import Example
    from fastattn.train.data.tokenizer import Sample, Tokenizer
    from fastattn.train.report import Answer
    from fastattn.train.run import Run
    from fastattn.train.text import TrainConfig, Trainer

console = make_console()

# The model `train` makes when no --config is given: two stacks of one block, called eight times a token.
SMALL_MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
}


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C (or SIGTERM) came; a second one interrupts at once.

    A step that is under way ends first, so that what is saved can be resumed exactly.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        console.print("stopping after this step; once more to stop at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quantised(codebook_size: int) -> dict[str, Any]:
    """HrmTextConfig keys of `--head vq`."""
    return {"head": "vq", "codebook_size": codebook_size, "codebook_assignment": "straight_through"}


def model_config(path: Path | None, vocab_size: int, **changes: Any) -> "HrmTextConfig":
    """The model of a new run: SMALL_MODEL, or what the JSON file says, with `changes`."""
    from fastattn.models import HrmTextConfig

    if path is None:
        return HrmTextConfig(vocab_size=vocab_size, **SMALL_MODEL, **changes)
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object of HrmTextConfig keys")
    try:
        return HrmTextConfig.from_dict({"vocab_size": vocab_size} | values | changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def start(
    folder: Path,
    shape: "HrmTextConfig",
    tokenizer: "Tokenizer",
    samples: "list[Sample]",
    held_out: "list[Sample]",
    config: "TrainConfig",
    model: "HrmText | None" = None,
) -> "Trainer":
    """A fresh run; its weights are the model's, or come from the config's seed."""
    import torch

    from fastattn.models import HrmText
    from fastattn.train.text import Trainer

    torch.manual_seed(config.seed)
    return Trainer(folder, HrmText(shape) if model is None else model, tokenizer, samples, held_out, config)


def with_ends(shape: "HrmTextConfig", tokenizer: "Tokenizer") -> "HrmTextConfig":
    """The config with the tokenizer's tokens for the start and the end, where it names none."""
    ids = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end_of_response}
    return replace(shape, **{name: token for name, token in ids.items() if getattr(shape, name) is None})


def initial_model(folder: Path, tokenizer: "Tokenizer") -> "HrmText":
    """The model of `--init`, in float32."""
    import torch

    from fastattn.models import HrmText

    model = HrmText.from_pretrained(folder, dtype=torch.float32)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: its model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: it must be "
            "the model's own"
        )
    return model


def model_type(folder: Path) -> str:
    """The model_type in the config.json of a folder, or "" where it cannot be read."""
    try:
        return str(files.read_json(folder / "config.json")["model_type"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def say_resumed(trainer: "Run", minutes: bool = False) -> None:
    """`minutes`: a time to train was given as well."""
    import torch

    console.print(f"resuming {trainer.folder} at step {trainer.step_number:,} of {trainer.config.steps:,}")
    if minutes:
        console.print("--minutes planned the run's steps when it began; they stay as they are")
    if trainer.threads != torch.get_num_threads():
        console.print(
            f"the run was on {trainer.threads} threads and goes on with {torch.get_num_threads()}: results "
            "will be close, not equal bit by bit"
        )


def plan_steps(trainer: "Run", minutes: float, evaluations: int = 8, given: Collection[str] = ()) -> None:
    """Gives a fresh run as many steps as fit in `minutes` on this machine, after timing a few. `given`: options that stay."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes is {minutes}; it must be positive")
    config = trainer.config
    seconds_per_step = trainer.seconds_per_step() * trainer.average_cost
    seconds_per_evaluation = trainer.seconds_per_evaluation()
    most = 15 * minutes  # seconds of evaluations: a quarter of the time
    evaluations = max(1, min(evaluations, math.floor(most / max(seconds_per_evaluation, 1e-9))))
    training_seconds = 60 * minutes - min(evaluations * seconds_per_evaluation, most)
    steps = max(10, math.floor(training_seconds / seconds_per_step))
    planned = {
        "ema": 1 - 1 / max(5.0, steps / 15),  # averages over the last fifteenth or so
        "warmup_steps": min(config.warmup_steps, max(1, steps // 10)),
    }
    trainer.replan(
        replace(
            config,
            steps=steps,
            eval_every=max(10, steps // evaluations),
            save_every=max(10, steps // 4),
            **{name: value for name, value in planned.items() if name not in given},
        )
    )


def plan_epochs(trainer: "Run", epochs: float) -> None:
    """Gives a fresh run the steps of so many passes over its data."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"--epochs is {epochs}; it must be positive")
    trainer.replan(replace(trainer.config, steps=max(1, round(epochs * trainer.steps_per_epoch()))))


def train(trainer: "Run", limit_s: float | None = None) -> bool:
    """Runs `trainer` with a progress bar, or a line now and then where there is no terminal.

    Returns False when Ctrl-C ended it, here or in another process of it, or when nobody reads its output any more.
    `limit_s` ends the run early where the machine got slower. Raises ValueError before the first step where the folder cannot be written.
    """
    files.make_folder(trainer.folder)
    spent, unread = 0.0, False
    with stop_requested() as interrupted, _Display(trainer) as display:

        def show(row: dict[str, Any]) -> None:
            nonlocal spent, unread
            spent += row.get("seconds", 0.0)
            try:
                display.show(row)
            except SystemExit:  # rich's answer to a closed pipe; the console is quiet from here on
                unread = True

        def late() -> bool:
            return limit_s is not None and spent > limit_s

        def stop() -> bool:
            if late():
                console.print(f"stopping at step {trainer.step_number}: the machine is slower than it was")
            return late() or interrupted() or unread

        trainer.run(show, stop)
        return trainer.done or (late() and not interrupted() and not unread)


class _Display:
    """Loss, tokens a second and time left while a run goes on."""

    def __init__(self, trainer: "Run") -> None:
        self._trainer = trainer
        self._loss = self._speed = math.nan
        self._start = time.monotonic()
        self._first = trainer.step_number
        self._next_line = 0.0
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                "train", total=trainer.config.steps, completed=trainer.step_number, text=""
            )

    def __enter__(self) -> "_Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        if "loss" not in row:
            console.print(f"  step {row['step']:>5,}  {evaluation_line(row)}")
            return
        self._loss = _blend(self._loss, row["loss"])
        self._speed = _blend(self._speed, row["tokens"] / row["seconds"])
        text = f"loss {self._loss:.3f}  {self._speed:,.0f} tokens/s  {duration(self._left(row['step']))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], text=text)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 15.0
            console.print(f"  step {row['step']:>5,} of {self._trainer.config.steps:,}  {text}")

    def _left(self, step: int) -> float:
        each = (time.monotonic() - self._start) / max(1, step - self._first)
        return each * (self._trainer.config.steps - step)


def respond(
    model: "HrmText",
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_new_tokens: int,
    condition: Sequence[str] = (),
    show: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> str:
    """The model's response to `prompt` under a condition (see Tokenizer); `show` gets it piece by piece as it is made."""
    import torch

    ids = torch.tensor([tokenizer.prompt(prompt, condition)])
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"prompt: has {ids.shape[1]} tokens; this model takes {model.config.max_position_embeddings}, "
            "the response among them"
        )
    eos = model.config.eos_token_id
    ends = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    stream = tokenizer.text_stream()
    pieces: list[str] = []

    def push(token: torch.Tensor) -> None:
        pieces.append(stream.push(token.item()))
        show(pieces[-1])

    model.generate(
        ids,
        max_new_tokens=min(max_new_tokens, room),
        stop_tokens=(tokenizer.end_of_response, *ends),
        stream=push,
        **sampling,
    )
    pieces.append(stream.finish())
    show(pieces[-1])
    return "".join(pieces)


def visible(text: str) -> str:
    """`text` for a terminal: control characters are spelled out, such as `\\x1b`."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def answers(trainer: "Trainer", examples: "Sequence[Example]", max_new_tokens: int = 64) -> "list[Answer]":
    """The averaged model's response to each example's instruction, beside the example's own."""
    from fastattn.train.report import Answer

    with trainer.averaged():
        said = [
            respond(
                *(trainer.model, trainer.tokenizer, e.instruction),
                max_new_tokens=max_new_tokens,
                condition=e.condition,
            )
            for e in examples
        ]
    return [Answer(e.instruction, s.strip(), e.response) for e, s in zip(examples, said, strict=True)]


def write_report(trainer: "Trainer", title: str, summary: str, shown: "list[Answer]", path: Path) -> Path:
    """Writes the run's report."""
    from fastattn.cli._environment import environment
    from fastattn.nn import VQHead
    from fastattn.train import report
    from fastattn.train.compare import step_times

    page = report.Report(
        title,
        summary,
        trainer.history,
        shown,
        trainer.op_times(),
        environment(),
        notes(trainer),
        # plain torch has no VQ head to compare with
        step_times={} if isinstance(trainer.model.lm_head, VQHead) else step_times(trainer),
    )
    return report.write(path, page)


def notes(trainer: "Run") -> list[tuple[str, str]]:
    """The figures at the top of a run's report."""
    history = trainer.history
    steps = [row for row in history if "loss" in row]
    evaluations = [row for row in history if "loss" not in row]
    lines = []
    if evaluations and "held_out" in evaluations[-1]:
        first, last = (evaluations[i]["held_out"] for i in (0, -1))
        lines.append((f"{first:.2f} → {last:.2f}", "held-out loss, nats per token"))
    elif evaluations:
        count = evaluations[-1].get("puzzles")
        of = f"of {count:,} held-out puzzles" if count else "held-out puzzles"
        lines.append((f"{evaluations[-1]['exact']:.1%}", f"{of} solved"))
        lines.append((f"{evaluations[-1]['cells']:.1%}", "of their blank cells right"))
    if steps:
        seconds, tokens = sum(row["seconds"] for row in steps), sum(row["tokens"] for row in steps)
        lines.append((duration(seconds), f"training, {len(steps):,} steps"))
        lines.append((f"{tokens / seconds:,.0f}", f"tokens a second, {tokens / 1e6:.2f} M in all"))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    lines.append((f"{parameters / 1e6:.2f} M", "parameters"))
    return lines


def evaluation_line(row: Mapping[str, Any]) -> str:
    """An evaluation's figures in words."""
    if "held_out" in row:
        return f"held-out loss {row['held_out']:.3f}"
    of = f" of {row['puzzles']:,}" if "puzzles" in row else ""
    return f"held out: blank cells right {row['cells']:.1%}, puzzles{of} solved {row['exact']:.1%}"


def _blend(old: float, new: float) -> float:
    return new if math.isnan(old) else 0.9 * old + 0.1 * new


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
