"""Training HRM on puzzles with deep supervision: the run behind `fastattn train --model hrm`."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..models import Hrm, HrmConfig
from ..models.hrm import IGNORE, HrmCarry, HrmOutput
from ..optim import SignSGD
from . import ranks
from .data import sudoku
from .data.puzzle_sets import Batch, FolderData, SudokuData
from .data.puzzles import PuzzleOrder
from .run import Run, RunConfig, part
from .state import STATE, read_from, read_state

SEGMENTS = 16  # of an evaluation
FIRST_PUZZLES = 32  # of a folder, before the first step and to tell how long an evaluation takes
EVAL_PUZZLES = (
    256  # of an evaluation: of a share of a half, within 3 % of the whole by one standard deviation
)


@dataclass(frozen=True, kw_only=True)
class HrmTrainConfig(RunConfig):
    """How HRM trains, see :class:`RunConfig`. ``puzzle_learning_rate`` and ``puzzle_weight_decay``: of the puzzle vectors;
    None: as of the weights. Their rate follows the same schedule.

    One optimizer step a segment of ``batch_size`` puzzles. ``eval_puzzles``: how many of the held-out puzzles an evaluation
    solves, always the same; None for all. ``sudoku``: SudokuData's arguments, None for a folder.
    """

    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    ema: float = 0.99
    puzzle_learning_rate: float | None = None
    puzzle_weight_decay: float | None = None
    batch_size: int = 64
    eval_puzzles: int | None = EVAL_PUZZLES
    sudoku: dict[str, Any] | None = None

    at_least_one: ClassVar = (*RunConfig.at_least_one, "batch_size", "eval_puzzles")
    not_negative: ClassVar = (*RunConfig.not_negative, "puzzle_learning_rate", "puzzle_weight_decay")


class HrmTrainer(Run):
    """A run of HRM; what a row of the batch has come to is part of its state."""

    figures = ("cells", "exact")

    def __init__(
        self, folder: str | os.PathLike, model: Hrm, data: SudokuData | FolderData, config: HrmTrainConfig
    ) -> None:
        order = PuzzleOrder(data, config.batch_size, config.seed)
        super().__init__(folder, model, order, config, data.digest())
        self.data = data
        self._answers: bool | None = None
        self.shared = False  # among processes
        self.carry = model.initial_carry(config.batch_size)

    @classmethod
    def resume(cls, folder: str | os.PathLike, data: SudokuData | FolderData | None = None) -> "HrmTrainer":
        """The run that `folder` holds, at its last save; `threads` says how many it ran on. Sudoku is made again.

        Raises FileNotFoundError or ValueError: no state, an unreadable or half-written one, other data.
        """
        path = Path(folder) / STATE
        tensors, meta = read_state(path)
        kind = meta["model"].get("model_type")
        if kind != "hrm":
            raise ValueError(f"{path}: is a run of {kind}, not of hrm")
        with read_from(path):
            config = HrmTrainConfig.from_dict(meta["config"])
            if config.sudoku is not None:
                data = SudokuData(**config.sudoku)
            elif data is None:
                raise ValueError(f"{path}: the run was started on a folder of puzzles, which has to be given")
            trainer = cls(folder, Hrm(HrmConfig.from_dict(meta["model"])), data, config)
            trainer._restore(path, tensors, meta)
            trainer.order = PuzzleOrder(data, config.batch_size, config.seed, meta["epoch"], meta["position"])
            trainer.carry = HrmCarry(**part(tensors, "carry"))
        return trainer

    @property
    def held_out(self) -> SudokuData | FolderData | None:
        """None where no puzzle of an evaluation has labels."""
        if self._answers is None:
            self._answers = any((batch["labels"] != IGNORE).any() for batch in self._evaluation())
        return self.data if self._answers else None

    def _evaluation(self, first: bool = False) -> Iterator[Batch]:
        count = self.config.eval_puzzles
        if first and isinstance(self.data, FolderData):
            count = min(FIRST_PUZZLES, count or FIRST_PUZZLES)
        return self.data.evaluation(self.config.batch_size, count)

    def seconds_per_evaluation(self) -> float:
        """By the time that a few puzzles take."""
        if not self.held_out:
            return 0.0
        start = time.perf_counter()
        tried = evaluate(self.model, self._evaluation(first=True))["puzzles"]
        count = min(self.data.test_size, self.config.eval_puzzles or self.data.test_size)
        return (time.perf_counter() - start) * max(1.0, count / max(tried, 1))

    def _start_optimizers(self) -> None:
        super()._start_optimizers()
        self.puzzle_optimizer = None
        if self.model.config.puzzle_emb_dim:
            self.puzzle_optimizer = SignSGD(self.model.puzzle_emb)

    def share(self) -> None:
        """Goes on as one of torchrun's processes: each has the whole model and its part of the rows.

        Every process must have made or resumed the same run. What it computes is what one process would.
        """
        if self.config.batch_size < dist.get_world_size():
            raise ValueError(
                f"train: batch_size is {self.config.batch_size}; {dist.get_world_size()} processes need a puzzle each"
            )
        ranks.check_same(f"{self._data} {self.step_number} {self.config}", "data or options")
        self.shared = True
        self.carry = self._mine(self.carry)

    def _rows(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows."""
        world, rank = dist.get_world_size(), dist.get_rank()
        return {name: value.tensor_split(world)[rank] for name, value in values.items()}

    def _mine(self, carry: HrmCarry) -> HrmCarry:
        return HrmCarry(**self._rows(vars(carry)))

    def _gradients(self) -> tuple[Tensor, dict[str, Any]]:
        self.model.train()
        batch = self.order.next()
        if not self.shared:
            self.carry, out = self.model(self.carry, batch)
            out.loss.backward()
            return out.loss.detach(), _row(out, int(out.counted.sum()), int(out.correct.sum()))
        # drawn for all rows by each process, so that the draws do not depend on their number
        exploration = self.model.exploration(self.config.batch_size)
        mine = self._rows({**batch, "exploration": exploration})
        self.carry, out = self.model(self.carry, mine, exploration=mine["exploration"])
        counts = ranks.summed(torch.stack([out.counted.sum(), out.correct.sum()]))
        loss = out.loss * out.counted.sum() / counts[0].clamp(min=1)
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        whole = ranks.summed(torch.cat([grad.flatten() for grad in grads]))
        for grad, part_of in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part_of.view_as(grad))
        return ranks.summed(loss), _row(out, *counts.tolist())

    def _stepped(self) -> None:
        if self.puzzle_optimizer is not None:
            group, config = self.optimizer.param_groups[0], self.config
            rate, decay = group["lr"], group["weight_decay"]
            if config.puzzle_learning_rate is not None:
                rate = config.puzzle_learning_rate * config.rate_at(self.step_number - 1)
            if config.puzzle_weight_decay is not None:
                decay = config.puzzle_weight_decay
            self.puzzle_optimizer.param_groups[0] |= {"lr": rate, "weight_decay": decay}
            self.puzzle_optimizer.step()
            self.puzzle_optimizer.zero_grad()

    def _evaluate(self) -> dict[str, Any]:
        batches = self._evaluation(first=self.step_number == 0)
        if not self.shared:
            return evaluate(self.model, batches)
        own = itertools.islice(batches, dist.get_rank(), None, dist.get_world_size())
        return _figures(*ranks.summed(torch.tensor(_counts(self.model, own))).tolist())

    def _more_tensors(self) -> dict[str, Tensor]:
        carry = vars(self.carry)
        if self.shared:
            carry = {name: ranks.all_rows(value) for name, value in carry.items()}
        return {f"carry.{name}": value for name, value in carry.items()}

    @property
    def _writes(self) -> bool:
        return not self.shared or ranks.first()

    def _told_to_stop(self, stop: Callable[[], bool]) -> bool:
        return ranks.any_rank(stop()) if self.shared else stop()

    def _write_history(self) -> None:
        if self._writes:
            super()._write_history()

    def _write_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if self._writes:
            super()._write_state(tensors, meta)

    def _write_model(self) -> None:
        if self._writes:
            super()._write_model()


