"""What HRM trains on and is held to: Sudoku made from a seed, or the two splits of a folder of puzzles."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sudoku
from .puzzles import PuzzleFolder, digest

Batch = dict[str, Tensor]
_TRIES = 50  # draws for each puzzle wanted, before there seem to be too few


class SudokuData:
    """Puzzles with one solution, made from a seed; training shows random symmetries of its puzzles.

    4 x 4: no image of a held-out puzzle under the symmetries (digits renamed, transposition, bands, stacks, rows and
    columns permuted) is ever trained on, and no two held-out puzzles are images of each other. Their solutions are
    seen: all 288 grids are images of two. 9 x 9: no training puzzle equals a held-out one; the symmetries are 1.2 * 10^12
    and are not searched.

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
        for name, count in (("puzzles", puzzles), ("held_out", held_out)):
            if count < 1:
                raise ValueError(f"sudoku: {name} is {count}; it must be at least 1")
        self.options: dict[str, Any] = {
            "box": box,
            "blanks": tuple(blanks),
            "puzzles": puzzles,
            "held_out": held_out,
            "seed": seed,
        }
        self.box = box
        self.blanks = blanks
        rng = np.random.default_rng(seed)
        self._kept: set[Any] = set()
        held = self._draw(held_out, rng, keep=True)
        self.train = self._draw(puzzles, rng, keep=False)
        self.held_out = _batch(*held)

    @property
    def config(self) -> dict[str, int]:
        """What HrmConfig has to know."""
        return {"vocab_size": sudoku.vocab_size(self.box), "seq_len": self.box**4}

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Every training puzzle in random order and under a random symmetry; the last batch is filled up with more."""
        puzzles, grids = self.train
        count = -(len(puzzles) // -batch_size) * batch_size
        order = np.resize(rng.permutation(len(puzzles)), count)
        for start in range(0, count, batch_size):
            pairs = [sudoku.shuffle(puzzles[i], grids[i], rng) for i in order[start : start + batch_size]]
            yield _batch(np.stack([p for p, _ in pairs]), np.stack([g for _, g in pairs]))

    def evaluation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """The held-out puzzles, or the first ``count`` of them."""
        total = self.test_size if count is None else min(count, self.test_size)
        for start in range(0, total, batch_size):
            yield {
                name: value[start : min(start + batch_size, total)] for name, value in self.held_out.items()
            }

    @property
    def test_size(self) -> int:
        return len(self.held_out["inputs"])

    def guesses(self) -> dict[str, float]:
        """Share of the held-out blank cells that a guess gets right: any digit, or one that the board still lacks, as
        often as it lacks it."""
        side = self.box**2
        right = total = 0.0
        boards, grids = (sudoku.from_tokens(self.held_out[name].numpy()) for name in ("inputs", "labels"))
        for board, grid in zip(boards, grids, strict=True):
            lacking = np.bincount(grid[board == 0], minlength=side + 1)
            right += (lacking**2).sum() / lacking.sum()
            total += lacking.sum()
        return {"any digit": 1 / side, "a digit the board lacks": float(right / total)}

    def digest(self) -> str:
        return digest([*self.train, *(value.numpy() for value in self.held_out.values())])

    def _draw(self, count: int, rng: np.random.Generator, *, keep: bool) -> tuple[np.ndarray, np.ndarray]:
        """(puzzles, grids), none of a kind that was kept; ``keep`` keeps theirs."""
        low, high = self.blanks
        pairs = []
        for _ in range(_TRIES * count):
            grid = sudoku.random_grid(self.box, rng)
            puzzle = sudoku.make_puzzle(grid, int(rng.integers(low, high + 1)), rng)
            kind = sudoku.canonical(puzzle) if self.box == 2 else puzzle.tobytes()
            if kind in self._kept:
                continue
            if keep:
                self._kept.add(kind)
            pairs.append((puzzle, grid))
            if len(pairs) == count:
                return np.stack([p for p, _ in pairs]), np.stack([g for _, g in pairs])
        raise ValueError(
            f"sudoku: with {low} to {high} blanks there are too few different puzzles to hold out "
            f"{self.options['held_out']}"
        )


class FolderData:
    """A puzzle folder's ``train`` and ``test`` splits (see :mod:`fastattn.train.data.puzzles`)."""

    def __init__(self, directory: str | Path) -> None:
        self._train, self._test = PuzzleFolder(directory, "train"), PuzzleFolder(directory, "test")
        metadata = self._train.metadata
        self.options = None
        self.config = {
            "vocab_size": metadata.vocab_size,
            "seq_len": metadata.seq_len,
            "num_puzzles": metadata.num_puzzle_identifiers,
        }

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        return self._train.epoch(batch_size, rng)

    def evaluation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """The test split, or ``count`` of its puzzles at even distances."""
        return self._test.examples(batch_size, count)

    @property
    def test_size(self) -> int:
        return len(self._test)

    def digest(self) -> str:
        return self._train.digest() + self._test.digest()


def _batch(puzzles: np.ndarray, grids: np.ndarray) -> Batch:
    return {
        "inputs": torch.from_numpy(sudoku.to_tokens(puzzles)),
        "labels": torch.from_numpy(sudoku.to_tokens(grids)),
        "puzzle_ids": torch.zeros(len(puzzles), dtype=torch.int64),
    }
