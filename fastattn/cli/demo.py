"""`fastattn demo`: what `make demo` runs once the package is installed."""

import math
import time
from pathlib import Path
from typing import Annotated

import typer

# Questions of each kind about objects that were kept out of training, beside a random few.
_ASKED = ("What does ", "Describe the ", "What arguments does ", "What kind of object is ", "When is ")


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the data, the model and report.html.")] = Path(
        "demo-run"
    ),
    minutes: Annotated[float, typer.Option(help="Train about this long.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
) -> None:
    """Train a small HRM-Text on the documentation of Python's standard library and let it answer.

    Builds the data from the modules on this machine (nothing is downloaded), trains a tokenizer and the model,
    compares its held-out loss with the untrained model's, answers held-out prompts, and writes report.html.
    """
    from rich.table import Table

    from fastattn.cli import _run
    from fastattn.train.data import stdlib
    from fastattn.train.data.jsonl import write_jsonl
    from fastattn.train.data.tokenizer import Tokenizer
    from fastattn.train.text import TrainConfig

    if not 0 < minutes < math.inf:  # before the data is made
        raise ValueError(f"--minutes is {minutes}; it must be positive, such as --minutes 4")
    console, began = _run.console, time.monotonic()
    _head(1, "data: questions about Python's standard library, answered by its documentation")
    examples, held_out = stdlib.build()
    for name, part in (("train.jsonl", examples), ("held-out.jsonl", held_out)):
        write_jsonl(output / name, part)
        console.print(f"  {output / name}: {len(part):,} examples")

    _head(2, "tokenizer: byte-level BPE")
    tokenizer = Tokenizer.train(examples, vocab_size=2048)
    samples = tokenizer.samples(examples)
    total = sum(len(sample.tokens) for sample in samples)
    console.print(f"  {tokenizer.vocab_size:,} tokens; the training text is {total / 1e6:.2f} M of them")

    _head(3, f"training HRM-Text for about {minutes:g} minutes (Ctrl-C stops and saves)")
    shape = _run.with_ends(_run.model_config(None, tokenizer.vocab_size), tokenizer)
    trainer = _run.start(
        output / "model",
        shape,
        tokenizer,
        samples,
        tokenizer.samples(held_out),
        TrainConfig(steps=1, seed=seed),
    )
    _run.plan_steps(trainer, minutes)
    if not _run.train(trainer, limit_s=60 * minutes * 1.25):
        console.print(
            f"saved; go on with: fastattn train --resume --data {output / 'train.jsonl'} "
            f"--held-out {output / 'held-out.jsonl'} --output {output / 'model'}"
        )
        raise typer.Exit(130)
    losses = [row["held_out"] for row in trainer.history if "held_out" in row]
    console.print(
        f"  held-out loss {losses[-1]:.3f} nats a token, {losses[0] - losses[-1]:.3f} below the untrained "
        f"model's {losses[0]:.3f}"
    )

    _head(4, "answers about objects it never saw")
    shown = _run.answers(trainer, choose(held_out))
    table = Table("prompt", "the model", "the documentation", show_lines=True)
    for answer in shown:
        table.add_row(answer.prompt, f"[bold]{_plain(answer.said)}[/bold]", _plain(answer.documented))
    console.print(table)

    _head(5, "report")
    path = _run.write_report(
        trainer,
        "fastattn demo",
        "A small HRM-Text, trained in minutes on the documentation of Python's standard library: "
        f"{len(examples):,} questions about its modules, classes and functions. {len(held_out):,} questions about "
        "other objects were held out.",
        shown,
        output / "report.html",
    )
    console.print(f"  {path}: open it in a browser")
    console.print(f'  ask more: fastattn generate --model {output / "model"} "What does shutil.copy do?"')
    console.print(f"done in {_run.duration(time.monotonic() - began)}")


def choose(held_out: list) -> list:
    """Two examples of each kind of question, spread over the set, the shorter answers of each stretch."""
    chosen = []
    for beginning in _ASKED:
        kind = [e for e in held_out if e.instruction.startswith(beginning) and len(e.response) < 120]
        chosen += kind[len(kind) // 3 :: len(kind) // 2 or 1][:2]
    return chosen


def _head(number: int, text: str) -> None:
    from fastattn.cli import _run

    _run.console.print(f"[bold]\\[{number}/5][/bold] {text}")


def _plain(text: str) -> str:
    from rich.markup import escape

    from fastattn.cli import _run

    return escape(_run.visible(text))
