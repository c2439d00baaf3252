"""Training HRM-Text on packed instruction-response samples: the loop behind `fastattn train`."""

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastattn import _files, training_ranks
from fastattn.data.packing import Batch, Order, batches, check_lengths
from fastattn.data.tokenizer import Sample, Tokenizer
from fastattn.models import HrmText
from fastattn.nn import VQHead
from fastattn.ops.vocab import nearest_codes
from fastattn.optim import AdamATan2, load_state_tensors, state_tensors
from fastattn.report import OpTime
from fastattn.training_state import STATE, fingerprint, write_state

HISTORY = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains. Everything a resumed run must share with its start.

    steps: optimizer steps. batch_tokens: tokens of a packed batch, at most. learning_rate: reached after
    warmup_steps, then constant. ema: decay of the averaged weights that are evaluated and saved.
    credit_warmup: fraction of the steps over which gradients come to reach the whole last cycle.
    eval_tokens: held-out tokens an evaluation looks at. eval_every, save_every: steps between them.
    update_codes_every: steps between updates of a quantised head's codes, where they are not fixed.
    """

    steps: int
    batch_tokens: int = 1024
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    ema: float = 0.98
    credit_warmup: float = 0.2
    seed: int = 0
    eval_every: int = 100
    eval_tokens: int = 16384
    save_every: int = 200
    update_codes_every: int = 10

    def __post_init__(self) -> None:
        counts = ("steps", "batch_tokens", "eval_every", "eval_tokens", "save_every", "update_codes_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "seed", "credit_warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train: ema is {self.ema}; it must be at least 0 and under 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"train: unknown key {', '.join(map(repr, sorted(unknown)))}")
        return cls(**values)


def bp_steps_at(step: int, config: TrainConfig, longest: int) -> int:
    """Warm-up deep credit assignment: stack calls with gradients, from 2 to `longest` (arXiv 2605.20613)."""
    ramp = config.credit_warmup * config.steps
    share = 1.0 if step >= ramp else step / ramp
    return 2 + int(share * (longest - 2))


class Trainer:
    """A run: model, optimizer, place in the data, and the folder where it is saved.

    Its folder holds the averaged model (config.json, model.safetensors), tokenizer.json, history.jsonl and
    training.safetensors, which has all that a resumed run needs and appears whole or not at all. Several
    processes (see :meth:`shard`) write it as a DCP folder, training-<step>.dcp, one file a process.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: HrmText,
        tokenizer: Tokenizer,
        samples: list[Sample],
        held_out: list[Sample],
        config: TrainConfig,
    ) -> None:
        self.folder, self.model, self.tokenizer, self.config = Path(folder), model, tokenizer, config
        check_lengths(
            samples, min(config.batch_tokens, model.config.max_position_embeddings), "training data"
        )
        check_lengths(held_out, model.config.max_position_embeddings, "held-out data")
        self.optimizer = _optimizer(model, config)
        self.order = Order(samples, config.batch_tokens, config.seed)
        self.held_out = _first_tokens(held_out, config.eval_tokens)
        self.step_number = 0
        self.threads = torch.get_num_threads()  # of the last save, when resumed
        self.history: list[dict[str, Any]] = []
        self._data = fingerprint(samples)
        self.sharded = False

    @classmethod
    def resume(
        cls, folder: str | os.PathLike, tokenizer: Tokenizer, samples: list[Sample], held_out: list[Sample]
    ) -> "Trainer":
        """The run that `folder` holds, at its last save; `threads` says how many it ran on.

        Raises FileNotFoundError or ValueError: no state, an unreadable or half-written one, other data.
        """
        from fastattn.models import HrmTextConfig

        path, tensors, meta = training_ranks.newest_state(Path(folder))
        config = TrainConfig.from_dict(meta["config"])
        model = HrmText(HrmTextConfig.from_dict(meta["model"]))
        trainer = cls(folder, model, tokenizer, samples, held_out, config)
        if meta["data"] != trainer._data:
            raise ValueError(f"{path}: the run was started on other data or another tokenizer")
        parts = {
            part: {name[len(part) + 1 :]: t for name, t in tensors.items() if name.startswith(part + ".")}
            for part in ("model", "optimizer")
        }
        try:
            model.load_state_dict(parts["model"])
            load_state_tensors(trainer.optimizer, model, parts["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: does not fit its own config: {error}") from error
        trainer.order = Order(samples, config.batch_tokens, config.seed, meta["epoch"], meta["position"])
        trainer.step_number, trainer.threads = meta["step"], meta["threads"]
        trainer.history = [row for row in _read_history(folder) if row["step"] <= meta["step"]]
        torch.set_rng_state(tensors["rng"])
        return trainer

    def replan(self, config: TrainConfig) -> None:
        """Puts another config in place before the first step; the data's order and its batches stay."""
        if self.step_number:
            raise ValueError("train: a run that has begun keeps its config")
        self.config = config
        for group in self.optimizer.param_groups:
            group |= {"weight_decay": config.weight_decay, "ema": config.ema}

    def shard(self) -> None:
        """Goes on as one of torchrun's processes: weights and optimizer split among them, batches too.

        Every process must have made or resumed the same run. What it computes is what one process would.
        """
        if moving_head(self.model) is not None:
            raise NotImplementedError("train: codes that move (--head vq) are for one process")
        training_ranks.check_same(f"{self._data} {self.step_number} {self.config}", "data or options")
        state = {name: t.clone() for name, t in state_tensors(self.optimizer, self.model).items()}
        training_ranks.shard(self.model)
        self.optimizer = _optimizer(self.model, self.config)
        load_state_tensors(self.optimizer, self.model, state)
        self.sharded = True

    @property
    def done(self) -> bool:
        return self.step_number >= self.config.steps

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of the history."""
        start = time.perf_counter()
        config, shape = self.config, self.model.config
        batch = self.order.next()
        bp_steps = bp_steps_at(self.step_number, config, shape.H_cycles + shape.L_cycles)
        rate = config.learning_rate * min(1.0, (self.step_number + 1) / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradients(batch, bp_steps)
        if not torch.isfinite(loss):
            raise ValueError(
                f"train: the loss is {loss.item()} at step {self.step_number}; lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        head = moving_head(self.model)
        if head is not None and self.step_number % config.update_codes_every == 0:
            # seeded by the step, so that a resumed run reseeds dead codes as the whole one does
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step_number)
            head.update_codes(generator=generator)
        row = {
            "step": self.step_number,
            "loss": loss.item(),
            "tokens": batch.tokens,
            "seconds": time.perf_counter() - start,
            "bp_steps": bp_steps,
        }
        self.history.append(row)
        return row

    def evaluate(self) -> float:
        """Held-out loss in nats per response token under the averaged weights; a row of the history too."""
        with self.averaged():
            loss = held_out_loss(self.model, self.held_out, self.config.batch_tokens)
        self.history.append({"step": self.step_number, "held_out": loss})
        return loss

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, and moving codes are the nearest to those."""
        head = moving_head(self.model)
        codes = None if head is None else head.codes.clone()
        with self.optimizer.averaged():
            if head is not None:
                head.codes.copy_(nearest_codes(head.weight.detach(), head.codebook.detach()))
            self._discard_gathered()
            try:
                yield
            finally:
                if head is not None:
                    head.codes.copy_(codes)
        self._discard_gathered()

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None] = lambda row: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Steps, evaluates and saves until done or until `stop()` says so; what it reached is saved."""
        if self.held_out and not any("held_out" in row for row in self.history):
            on_step({"step": self.step_number, "held_out": self.evaluate()})

        def told_to_stop() -> bool:
            return training_ranks.any_rank(stop()) if self.sharded else stop()

        while not self.done and not told_to_stop():
            on_step(self.step())
            if self.held_out and (self.done or self.step_number % self.config.eval_every == 0):
                on_step({"step": self.step_number, "held_out": self.evaluate()})
            if self.step_number % self.config.save_every == 0 and not self.done:
                self.save()
        self.save()

    def save(self) -> None:
        """Writes the folder. The state goes before the model that is derived from it; one of another step or kind
        goes once the new one is complete."""
        if not self.sharded or training_ranks.first():
            self.tokenizer.save(self.folder)
            rows = "".join(json.dumps(row) + "\n" for row in self.history)
            _files.write_text(self.folder / HISTORY, rows)
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in state_tensors(self.optimizer, self.model).items()}
        tensors["rng"] = torch.get_rng_state()
        meta = {
            "step": self.step_number,
            "epoch": self.order.epoch,
            "position": self.order.position,
            "config": asdict(self.config),
            "model": self.model.config.to_dict(),
            "data": self._data,
            "threads": torch.get_num_threads(),
        }
        if self.sharded:
            training_ranks.write_sharded_state(self.folder, tensors, meta)
        else:
            write_state(self.folder / STATE, tensors, meta)
        with self.averaged():
            if self.sharded:
                training_ranks.save_whole(self.model, self.folder)
            else:
                self.model.save_pretrained(self.folder)
        if not self.sharded:
            training_ranks.drop_states(self.folder, keep=self.folder / STATE)

    def seconds_per_step(self, steps: int = 3) -> float:
        """How long a step with the longest gradients takes, tried on a copy."""
        trial = self._copy(credit_warmup=0.0)
        trial.step()  # the first one loads and allocates
        start = time.perf_counter()
        for _ in range(steps):
            trial.step()
        return (time.perf_counter() - start) / steps

    def op_times(self, steps: int = 3) -> list[OpTime]:
        """Self time of every op over a few steps with the longest gradients, tried on a copy."""
        from torch.profiler import ProfilerActivity, profile

        trial = self._copy(credit_warmup=0.0)
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

    def _gradients(self, batch: Batch, bp_steps: int) -> torch.Tensor:
        """Adds the gradients of the batch's loss, which is returned."""
        if not self.sharded:
            loss = self._loss(batch, bp_steps)
            loss.backward()
            return loss
        part = training_ranks.split(batch)
        # a mean over the part: it counts by its share of the response tokens
        loss = self._loss(part, bp_steps) * (part.response_tokens / max(1, batch.response_tokens))
        loss.backward()
        return training_ranks.summed(loss)

    def _discard_gathered(self) -> None:
        """The weights were written to: what processes hold of each other's parts is stale."""
        if self.sharded:
            self.model.reshard()

    def _loss(self, batch: Batch, bp_steps: int) -> torch.Tensor:
        return self.model(
            batch.input_ids,
            prefix_lengths=batch.prefix_lengths,
            cu_seqlens=batch.cu_seqlens,
            labels=batch.labels,
            bp_steps=bp_steps,
        ).loss

    def _copy(self, **changes: Any) -> "Trainer":
        trial = copy.copy(self)
        trial.model = copy.deepcopy(self.model)
        trial.config = TrainConfig(**(asdict(self.config) | changes))
        trial.optimizer = _optimizer(trial.model, trial.config)
        trial.order = copy.copy(self.order)
        trial.history = []
        return trial


