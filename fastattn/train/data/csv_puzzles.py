"""Folders of puzzles from the CSV files in which Sudoku-Extreme and Maze-Hard are published: ``train.csv`` and ``test.csv``
with the columns question and answer, and if need be rating."""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ...runtime.files import write_text
from . import sudoku
from .grids import SYMMETRIES, symmetry
from .puzzles import write_split

MAZE_ALPHABET = "# SGo"  # wall, free, start, goal, path: tokens 1 to 5
IDENTIFIERS = "identifiers.json"
_CHECKED = 65536  # boards at a time
Pair = tuple[np.ndarray, np.ndarray]


def build_sudoku(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    sample: int | None = None,
    augmentations: int = 0,
    min_rating: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Sudoku-Extreme's layout: 81 cells a board (4 x 4 boards of 16 are read too), digits, ``0`` or ``.`` for a blank.

    Args:
        source: folder of train.csv and test.csv.
        output: folder to write, in the layout of :mod:`fastattn.train.data.puzzles`.
        sample: training boards kept, drawn at random; None for all.
        augmentations: random symmetries of each training board beside itself (:func:`sudoku.shuffle`); a group.
        min_rating: boards of a smaller rating are left out, in both splits.

    Returns:
        A line on each split.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, or a line that holds no board and its solution, by number.
    """
    blank_table, digit_table = np.zeros((2, 256), np.uint8)
    for digit in range(1, 10):
        blank_table[ord(str(digit))] = digit_table[ord(str(digit))] = digit + 1
    blank_table[[ord("0"), ord(".")]] = 1
    rng = np.random.default_rng(seed)
    said = []
    for split in ("train", "test"):
        path = Path(source) / f"{split}.csv"
        boards, grids = _read(path, (blank_table, digit_table), min_rating)
        side = boards.shape[1]
        if side not in (4, 9):
            raise ValueError(f"{path}: its boards are {side} x {side}; 9 x 9 and 4 x 4 are read")
        _check_solutions(path, boards - 1, grids - 1)
        count = augmentations if split == "train" else 0
        if split == "train":
            boards, grids = _sampled((boards, grids), sample, rng)

        def images(pairs: Iterable[Pair], count: int = count) -> Iterator[list[Pair]]:
            for board, grid in pairs:
                moved = [sudoku.shuffle(board - 1, grid - 1, rng) for _ in range(count)]
                yield [(board, grid), *((a + 1, b + 1) for a, b in moved)]

        said.append(
            _write(
                *(output, split, images(zip(boards, grids, strict=True))),
                groups=len(boards),
                images=1 + count,
                side=side,
                vocab_size=sudoku.vocab_size(round(side**0.5)),
            )
        )
    write_text(Path(output) / IDENTIFIERS, '["<blank>"]\n')
    return said


def build_maze(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    sample: int | None = None,
    symmetries: bool = False,
    seed: int = 0,
) -> list[str]:
    """Maze-Hard's layout: square mazes of ``#`` (wall), space, ``S``, ``G``, and ``o`` where the answer's path goes.

    Arguments, what is returned and raised as of :func:`build_sudoku`. symmetries: all eight images of each training maze, a
    group, in place of itself alone.
    """
    table = np.zeros(256, np.uint8)
    table[[ord(character) for character in MAZE_ALPHABET]] = 1 + np.arange(len(MAZE_ALPHABET))
    rng = np.random.default_rng(seed)
    said = []
    for split in ("train", "test"):
        mazes = _read(Path(source) / f"{split}.csv", (table, table), None)
        if split == "train":
            mazes = _sampled(mazes, sample, rng)
        count = SYMMETRIES if symmetries and split == "train" else 1

        def images(pairs: Iterable[Pair], count: int = count) -> Iterator[list[Pair]]:
            for maze, path in pairs:
                yield [(symmetry(maze, n), symmetry(path, n)) for n in range(count)]

        said.append(
            _write(
                *(output, split, images(zip(*mazes, strict=True))),
                groups=len(mazes[0]),
                images=count,
                side=mazes[0].shape[1],
                vocab_size=len(MAZE_ALPHABET) + 1,
            )
        )
    write_text(Path(output) / IDENTIFIERS, '["<blank>"]\n')
    return said


def _read(path: Path, tables: tuple[np.ndarray, np.ndarray], min_rating: int | None) -> Pair:
    """Questions and answers as tokens (n, side, side), by a table from characters to tokens for each; 0 is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder with train.csv and test.csv is needed")
    texts = bytearray(), bytearray()
    cells = 0
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            names = [name.strip().lower() for name in next(reader, [])]
            wanted = ["question", "answer", *(["rating"] if min_rating is not None else [])]
            missing = [name for name in wanted if name not in names]
            if missing:
                raise ValueError(
                    f"{path}: its first line names no column {', '.join(missing)}; it has {', '.join(names)}"
                )
            columns = [names.index(name) for name in wanted]
            for row in reader:
                if not row:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(row) != len(names):
                    raise ValueError(f"{where}: has {len(row)} fields; the first line names {len(names)}")
                question, answer, *rating = (row[column] for column in columns)
                if rating and _number(rating[0], where) < min_rating:
                    continue
                cells = cells or len(question)
                if len(question) != cells or len(answer) != cells:
                    raise ValueError(
                        f"{where}: has {len(question)} cells and {len(answer)} in its answer, not {cells}"
                    )
                for text, data in zip((question, answer), texts, strict=True):
                    data += text.encode("latin-1", "replace")
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as CSV: {error}") from error
    if not lines:
        raise ValueError(f"{path}: holds no puzzle" + (" of this rating" if min_rating is not None else ""))
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(f"{path}: a puzzle has {cells} cells; a square number is needed")
    tokens = []
    for name, data, table in zip(wanted, texts, tables, strict=False):
        characters = np.frombuffer(data, np.uint8).reshape(-1, side, side)
        values = table[characters]
        bad = np.argwhere(values == 0)
        if len(bad):
            raise ValueError(
                f"{path}:{lines[bad[0, 0]]}: {chr(characters[tuple(bad[0])])!r} is no cell of its {name}"
            )
        tokens.append(values)
    return tokens[0], tokens[1]


def _number(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: rating is {text!r}; a whole number is needed") from None


def _check_solutions(path: Path, boards: np.ndarray, grids: np.ndarray) -> None:
    """Boards and grids (n, side, side) of digits: each grid keeps its board's givens and Sudoku's rules."""
    n, side, _ = boards.shape
    box = round(side**0.5)
    every = 2 ** (side + 1) - 2
    kept = np.ones(n, dtype=bool)
    for start in range(0, n, _CHECKED):
        part = slice(start, start + _CHECKED)
        board, bits = boards[part], np.int16(1) << grids[part].astype(np.int16)
        boxes = bits.reshape(-1, box, box, box, box).swapaxes(2, 3).reshape(bits.shape)
        for lines in (bits, bits.swapaxes(1, 2), boxes):
            kept[part] &= (np.bitwise_or.reduce(lines, axis=2) == every).all(1)
        kept[part] &= ((board == 0) | (board == grids[part])).all((1, 2))
    if not kept.all():
        raise ValueError(
            f"{path}: the answer of puzzle {int(np.argmin(kept)) + 1} is no solution of its question; "
            f"{int((~kept).sum())} are none"
        )


def _sampled(pair: Pair, count: int | None, rng: np.random.Generator) -> Pair:
    if count is None or count >= len(pair[0]):
        return pair
    chosen = rng.choice(len(pair[0]), count, replace=False)
    return pair[0][chosen], pair[1][chosen]


def _write(
    output: str | os.PathLike,
    split: str,
    pieces: Iterable[list[Pair]],
    *,
    groups: int,
    images: int,
    side: int,
    vocab_size: int,
) -> str:
    """A puzzle an example and ``images`` of them a group, all with identifier 0."""
    rows = (
        tuple(np.stack([pair[i].ravel() for pair in group]) for i in range(2)) for group in pieces
    )  # (images, cells) each
    write_split(
        *(output, split, rows),
        vocab_size=vocab_size,
        seq_len=side * side,
        puzzle_identifiers=np.zeros(groups * images),
        puzzle_indices=np.arange(groups * images + 1),
        group_indices=np.arange(groups + 1) * images,
    )
    return f"{split}: {groups:,} puzzles of {side} x {side} cells" + (
        f", each under {images:,} symmetries" if images > 1 else ""
    )
