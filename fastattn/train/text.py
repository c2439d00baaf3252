"""Training HRM-Text on packed instruction-response samples: the run behind `fastattn train`."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastattn.models import HrmText, HrmTextConfig
from fastattn.nn import VQHead
from fastattn.ops.codes import nearest_codes
from fastattn.optim import load_state_tensors, state_tensors
from fastattn.train import ranks
from fastattn.train.data.packing import Batch, Order, batches, fitted
from fastattn.train.data.tokenizer import Sample, Tokenizer
from fastattn.train.run import HISTORY, Run, RunConfig
from fastattn.train.state import STATE, fingerprint, read_from

__all__ = ["HISTORY", "STATE", "TrainConfig", "Trainer", "bp_steps_at", "held_out_loss", "moving_head"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """How HRM-Text trains, see :class:`RunConfig`.

    batch_tokens: tokens of a packed batch, at most. credit_warmup: fraction of the steps over which gradients come to
    reach the whole last cycle. eval_tokens: held-out tokens an evaluation looks at. update_codes_every: steps between
    updates of a quantised head's codes, where they are not fixed. too_long: what becomes of samples of more tokens than fit:
    "refuse" raises, "skip" leaves them out, "cut" shortens their responses.
    """

    batch_tokens: int = 1024
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    credit_warmup: float = 0.2
    eval_tokens: int = 16384
    too_long: str = "refuse"
    update_codes_every: int = 10

    at_least_one: ClassVar = (*RunConfig.at_least_one, "batch_tokens", "eval_tokens", "update_codes_every")
    not_negative: ClassVar = (*RunConfig.not_negative, "credit_warmup")


def bp_steps_at(step: int, config: TrainConfig, longest: int) -> int:
    """Warm-up deep credit assignment: stack calls with gradients, from 2 to `longest` (arXiv 2605.20613)."""
    ramp = config.credit_warmup * config.steps
    share = 1.0 if step >= ramp else step / ramp
    return 2 + int(share * (longest - 2))


class Trainer(Run):
    """A run of HRM-Text; its folder also holds tokenizer.json.

    Several processes (see :meth:`shard`) write the state as a DCP folder, training-<step>.dcp, one file a process.
    """

    figures = ("held_out",)

    def __init__(
        self,
        folder: str | os.PathLike,
        model: HrmText,
        tokenizer: Tokenizer,
        samples: list[Sample],
        held_out: list[Sample],
        config: TrainConfig,
    ) -> None:
        longest = model.config.max_position_embeddings
        samples, self.too_long = fitted(
            samples, min(config.batch_tokens, longest), config.too_long, "training data"
        )
        held_out, _ = fitted(held_out, longest, config.too_long, "held-out data")
        self._samples = samples
        order = Order(samples, config.batch_tokens, config.seed)
        super().__init__(folder, model, order, config, fingerprint(samples))
        self.tokenizer = tokenizer
        self._held_out = _first_tokens(held_out, config.eval_tokens)
        self.sharded = False

    @classmethod
    def resume(
        cls, folder: str | os.PathLike, tokenizer: Tokenizer, samples: list[Sample], held_out: list[Sample]
    ) -> "Trainer":
        """The run that `folder` holds, at its last save; `threads` says how many it ran on.

        Raises FileNotFoundError or ValueError: no state, an unreadable or half-written one, other data.
        """
        path, tensors, meta = ranks.newest_state(Path(folder))
        with read_from(path):
            model = HrmText(HrmTextConfig.from_dict(meta["model"]))
            config = TrainConfig.from_dict(meta["config"])
            trainer = cls(folder, model, tokenizer, samples, held_out, config)
            trainer._restore(path, tensors, meta)
            trainer.order = Order(
                trainer._samples, config.batch_tokens, config.seed, meta["epoch"], meta["position"]
            )
        return trainer

    def shard(self) -> None:
        """Goes on as one of torchrun's processes: weights and optimizer split among them, batches too.

        Every process must have made or resumed the same run. What it computes is what one process would.
        """
        if moving_head(self.model) is not None:
            raise NotImplementedError("train: codes that move (--head vq) are for one process")
        data = f"{self._data} {fingerprint(self._held_out)}"
        ranks.check_same(f"{data} {self.step_number} {self.config}", "data or options")
        state = {name: t.clone() for name, t in state_tensors(self.optimizer, self.model).items()}
        ranks.shard(self.model)
        self._start_optimizers()
        load_state_tensors(self.optimizer, self.model, state)
        self.sharded = True

    @property
    def held_out(self) -> list[Sample]:
        return self._held_out

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, and moving codes are the nearest to those."""
        head = moving_head(self.model)
        codes = None if head is None else head.codes.clone()
        with super().averaged():
            if head is not None:
                head.codes.copy_(nearest_codes(head.weight.detach(), head.codebook.detach()))
            self._discard_gathered()
            try:
                yield
            finally:
                if head is not None:
                    head.codes.copy_(codes)
        self._discard_gathered()

    def save(self) -> None:
        """Writes the folder. A state of another step or kind goes once the new one is complete."""
        if self._writes:
            self.tokenizer.save(self.folder)
        super().save()
        if not self.sharded:
            ranks.drop_states(self.folder, keep=self.folder / STATE)

    @property
    def _writes(self) -> bool:
        """Whether this process writes what is whole."""
        return not self.sharded or ranks.first()

    def _gradients(self) -> tuple[torch.Tensor, dict[str, Any]]:
        shape = self.model.config
        batch = self.order.next()
        # of two levels the H calls and the last cycle's L calls, of more the whole last cycle
        longest = shape.H_cycles + shape.L_cycles
        if shape.cycles is not None:
            longest = self.model.recurrence.calls // shape.cycles[-1]
        bp_steps = bp_steps_at(self.step_number, self.config, longest)
        row = {"tokens": batch.tokens, "bp_steps": bp_steps}
        if not self.sharded:
            loss = self._loss(batch, bp_steps)
            loss.backward()
            return loss, row
        mine = ranks.split(batch)
        # a mean over the part: it counts by its share of the response tokens
        loss = self._loss(mine, bp_steps) * (mine.response_tokens / max(1, batch.response_tokens))
        loss.backward()
        return ranks.summed(loss), row

    def _stepped(self) -> None:
        head = moving_head(self.model)
        if head is not None and self.step_number % self.config.update_codes_every == 0:
            # seeded by the step, so that a resumed run reseeds dead codes as the whole one does
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step_number)
            head.update_codes(generator=generator)

    def _evaluate(self) -> dict[str, Any]:
        """Held-out loss in nats per response token."""
        return {"held_out": held_out_loss(self.model, self.held_out, self.config.batch_tokens)}

    def _told_to_stop(self, stop: Callable[[], bool]) -> bool:
        return ranks.any_rank(stop()) if self.sharded else stop()

    def _write_history(self) -> None:
        if self._writes:
            super()._write_history()

    def _write_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        if self.sharded:
            ranks.write_sharded_state(self.folder, tensors, meta)
        else:
            super()._write_state(tensors, meta)

    def _write_model(self) -> None:
        if self.sharded:
            ranks.save_whole(self.model, self.folder)
        else:
            super()._write_model()

    def _copy(self, **changes: Any) -> "Trainer":
        return super()._copy(credit_warmup=0.0, **changes)  # the longest gradients

    @property
    def average_cost(self) -> float:
        return 1 - 0.3 * self.config.credit_warmup  # while gradients reach less far, steps take less

    def _discard_gathered(self) -> None:
        """The weights were written to: what processes hold of each other's parts is stale."""
        if self.sharded:
            self.model.reshard()

    def _loss(self, batch: Batch, bp_steps: int) -> torch.Tensor:
        return self.model(
            batch.input_ids,
            batch.prompt_lengths,
            cu_seqlens=batch.cu_seqlens,
            labels=batch.labels,
            bp_steps=bp_steps,
        ).loss


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
            batch.prompt_lengths,
            cu_seqlens=batch.cu_seqlens,
            labels=batch.labels,
        ).loss
        total += loss.item() * batch.response_tokens
        count += batch.response_tokens
    return total / count


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