def moving_head(model: HrmText) -> VQHead | None:
    """The model's output layer, where it is a quantised one whose codes move in training."""
    head = model.lm_head
    return head if isinstance(head, VQHead) and head.assignment != "fixed" else None


@torch.no_grad()
def held_out_loss(model: HrmText, samples: Sequence[Sample], batch_tokens: int) -> float:
    """Mean cross-entropy in nats over every response token of `samples`."""
    total, count = 0.0, 0
    for batch in batches(list(samples), batch_tokens):
        loss = model(
            batch.input_ids,
            prefix_lengths=batch.prefix_lengths,
            cu_seqlens=batch.cu_seqlens,
            labels=batch.labels,
        ).loss
        total += loss.item() * batch.response_tokens
        count += batch.response_tokens
    return total / count


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


def _optimizer(model: HrmText, config: TrainConfig) -> AdamATan2:
    return AdamATan2(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, ema=config.ema
    )


def _first_tokens(samples: list[Sample], limit: int) -> list[Sample]:
    """As many samples as fit in `limit` tokens, drawn evenly over the list."""
    generator = torch.Generator().manual_seed(0)
    taken, total = [], 0
    for i in torch.randperm(len(samples), generator=generator).tolist():
        total += len(samples[i].tokens)
        if taken and total > limit:
            break
        taken.append(samples[i])
    return taken


def _read_history(folder: str | os.PathLike) -> list[dict[str, Any]]:
    path = Path(folder) / HISTORY
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
