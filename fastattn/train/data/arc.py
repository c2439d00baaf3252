"""ARC: task files to folders of puzzles, each task under many symmetries, and answers brought back from them."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.files import read_json
from .grids import SYMMETRIES, symmetry, undone

SIDE = 30  # of the largest grid there is
COLORS = 10
PAD, END, FIRST_COLOR = 0, 1, 2  # tokens; color c is token c + 2
VOCAB_SIZE = COLORS + 2
IDENTIFIERS, TESTS = "identifiers.json", "test_puzzles.json"
_TRIES = 5  # draws for each image wanted, before a task seems to have no more

Grid = np.ndarray  # (rows, columns) uint8, colors 0 to 9
Pair = tuple[Grid, Grid | None]  # input and output; None: not known


@dataclass(frozen=True)
class Task:
    """Pairs that show a rule, and tests of it."""

    name: str
    set: str
    train: list[Pair]
    test: list[Pair]
    where: str = field(default="", compare=False)

    @property
    def side(self) -> int:
        """Of its largest grid."""
        return max(max(grid.shape) for pair in (*self.train, *self.test) for grid in pair if grid is not None)


@dataclass(frozen=True)
class Image:
    """A symmetry of the grid, then colors renamed: color c becomes ``colors[c]``, black (0) stays."""

    symmetry: int = 0
    colors: tuple[int, ...] = tuple(range(COLORS))

    def of(self, grid: Grid) -> Grid:
        return symmetry(np.array(self.colors, np.uint8)[grid], self.symmetry)

    def back(self, grid: Grid) -> Grid:
        """The grid whose image is ``grid``."""
        return np.argsort(self.colors).astype(np.uint8)[undone(grid, self.symmetry)]

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Image":
        return cls(
            int(rng.integers(SYMMETRIES)), (0, *(1 + int(color) for color in rng.permutation(COLORS - 1)))
        )


_NAMES = re.compile(r"(.+?)(?:\|\|\|t([0-7])\|\|\||_t([0-7])_)([0-9]{10})")


def image_name(task: str, image: Image) -> str:
    """The name of a task's image, as TRM's builder writes it."""
    if image == Image():
        return task
    return f"{task}|||t{image.symmetry}|||{''.join(map(str, image.colors))}"


def named_image(name: str) -> tuple[str, Image]:
    """(task, image) of a name in the list of identifiers, as TRM's (``|||``) or HRM's builder (``_``) writes it."""
    match = _NAMES.fullmatch(name)
    if match is None or sorted(match[4]) != sorted("0123456789"):
        return name, Image()
    return match[1], Image(int(match[2] or match[3]), tuple(map(int, match[4])))


def to_tokens(grid: Grid, side: int = SIDE, row: int = 0, column: int = 0) -> np.ndarray:
    """(side * side,) uint8: the grid with its corner at (row, column), END along its right and lower edges, else padding."""
    tokens = np.zeros((side, side), np.uint8)
    end_row, end_column = row + grid.shape[0], column + grid.shape[1]
    tokens[row:end_row, column:end_column] = grid + FIRST_COLOR
    if end_row < side:
        tokens[end_row, column:end_column] = END
    if end_column < side:
        tokens[row:end_row, end_column] = END
    return tokens.ravel()


def from_tokens(tokens: np.ndarray) -> Grid | None:
    """The largest rectangle of colors at the upper left; None where there is none. Of equal ones the one of fewest rows."""
    side = round(len(tokens) ** 0.5)
    grid = np.asarray(tokens).reshape(side, side)
    colored = (grid >= FIRST_COLOR) & (grid < VOCAB_SIZE)
    run = np.where(colored.all(1), side, colored.argmin(1))  # colors that each row begins with
    width = np.minimum.accumulate(run)
    area = width * np.arange(1, side + 1)
    rows = int(area.argmax()) + 1
    if area[rows - 1] == 0:
        return None
    return (grid[:rows, : width[rows - 1]] - FIRST_COLOR).astype(np.uint8)


def as_grid(value: Any, where: str) -> Grid:
    """A grid of a task file; ValueError naming where it stands."""
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) > 0 for row in rows):
        raise ValueError(f"{where}: must be a list of rows of equal length")
    if max(len(rows), len(rows[0])) > SIDE:
        raise ValueError(f"{where}: is {len(rows)} x {len(rows[0])}; at most {SIDE} x {SIDE} are allowed")
    for row in rows:
        for cell in row:
            if isinstance(cell, bool) or not isinstance(cell, int) or not 0 <= cell < COLORS:
                raise ValueError(f"{where}: holds {cell!r}; colors are from 0 to {COLORS - 1}")
    return np.array(rows, np.uint8)


def as_task(value: Any, name: str, set_name: str, where: str) -> Task:
    """A task of a file's JSON: ``train`` and ``test``, lists of ``input`` and ``output``; a test's output may be missing."""
    if not isinstance(value, Mapping) or not all(isinstance(value.get(k), list) for k in ("train", "test")):
        raise ValueError(f"{where}: not an ARC task: an object with the lists train and test is needed")
    pairs: dict[str, list[Pair]] = {}
    for part in ("train", "test"):
        pairs[part] = []
        for number, pair in enumerate(value[part], 1):
            place = f"{where}: {part} {number}"
            if not isinstance(pair, Mapping) or "input" not in pair:
                raise ValueError(f"{place}: an object with an input is needed")
            output = pair.get("output")
            if output is None and part == "train":
                raise ValueError(f"{place}: has no output")
            pairs[part].append(
                (
                    as_grid(pair["input"], f"{place}: input"),
                    None if output is None else as_grid(output, f"{place}: output"),
                )
            )
    if not pairs["train"] and not pairs["test"]:
        raise ValueError(f"{where}: holds no pair")
    return Task(name, set_name, pairs["train"], pairs["test"], where)


def read_tasks(sources: Iterable[str | os.PathLike]) -> list[Task]:
    """Every task beneath folders, or in files.

    Two layouts are known. A file a task, ``SET/NAME.json`` (ARC-AGI-1, ARC-AGI-2 and ConceptARC): the set is the name of its
    folder. ``PREFIX_SET_challenges.json``, all tasks of a set by name, with ``PREFIX_SET_solutions.json`` beside it (Kaggle,
    TRM): without that file the outputs of its tests are not known. In a folder that has both kinds the second alone is read.

    Raises:
        FileNotFoundError, ValueError: no task, or a file that holds none, by name.
    """
    tasks = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
        paths = [path for path in paths if not any(p.startswith(".") for p in path.relative_to(source).parts)]
        challenges = [path for path in paths if path.name.endswith("_challenges.json")]
        own = []
        for path in challenges or paths:
            value = read_json(path)
            if challenges:
                own += _challenges(path, value)
            else:
                name = value.get("name") if isinstance(value, Mapping) else None
                own.append(
                    as_task(
                        *(value, name if isinstance(name, str) else path.stem), path.parent.name, str(path)
                    )
                )
        if not own:
            raise ValueError(f"{source}: holds no ARC task: a folder of JSON files is needed")
        tasks += own
    return tasks


def _challenges(path: Path, values: Any) -> Iterator[Task]:
    stem = path.name.removesuffix("_challenges.json")
    solutions_path = path.with_name(f"{stem}_solutions.json")
    solutions = read_json(solutions_path) if solutions_path.is_file() else {}
    if not isinstance(values, Mapping) or not isinstance(solutions, Mapping):
        raise ValueError(
            f"{path if not isinstance(values, Mapping) else solutions_path}: tasks by name are needed"
        )
    for name, value in values.items():
        task = as_task(value, name, stem.rsplit("_", 1)[-1], f"{path}: {name}")
        outputs = solutions.get(name)
        if outputs is not None:
            where = f"{solutions_path}: {name}"
            if not isinstance(outputs, list) or len(outputs) != len(task.test):
                raise ValueError(f"{where}: the outputs of {len(task.test)} tests are needed")
            task.test[:] = [
                (given, as_grid(output, f"{where}: output {number}"))
                for number, ((given, _), output) in enumerate(zip(task.test, outputs, strict=True), 1)
            ]
        yield task


def images_of(task: Task, count: int, rng: np.random.Generator) -> list[Image]:
    """The task itself, and up to ``count`` random images of it, no two alike (in any order of the pairs)."""
    turned = []  # of each symmetry, the shapes and the cells of each pair
    for number in range(SYMMETRIES):
        pairs = [[symmetry(g, number) for g in pair if g is not None] for pair in (*task.train, *task.test)]
        turned.append([(tuple(g.shape for g in pair), b"".join(g.tobytes() for g in pair)) for pair in pairs])

    def looks(image: Image) -> tuple:
        table = bytes(image.colors) + bytes(256 - COLORS)
        return tuple(sorted((shapes, cells.translate(table)) for shapes, cells in turned[image.symmetry]))

    images, seen = [Image()], {looks(Image())}
    for _ in range(_TRIES * count):
        if len(images) > count:
            break
        image = Image.random(rng)
        look = looks(image)
        if look not in seen:
            seen.add(look)
            images.append(image)
    return images


def _bytes(grid: Grid) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


class Votes:
    """Answers to the tests of ARC's tasks, each given for many images of a test, brought back and counted.

    Args:
        names: of each puzzle identifier, as the folder's identifiers.json has them.
        tests: the tests of each task that is asked.
    """

    def __init__(self, names: list[str], tests: Mapping[str, list[Pair]]) -> None:
        self.tests = tests
        self._images = [named_image(name) for name in names]
        self._asked = {name: {_bytes(given) for given, _ in pairs} for name, pairs in tests.items()}
        # task and test -> answer -> (grid, votes, sum of the halting probability)
        self._votes: dict[tuple[str, bytes], dict[bytes, list[Any]]] = {}

    def add(
        self, puzzle_ids: Iterable[int], inputs: np.ndarray, answers: np.ndarray, sure: Iterable[float]
    ) -> None:
        """Counts answers (B, L) to inputs (B, L), tokens of grids whose corner is the upper left; ``sure``: the model's
        probability that each is right. An answer that holds no grid is not counted.

        Raises:
            ValueError: an input that is no test of its puzzle.
        """
        for number, given, answer, chance in zip(puzzle_ids, inputs, answers, sure, strict=True):
            task, image = self._images[int(number)]
            grid = from_tokens(given)
            test = None if grid is None else _bytes(image.back(grid))
            if test not in self._asked.get(task, ()):
                raise ValueError(f"ARC: an input of puzzle {number} is no test of task {task!r}")
            self._votes.setdefault((task, test), {})
            back = from_tokens(answer)
            if back is not None:
                back = image.back(back)
                entry = self._votes[task, test].setdefault(_bytes(back), [back, 0, 0.0])
                entry[1] += 1
                entry[2] += float(chance)

    def ranking(self, task: str, given: Grid) -> list[tuple[Grid, int, float]]:
        """(grid, votes, mean probability) of each answer to a test: most votes first, of equal ones the likeliest."""
        entries = self._votes.get((task, _bytes(given)), {}).values()
        found = [(grid, votes, total / votes) for grid, votes, total in entries]
        return sorted(found, key=lambda entry: entry[1:], reverse=True)

    def asked(self) -> list[str]:
        """Tasks of which every test was answered and its output is known."""
        return [
            name
            for name, pairs in self.tests.items()
            if pairs
            and all(output is not None and (name, _bytes(given)) in self._votes for given, output in pairs)
        ]

    def pass_at(self, counts: Iterable[int] = (1, 2, 5, 10, 100, 1000)) -> dict[int, tuple[float, float]]:
        """For each k, over the tasks of :meth:`asked`: the mean share of a task's tests whose output is among the k first of
        :meth:`ranking` (ARC Prize's score, TRM's pass@k), and the share of tasks all of whose tests are (HRM's)."""
        tasks = self.asked()
        places = {
            name: [
                next(
                    (
                        place
                        for place, (grid, *_) in enumerate(self.ranking(name, given))
                        if _bytes(grid) == _bytes(output)
                    ),
                    np.inf,
                )
                for given, output in self.tests[name]
            ]
            for name in tasks
        }
        result = {}
        for k in counts:
            shares = [np.mean([place < k for place in places[name]]) for name in tasks]
            whole = float(np.mean([share == 1 for share in shares])) if tasks else 0.0
            result[k] = (float(np.mean(shares)) if tasks else 0.0, whole)
        return result

    def submission(self, attempts: int = 2) -> dict[str, list[dict[str, list[list[int]]]]]:
        """Kaggle's file: for each test of each task ``attempt_1`` and so on; a test without so many answers repeats its
        first, and one without any has a black cell."""

        def one(task: str, given: Grid) -> dict[str, list[list[int]]]:
            grids = [grid.tolist() for grid, *_ in self.ranking(task, given)[:attempts]]
            grids += [grids[0] if grids else [[0]]] * (attempts - len(grids))
            return {f"attempt_{number}": grid for number, grid in enumerate(grids, 1)}

        return {task: [one(task, given) for given, _ in pairs] for task, pairs in self.tests.items()}


def draw(grid: Grid) -> str:
    """Rows of digits, black as a dot."""
    return "\n".join(" ".join("." if color == 0 else str(color) for color in row) for row in grid)
