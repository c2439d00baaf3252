"""Training HRM on puzzles: Sudoku made on the spot or a folder of puzzles, deep supervision, accuracy over time."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._files import write_text
from .data import sudoku
from .data.puzzles import PuzzleFolder
from .models import Hrm, HrmConfig
from .optim import AdamATan2, SignSGD

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class HrmTrainConfig:
    """How a run trains; it ends after ``steps`` or ``minutes``, whichever comes first.

    One optimizer step a segment. ``batch_size`` puzzles; ``lr`` after ``warmup`` steps, for the puzzle embeddings
    too; ``weight_decay`` of both; ``ema`` of the weights that are evaluated and kept; an evaluation every
    ``eval_every`` steps.
    """

    steps: int = 2000
    minutes: float = 9.0
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    ema: float = 0.99
    eval_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Point:
    """One evaluation on held-out puzzles."""

    step: int
    seconds: float  # of training, evaluations left out
    loss: float  # training loss since the last point, mean a step
    cells: float  # share of the blank cells that are right
    exact: float  # share of the puzzles that are right


class SudokuData:
    """Puzzles with one solution, made from a seed; the held-out ones have solutions that training never shows.

    4 x 4: the 288 grids are split, 230 for training, and every batch is of new puzzles from a pool. Larger boards:
    ``puzzles`` training puzzles, and every batch shows random symmetries of them.

    Args:
        box: 2 for 4 x 4, 3 for 9 x 9.
        blanks: fewest and most blank cells.
        puzzles: training puzzles made; held_out: puzzles to evaluate on.
    """

    def __init__(
        self, box: int, *, blanks: tuple[int, int], puzzles: int = 2000, held_out: int = 200, seed: int = 0
    ) -> None:
        if box not in (2, 3):
            raise ValueError(f"sudoku: box is {box}; it must be 2 (4 x 4) or 3 (9 x 9)")
        if not 1 <= blanks[0] <= blanks[1] <= box**4 - 1:
            raise ValueError(f"sudoku: blanks is {blanks}; it must be from 1 to {box**4 - 1}, rising")
        rng = np.random.default_rng(seed)
        self.box = box
        self.blanks = blanks
        if box == 2:
            grids = sudoku.solutions(np.zeros((4, 4), dtype=np.int64), limit=288)
            order = rng.permutation(288)
            shown, hidden = ([grids[i] for i in part] for part in (order[:230], order[230:]))
            train = [shown[i] for i in rng.integers(len(shown), size=puzzles)]
            test = [hidden[i] for i in rng.integers(len(hidden), size=held_out)]
        else:
            train = [sudoku.random_grid(box, rng) for _ in range(puzzles)]
            test = [sudoku.random_grid(box, rng) for _ in range(held_out)]
        self.train = self._blank_out(train, rng)
        self.held_out = self._batch(*self._blank_out(test, rng))

    @property
    def config(self) -> dict[str, int]:
        """What HrmConfig has to know."""
        return {"vocab_size": sudoku.vocab_size(self.box), "seq_len": self.box**4}

    def batches(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        puzzles, grids = self.train
        while True:
            chosen = rng.integers(len(puzzles), size=batch_size)
            if self.box == 2:  # a symmetry could turn a training grid into a held-out one
                yield self._batch(puzzles[chosen], grids[chosen])
            else:
                pairs = [sudoku.shuffle(puzzles[i], grids[i], rng) for i in chosen]
                yield self._batch(np.stack([p for p, _ in pairs]), np.stack([g for _, g in pairs]))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.held_out["inputs"]), batch_size):
            yield {name: value[start : start + batch_size] for name, value in self.held_out.items()}

    def _blank_out(self, grids: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.blanks
        puzzles = [sudoku.make_puzzle(grid, int(rng.integers(low, high + 1)), rng) for grid in grids]
        return np.stack(puzzles), np.stack(grids)

    @staticmethod
    def _batch(puzzles: np.ndarray, grids: np.ndarray) -> Batch:
        return {
            "inputs": torch.from_numpy(sudoku.to_tokens(puzzles)),
            "labels": torch.from_numpy(sudoku.to_tokens(grids)),
            "puzzle_ids": torch.zeros(len(puzzles), dtype=torch.int64),
        }


class FolderData:
    """A puzzle folder's ``train`` and ``test`` splits (see :mod:`fastattn.data.puzzles`)."""

    def __init__(self, directory: str | Path) -> None:
        self._train, self._test = PuzzleFolder(directory, "train"), PuzzleFolder(directory, "test")
        metadata = self._train.metadata
        self.config = {
            "vocab_size": metadata.vocab_size,
            "seq_len": metadata.seq_len,
            "num_puzzles": metadata.num_puzzle_identifiers,
        }

    def batches(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        while True:
            yield from self._train.epoch(batch_size, rng)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        return self._test.examples(batch_size)


def train(
    model: Hrm,
    data: SudokuData | FolderData,
    config: HrmTrainConfig,
    *,
    report: Callable[[Point], None] = lambda point: None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[Point]:
    """Trains ``model`` in place and leaves it with its averaged weights; returns the evaluations in order.

    ``report`` gets each evaluation, ``progress`` each step's number and loss. Ctrl-C ends training early, and
    the model is left averaged all the same.
    """
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = AdamATan2(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, ema=config.ema)
    puzzle_optimizer = None
    if model.config.puzzle_emb_dim:
        puzzle_optimizer = SignSGD(model.puzzle_emb, lr=config.lr, weight_decay=config.weight_decay)
    batches = data.batches(config.batch_size, rng)
    carry = model.initial_carry(config.batch_size)
    points: list[Point] = []
    losses: list[float] = []
    seconds = 0.0
    try:
        for step in range(config.steps):
            started = time.perf_counter()
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup)
            carry, out = model(carry, next(batches), generator=generator)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            if puzzle_optimizer is not None:
                puzzle_optimizer.step()
            losses.append(float(out.loss.detach()))
            seconds += time.perf_counter() - started
            progress(step + 1, losses[-1])
            last = step + 1 == config.steps or seconds > 60 * config.minutes
            if last or (step + 1) % config.eval_every == 0:
                with optimizer.averaged():
                    cells, exact = evaluate(model, data.evaluation(config.batch_size))
                points.append(Point(step + 1, seconds, sum(losses) / len(losses), cells, exact))
                losses = []
                report(points[-1])
            if last:
                break
    except KeyboardInterrupt:
        pass
    with torch.no_grad():
        for p, state in optimizer.state.items():
            p.copy_(state["ema"])
    return points


@torch.no_grad()
def evaluate(model: Hrm, batches: Iterator[Batch]) -> tuple[float, float]:
    """(share of the cells to fill that are right, share of the puzzles that are) after the last segment."""
    model.eval()
    cells = right = solved = count = 0
    for batch in batches:
        *_, (tokens, _) = model.solve(batch["inputs"], batch["puzzle_ids"])
        counted = batch["labels"] != -100
        hit = tokens == batch["labels"]
        asked = counted & (batch["inputs"] != batch["labels"])
        cells += int(asked.sum())
        right += int((hit & asked).sum())
        solved += int((hit | ~counted).all(-1).sum())
        count += len(hit)
    return right / max(cells, 1), solved / max(count, 1)


def save_run(folder: str | Path, model: Hrm, points: list[Point], config: HrmTrainConfig) -> None:
    """The model, ``accuracy.json`` (every evaluation) and ``accuracy.png``."""
    folder = Path(folder)
    model.save_pretrained(folder)
    history = {"config": asdict(config), "points": [asdict(point) for point in points]}
    write_text(folder / "accuracy.json", json.dumps(history, indent=2) + "\n")
    plot(points, folder / "accuracy.png")


def plot(points: list[Point], path: Path) -> None:
    """Held-out accuracy and training loss over minutes of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ._files import replacing

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    minutes = [point.seconds / 60 for point in points]
    axes.plot(minutes, [100 * point.exact for point in points], label="puzzles solved", color="tab:blue")
    axes.plot(minutes, [100 * point.cells for point in points], label="blank cells right", color="tab:cyan")
    axes.set(xlabel="minutes of training", ylabel="held-out accuracy, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    loss = axes.twinx()
    loss.plot(minutes, [point.loss for point in points], label="training loss", color="tab:orange")
    loss.set(ylabel="training loss", ylim=(0, None))
    lines = axes.get_lines() + loss.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def show_steps(model: Hrm, batch: Batch) -> Iterator[str]:
    """The first puzzle of a Sudoku batch, as given and after each segment; wrong digits are marked with ``!``."""
    grid = sudoku.from_tokens(batch["labels"][0].numpy())
    yield f"puzzle\n{sudoku.draw(sudoku.from_tokens(batch['inputs'][0].numpy()))}"
    before = None
    model.eval()
    one = model.solve(batch["inputs"][:1], batch["puzzle_ids"][:1])
    for number, (tokens, q_halt) in enumerate(one, 1):
        board = sudoku.from_tokens(tokens[0].numpy())
        changed = "" if before is None else f", {int((board != before).sum())} cells changed"
        wrong = int((board != grid).sum())
        head = f"segment {number}: {wrong} wrong{changed}, sure {float(q_halt.sigmoid()):.2f}"
        yield f"{head}\n{sudoku.draw(board, grid)}"
        before = board


def model_config(data: SudokuData | FolderData, *, size: str = "small", trm: bool = False) -> HrmConfig:
    """A model for ``data``: size "small" learns within minutes on a CPU, "full" is the published one."""
    if size not in ("small", "full"):
        raise ValueError(f"train: size is {size!r}; it must be 'small' or 'full'")
    shape = dict(data.config)
    if size == "small":
        shape |= {"hidden_size": 64, "num_heads": 4, "intermediate_size": 192}
        shape |= {"H_layers": 2, "L_layers": 2, "q_continue": False}
    return HrmConfig.trm(**shape) if trm else HrmConfig(**shape)
