"""What the examples share: a study's options, its results on disk, the text as one stream, a training loop."""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.optim import AdamATan2
from fastattn.runtime import files as _files
from fastattn.runtime import pictures
from fastattn.train.data import stdlib
from fastattn.train.data.tokenizer import Tokenizer

DOCS = Path(__file__).parents[1] / "docs"


def options(description: str, *, steps: int, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"training steps of each model; default {steps}")
    add("--minutes", type=float, help="start no further run after this long; the same command goes on later")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--seed", type=int, default=0, help="of weights, data order and k-means")
    add("--output", type=Path, default=Path("study-run"), help="folder for results and pictures")
    add("--publish", action="store_true", help="also put results, pictures and the table into docs/")
    given = parser.parse_args(argv)
    if given.steps < 1 or given.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    torch.set_num_threads(given.threads)
    return given


class Study:
    """Runs by name, kept in OUTPUT/NAME.json after each: a study that was stopped goes on where it was."""

    def __init__(self, name: str, given: argparse.Namespace, **settings: Any) -> None:
        self.name, self.folder, self._publish = name, given.output, given.publish
        self._ends = time.monotonic() + 60 * given.minutes if given.minutes else None
        self.settings = {"steps": given.steps, "seed": given.seed, **settings}
        self.runs: dict[str, Any] = {}
        if self._path.exists():
            held = json.loads(self._path.read_text(encoding="utf-8"))
            if held["settings"] != self.settings:
                raise SystemExit(
                    f"{self._path} holds a study with {held['settings']}, not {self.settings}; "
                    "remove it, or give another --output"
                )
            self.runs = held["runs"]

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def run(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` returned, now or in an earlier call of the study."""
        if name not in self.runs:
            if self._ends is not None and time.monotonic() > self._ends:
                raise SystemExit(f"out of time before {name!r}; the same command goes on from here")
            print(f"{name} ...", flush=True)
            start = time.perf_counter()
            made = make()
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            self.runs[name] = made
            held = {"settings": self.settings, "threads": torch.get_num_threads(), "runs": self.runs}
            _files.write_text(self._path, json.dumps(held, indent=1) + "\n")
        return self.runs[name]

    def finish(self, table: str, drawings: Mapping[str, Any]) -> None:
        """Prints the table and writes the pictures, {file name without .svg: figure}."""
        print(table)
        for name, drawing in drawings.items():
            pictures.write(self.folder / f"{name}.svg", drawing, name)
        if self._publish:
            for name in drawings:
                picture = (self.folder / f"{name}.svg").read_text(encoding="utf-8")
                _files.write_text(DOCS / f"{name}.svg", picture)
            _files.write_text(DOCS / self._path.name, self._path.read_text(encoding="utf-8"))
            page = DOCS / f"{self.name}.md"
            _files.write_text(page, with_table(page.read_text(encoding="utf-8"), table))


def with_table(page: str, table: str) -> str:
    """The page with `table` between its two table marks."""
    marks = "<!-- table -->", "<!-- end of table -->"
    found = re.subn(f"(?s){marks[0]}.*{marks[1]}", lambda _: f"{marks[0]}\n\n{table}\n\n{marks[1]}", page)
    if found[1] != 1:
        raise ValueError(f"the page needs the marks {marks[0]} and {marks[1]}, once")
    return found[0]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the columns after the first right-aligned."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def text_stream(vocab_size: int) -> tuple[Tokenizer, Tensor, Tensor]:
    """(tokenizer, training tokens, held-out tokens): the demo's questions and answers end to end, by name."""
    examples, held_out = stdlib.build()
    tokenizer = Tokenizer.train(examples, vocab_size)
    train, test = (
        torch.tensor([token for sample in tokenizer.samples(part) for token in sample.tokens])
        for part in (examples, held_out)
    )
    return tokenizer, train, test


def windows(stream: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch, length + 1) pieces of the stream from random places."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(stream) - length, (batch, 1), generator=generator)
        yield stream[starts + places]


def chunks(stream: Tensor, length: int, tokens: int) -> Tensor:
    """The first `tokens` predicted tokens of the stream as (tokens / length, length + 1), cut without overlap."""
    places = torch.arange(length + 1)
    return stream[torch.arange(0, tokens, length)[:, None] + places]


def train(
    loss_of: Callable[[Tensor], Tensor],
    parameters: Sequence[torch.nn.Parameter],
    batches: Iterator[Tensor],
    steps: int,
    learning_rate: float,
) -> AdamATan2:
    """Steps of Adam-atan2, warmed up over the first tenth; evaluate under `.averaged()` of what is returned."""
    optimizer = AdamATan2(parameters, lr=learning_rate, ema=1 - 1 / max(5.0, steps / 15))
    next_line = time.monotonic() + 15
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, 10 * step / steps)
        loss = loss_of(next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if time.monotonic() > next_line or step == steps:
            next_line = time.monotonic() + 15
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return optimizer