def _row(out: HrmOutput, puzzles: int, solved: int) -> dict[str, Any]:
    """Of the history: rows without labels are no puzzles."""
    row: dict[str, Any] = {"tokens": puzzles * out.logits.shape[1]}
    return row | ({"solved": solved / puzzles} if puzzles else {})


def evaluate(
    model: Hrm,
    batches: Iterator[Batch],
    *,
    segments: int = SEGMENTS,
    seen: Callable[[Batch, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """After the last segment, ``cells``: the share of the cells to fill that are right; ``exact``: of the puzzles, of
    which there are ``puzzles``.

    Puzzles without labels, whose solution is not known, are left out. seen: is given each batch with its answers (B, L) and
    q_halt (B,); puzzles without labels are then solved too."""
    return _figures(*_counts(model, batches, segments, seen))


def _figures(cells: int, right: int, solved: int, count: int) -> dict[str, float]:
    return {"cells": right / max(cells, 1), "exact": solved / max(count, 1), "puzzles": count}


@torch.no_grad()
def _counts(
    model: Hrm,
    batches: Iterator[Batch],
    segments: int = SEGMENTS,
    seen: Callable[[Batch, Tensor, Tensor], None] | None = None,
) -> tuple[int, int, int, int]:
    """Cells to fill, right ones among them, puzzles solved, puzzles."""
    model.eval()
    cells = right = solved = count = 0
    for batch in batches:
        if seen is None:
            known = (batch["labels"] != IGNORE).any(-1)
            if not known.any():
                continue
            batch = {name: value[known] for name, value in batch.items()}
        *_, (tokens, q_halt) = model.solve(batch["inputs"], batch["puzzle_ids"], segments=segments)
        if seen is not None:
            seen(batch, tokens, q_halt)
        counted = batch["labels"] != IGNORE
        known = counted.any(-1)
        hit = tokens == batch["labels"]
        asked = counted & (batch["inputs"] != batch["labels"])
        cells += int(asked.sum())
        right += int((hit & asked).sum())
        solved += int(((hit | ~counted).all(-1) & known).sum())
        count += int(known.sum())
    return cells, right, solved, count


@dataclass(frozen=True)
class Shown:
    """One board of a puzzle as it is solved: (side, side) arrays of digits, 0 for a blank."""

    title: str
    board: np.ndarray
    puzzle: np.ndarray
    solution: np.ndarray

    def __str__(self) -> str:
        return f"{self.title}\n{sudoku.draw(self.board, self.solution)}"


def show_steps(model: Hrm, batch: Batch) -> Iterator[Shown]:
    """The emptiest puzzle of a Sudoku batch as given, and after each segment that changed its board."""
    row = int((batch["inputs"] == 1).sum(-1).argmax())
    batch = {name: value[row : row + 1] for name, value in batch.items()}
    puzzle, solution = (sudoku.from_tokens(batch[name][0].numpy()) for name in ("inputs", "labels"))
    yield Shown("puzzle", puzzle, puzzle, solution)
    before, unchanged, sure = None, 0, ""
    model.eval()
    one = model.solve(batch["inputs"], batch["puzzle_ids"], segments=SEGMENTS)
    for number, (tokens, q_halt) in enumerate(one, 1):
        board = sudoku.from_tokens(tokens[0].numpy())
        sure = f"sure {float(q_halt.sigmoid()):.2f}"
        changed = None if before is None else int((board != before).sum())
        if changed == 0:
            unchanged += 1
            continue
        after = "" if changed is None else f", {changed} cell{'s' * (changed != 1)} changed"
        yield Shown(
            f"segment {number}: {int((board != solution).sum())} wrong{after}, {sure}",
            board,
            puzzle,
            solution,
        )
        before, unchanged = board, 0
    if unchanged:
        yield Shown(
            f"segment {SEGMENTS}: unchanged for {unchanged} segments, {sure}", before, puzzle, solution
        )


SHAPES = ("small", "trm", "published")


def model_config(data: SudokuData | FolderData, shape: str = "small") -> HrmConfig:
    """A model for ``data``. "small" learns within minutes on a CPU, its puzzles halting after four segments of training
    at most; "trm" is TRM's shape at that width; "published" is HRM's own."""
    if shape not in SHAPES:
        raise ValueError(f"train: shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
    sizes = dict(data.config)
    if shape != "published":
        sizes |= {"hidden_size": 64, "num_heads": 4, "intermediate_size": 192, "halt_max_steps": 4}
    if shape == "trm":
        return HrmConfig.trm(**sizes, puzzle_emb_len=1)  # 16 would double the work on a small board
    if shape == "small":
        sizes |= {"H_layers": 2, "L_layers": 2, "q_continue": False}
    return HrmConfig(**sizes)
