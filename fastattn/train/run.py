"""What every training run shares: its config, steps until done, evaluations, saves, and going on from the last one."""

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from fastattn.optim import AdamATan2, load_state_tensors, state_tensors
from fastattn.runtime import files
from fastattn.train.report import OpTime
from fastattn.train.state import STATE, write_state

HISTORY = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run trains. Everything a resumed run must share with its start.

    steps: optimizer steps. learning_rate: reached after warmup_steps, then constant, or by schedule "cosine" falling to
    min_learning_rate_ratio of it at the last step. ema: decay of the averaged weights that are evaluated and saved. seed: of
    the weights and of the order of the data. eval_every, save_every: steps between them.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    schedule: str = "constant"
    min_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.1
    ema: float = 0.98
    seed: int = 0
    eval_every: int = 100
    save_every: int = 200

    at_least_one: ClassVar[tuple[str, ...]] = ("steps", "eval_every", "save_every")
    not_negative: ClassVar[tuple[str, ...]] = ("learning_rate", "warmup_steps", "weight_decay", "seed")

    def __post_init__(self) -> None:
        for name in self.at_least_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train: {name} is {getattr(self, name)}; it must be at least 1")
        for name in self.not_negative:
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} is {getattr(self, name)}; it must not be negative")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"train: schedule is {self.schedule!r}; it must be constant or cosine")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ValueError(
                f"train: min_learning_rate_ratio is {self.min_learning_rate_ratio}; it must be from 0 to 1"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"train: ema is {self.ema}; it must be at least 0 and under 1")

    def rate_at(self, step: int) -> float:
        """The share of the learning rate that a step has, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        least = self.min_learning_rate_ratio
        return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"train: unknown key {', '.join(map(repr, sorted(unknown)))}")
        return cls(**values)


class Run:
    """A run: model, optimizer, place in the data, and the folder where it is saved.

    Its folder holds the averaged model (config.json, model.safetensors), history.jsonl and training.safetensors,
    which has all that a resumed run needs and appears whole or not at all.

    A kind of run says how a step gets its gradients (:meth:`_gradients`) and what an evaluation is (:meth:`_evaluate`).
    Its ``order`` gives the batches by ``next()``; its place, ``epoch`` and ``position``, is saved.
    """

    figures: ClassVar[tuple[str, ...]]  # of an evaluation's row

    def __init__(
        self, folder: str | os.PathLike, model: nn.Module, order: Any, config: RunConfig, data: str
    ) -> None:
        """data: a digest of what is trained on, by which a resumed run knows it again."""
        self.folder, self.model, self.order, self.config = Path(folder), model, order, config
        self.step_number = 0
        self.threads = torch.get_num_threads()  # of the last save, when resumed
        self.history: list[dict[str, Any]] = []
        self._data = data
        self._start_optimizers()

    @property
    def done(self) -> bool:
        return self.step_number >= self.config.steps

    def replan(self, config: RunConfig) -> None:
        """Puts another config in place before the first step; the data's order and its batches stay."""
        if self.step_number:
            raise ValueError("train: a run that has begun keeps its config")
        self.config = config
        for group in self.optimizer.param_groups:
            group |= {"weight_decay": config.weight_decay, "ema": config.ema}

    def steps_per_epoch(self) -> int:
        """Batches of the first epoch; later ones may have a few more or less."""
        order, count = copy.copy(self.order), 0
        order.next()
        while order.epoch == self.order.epoch:
            count += 1
            order.next()
        return count

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of the history."""
        start = time.perf_counter()
        config = self.config
        rate = config.learning_rate * config.rate_at(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, row = self._gradients()
        if not torch.isfinite(loss):
            raise ValueError(
                f"train: the loss is {loss.item()} at step {self.step_number}; lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._stepped()
        row = {
            "step": self.step_number,
            "loss": loss.item(),
            "seconds": time.perf_counter() - start,
            **row,
        }
        self.history.append(row)
        return row

    def evaluate(self) -> dict[str, Any]:
        """What the averaged weights make of the held-out data; a row of the history too."""
        start = time.perf_counter()
        with self.averaged():
            row = {"step": self.step_number, **self._evaluate(), "seconds": time.perf_counter() - start}
        self.history.append(row)
        return row

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights."""
        with self.optimizer.averaged():
            yield

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None] = lambda row: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Steps, evaluates and saves until done or until `stop()` says so; what it reached is saved."""
        if self.held_out and not any(is_evaluation(row) for row in self.history):
            on_step(self.evaluate())
        while not self.done and not self._told_to_stop(stop):
            on_step(self.step())
            if self.held_out and (self.done or self.step_number % self.config.eval_every == 0):
                on_step(self.evaluate())
            if self.step_number % self.config.save_every == 0 and not self.done:
                self.save()
        self.save()

    def save(self) -> None:
        """Writes the folder. The state goes before the model that is derived from it."""
        self._write_history()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in state_tensors(self.optimizer, self.model).items()}
        tensors |= {"rng": torch.get_rng_state(), **self._more_tensors()}
        meta = {
            "step": self.step_number,
            "epoch": self.order.epoch,
            "position": self.order.position,
            "config": asdict(self.config),
            "model": self.model.config.to_dict(),
            "data": self._data,
            "threads": torch.get_num_threads(),
        }
        self._write_state(tensors, meta)
        with self.averaged():
            self._write_model()

    @property
    def average_cost(self) -> float:
        """Of a step, over the dearest kind."""
        return 1.0

    def seconds_per_step(self, steps: int = 3) -> float:
        """How long a step takes, the dearest kind, tried on a copy."""
        with torch.random.fork_rng(devices=[]):
            trial = self._copy()
            trial.step()  # the first one loads and allocates
            start = time.perf_counter()
            for _ in range(steps):
                trial.step()
            return (time.perf_counter() - start) / steps

    def seconds_per_evaluation(self) -> float:
        start = time.perf_counter()
        if self.held_out:
            self._evaluate()
        return time.perf_counter() - start

    def op_times(self, steps: int = 3) -> list[OpTime]:
        """Self time of every op over a few steps of the dearest kind, tried on a copy."""
        from torch.profiler import ProfilerActivity, profile

        with torch.random.fork_rng(devices=[]):
            trial = self._copy()
            trial.step()
            with _native_stderr_closed(), profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(steps):
                    trial.step()
        spent: dict[str, tuple[float, int]] = {}
        for event in profiler.key_averages():
            ours_or_torchs = event.key.startswith(("aten::", "fastattn::"))
            name = event.key if ours_or_torchs else "autograd and other bookkeeping"
            seconds, calls = spent.get(name, (0.0, 0))
            spent[name] = seconds + event.self_cpu_time_total / 1e6, calls + event.count
        return [OpTime(name, seconds, calls) for name, (seconds, calls) in spent.items() if seconds > 0]

    def _gradients(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Takes a batch and adds the gradients of its loss; returns the loss and more for the step's row."""
        raise NotImplementedError

    def _evaluate(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def held_out(self) -> Any:
        """What :meth:`_evaluate` looks at; evaluations are left out where it is empty."""
        raise NotImplementedError

    def _start_optimizers(self) -> None:
        config = self.config
        self.optimizer = AdamATan2(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, ema=config.ema
        )

    def _stepped(self) -> None:
        """After the optimizer's step, with its number counted."""

    def _more_tensors(self) -> dict[str, torch.Tensor]:
        """What else a resumed run needs."""
        return {}

    def _told_to_stop(self, stop: Callable[[], bool]) -> bool:
        return stop()

    def _write_history(self) -> None:
        files.write_text(self.folder / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))

    def _write_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        write_state(self.folder / STATE, tensors, meta)

    def _write_model(self) -> None:
        self.model.save_pretrained(self.folder)

    def _restore(self, path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Puts back what :meth:`save` wrote to `path`, all but the place in the data."""
        if meta["data"] != self._data:
            raise ValueError(f"{path}: the run was started on other data")
        try:
            self.model.load_state_dict(part(tensors, "model"))
            load_state_tensors(self.optimizer, self.model, part(tensors, "optimizer"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: does not fit its own config: {error}") from error
        self.step_number, self.threads = meta["step"], meta["threads"]
        history = self.folder / HISTORY
        lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
        rows = [self._history_row(line, f"{history}:{number}") for number, line in enumerate(lines, 1)]
        self.history = [row for row in rows if row["step"] <= meta["step"]]
        torch.set_rng_state(tensors["rng"])

    def _history_row(self, line: str, where: str) -> dict[str, Any]:
        try:
            row = files.parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        figures = ("loss", "tokens") if isinstance(row, dict) and "loss" in row else self.figures
        wanted = ("step", "seconds", *figures)
        if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in wanted):
            raise ValueError(f"{where}: no row of a run's history")
        return row

    def _copy(self, **changes: Any) -> Self:
        """A run that goes on apart from this one, with changes to its config."""
        trial = copy.copy(self)
        trial.model = copy.deepcopy(self.model)
        trial.config = replace(self.config, **changes)
        trial._start_optimizers()
        trial.order = copy.copy(self.order)
        trial.history = []
        return trial


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors called ``<name>.<rest>``, by their rest."""
    return {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a row of the history is an evaluation's, not a step's."""
    return "loss" not in row


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drops what compiled code writes to standard error: torch's profiler announces its start and stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
