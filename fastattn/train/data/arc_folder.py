"""Folders of puzzles made of ARC's tasks, and the votes over such a folder."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from ...runtime.files import read_json, write_text
from . import arc
from .arc import Image, Pair, Task
from .puzzles import PuzzleFolder, write_split

BLANK = "<blank>"


def build_arc(
    sources: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    test_set: str = "evaluation",
    sets: Collection[str] | None = None,
    augmentations: int = 1000,
    side: int = arc.SIDE,
    seed: int = 0,
) -> list[str]:
    """A folder of puzzles of ARC's tasks, as HRM and TRM train on them.

    A puzzle is a task under one image (a symmetry of the grid, colors renamed but for black), with an identifier of its own; a
    group is a task with its images. The training split has the pairs of every task, and the tests of those outside
    ``test_set``; the test split has the tests of that set, where outputs that are not known are all padding. In the training
    split all pairs of a puzzle but one, drawn at random, stand at a random place of the grid.

    Args:
        sources: files or folders, see :func:`fastattn.train.data.arc.read_tasks`.
        output: folder to write, with identifiers.json (a name for each identifier) and test_puzzles.json, as TRM has them.
        test_set: the set whose tests are held out.
        sets: those that are read; None for all.
        augmentations: images of each task beside itself, no two alike; a task that has fewer gets what there are.
        side: of the square that a grid is put in; tasks with larger grids are left out.
        seed: of images and places.

    Returns:
        A line on each split, and on what was left out or is in both.

    Raises:
        FileNotFoundError, ValueError: a source without tasks, a file that holds none, a set that is not there, two different
            tasks of one name.
    """
    tasks, said = _chosen(arc.read_tasks(sources), test_set, sets)
    large = [task for task in tasks if task.side > side]
    tasks = [task for task in tasks if task.side <= side]
    if large:
        said.append(f"{len(large):,} tasks have grids larger than {side} x {side} and are left out")
    images = [
        arc.images_of(task, augmentations, np.random.default_rng([seed, number]))
        for number, task in enumerate(tasks)
    ]
    fewer = sum(len(own) <= augmentations for own in images)
    if fewer:
        said.append(f"{fewer:,} tasks have fewer than {augmentations:,} images")
    starts = np.cumsum([1, *map(len, images)])  # of the identifiers of each task
    names = [BLANK]
    for task, own in zip(tasks, images, strict=True):
        names += [arc.image_name(task.name, image) for image in own]

    held = [task.set == test_set for task in tasks]
    train_pairs = [
        task.train if out else [*task.train, *(pair for pair in task.test if pair[1] is not None)]
        for task, out in zip(tasks, held, strict=True)
    ]
    test_pairs = [task.test if out else [] for task, out in zip(tasks, held, strict=True)]
    shared = _shared(train_pairs, test_pairs)
    if shared:
        said.append(
            f"{shared:,} of the held-out tests are pairs that another task trains on: leave its set out with sets"
        )
    for split, pairs in (("train", train_pairs), ("test", test_pairs)):
        rng = np.random.default_rng([seed, len(tasks)]) if split == "train" else None
        used = [number for number, own in enumerate(pairs) if own]
        if not used:
            raise ValueError(f"ARC: the {split} split has no pair")
        counts = np.repeat([len(pairs[n]) for n in used], [len(images[n]) for n in used])
        write_split(
            *(output, split, _examples(((pairs[n], images[n]) for n in used), side, rng)),
            vocab_size=arc.VOCAB_SIZE,
            seq_len=side * side,
            puzzle_identifiers=np.concatenate([starts[n] + np.arange(len(images[n])) for n in used]),
            puzzle_indices=np.cumsum([0, *counts]),
            group_indices=np.cumsum([0, *(len(images[n]) for n in used)]),
            num_identifiers=len(names),
        )
        said.append(
            f"{split}: {len(used):,} tasks, {len(counts):,} with their images, {counts.sum():,} pairs"
        )
    write_text(Path(output) / arc.IDENTIFIERS, json.dumps(names) + "\n")
    tests = {task.name: _as_json(task) for task, out in zip(tasks, held, strict=True) if out}
    write_text(Path(output) / arc.TESTS, json.dumps(tests) + "\n")
    return said


def _chosen(tasks: list[Task], test_set: str, sets: Collection[str] | None) -> tuple[list[Task], list[str]]:
    """The tasks of the sets, each once, by set and name."""
    known = sorted({task.set for task in tasks})
    for name in (*(sets or ()), test_set):
        if name not in known:
            raise ValueError(f"ARC: there is no set {name!r}; there are {', '.join(known)}")
    if sets is not None:
        if test_set not in sets:
            raise ValueError(f"ARC: the test set {test_set!r} must be one of the sets, {', '.join(sets)}")
        tasks = [task for task in tasks if task.set in sets]
    by_name: dict[str, Task] = {}
    twice = 0
    # the held-out set first: a task that is in another set too is held out
    for task in sorted(tasks, key=lambda task: (task.set != test_set, task.set, task.name)):
        first = by_name.setdefault(task.name, task)
        if first is task:
            continue
        if _as_json(first) != _as_json(task):
            raise ValueError(
                f"{task.where}: a task of this name, with other pairs, is in {first.where}; choose one by the sets"
            )
        twice += 1
    chosen = sorted(by_name.values(), key=lambda task: (task.set, task.name))
    return chosen, [
        f"{twice:,} tasks are there twice and are taken once, as held out if one is"
    ] if twice else []


def _as_json(task: Task) -> dict[str, list[dict[str, list[list[int]]]]]:
    def pairs(values: list[Pair]) -> list[dict[str, list[list[int]]]]:
        return [
            {"input": given.tolist()} | ({} if output is None else {"output": output.tolist()})
            for given, output in values
        ]

    return {"train": pairs(task.train), "test": pairs(task.test)}


def _shared(train: list[list[Pair]], test: list[list[Pair]]) -> int:
    def key(pair: Pair) -> tuple[bytes, ...]:
        return tuple(bytes(grid.shape) + grid.tobytes() for grid in pair if grid is not None)

    trained = {key(pair) for pairs in train for pair in pairs}
    return sum(key(pair) in trained for pairs in test for pair in pairs if pair[1] is not None)


def _examples(
    groups: Iterable[tuple[list[Pair], list[Image]]], side: int, rng: np.random.Generator | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, labels) of each puzzle; with ``rng`` all pairs but one at random places."""
    for pairs, images in groups:
        for image in images:
            inputs = np.zeros((len(pairs), side * side), np.uint8)
            labels = np.zeros_like(inputs)
            fixed = None if rng is None else int(rng.integers(len(pairs)))
            for number, pair in enumerate(pairs):
                grids = [None if grid is None else image.of(grid) for grid in pair]
                row = column = 0
                if rng is not None and number != fixed:
                    shapes = [grid.shape for grid in grids if grid is not None]
                    row, column = (
                        int(rng.integers(side + 1 - max(sizes))) for sizes in zip(*shapes, strict=True)
                    )
                for grid, tokens in zip(grids, (inputs, labels), strict=True):
                    if grid is not None:
                        tokens[number] = arc.to_tokens(grid, side, row, column)
            yield inputs, labels


def read_votes(directory: str | os.PathLike) -> arc.Votes | None:
    """The votes over a folder's test split, with none cast; None where the folder is not of ARC's tasks (it has no
    identifiers.json that names one).

    Tests are those of test_puzzles.json, else the examples of the test split that are not augmented (HRM's own folders).

    Raises:
        ValueError: a file that is not readable, or names another number of puzzles.
    """
    path = Path(directory) / arc.IDENTIFIERS
    if not path.is_file():
        return None
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: a list of names is needed")
    if not any(name != BLANK for name in names):
        return None
    split = PuzzleFolder(directory, "test")
    if len(names) != split.metadata.num_puzzle_identifiers:
        raise ValueError(
            f"{path}: has {len(names)} names; dataset.json counts {split.metadata.num_puzzle_identifiers}"
        )
    tests_path = Path(directory) / arc.TESTS
    if not tests_path.is_file():
        return arc.Votes(names, _tests_of(split, names))
    values = read_json(tests_path)
    if not isinstance(values, dict):
        raise ValueError(f"{tests_path}: tasks by name are needed")
    tasks = [arc.as_task(value, name, "test", f"{tests_path}: {name}") for name, value in values.items()]
    return arc.Votes(names, {task.name: task.test for task in tasks})


def _tests_of(split: PuzzleFolder, names: list[str]) -> dict[str, list[Pair]]:
    tests: dict[str, list[Pair]] = {}
    for batch in split.examples(1024):
        for number, *tokens in zip(
            *(batch[key].numpy() for key in ("puzzle_ids", "inputs", "labels")), strict=True
        ):
            task, image = arc.named_image(names[number])
            if image == Image():
                given, output = map(arc.from_tokens, tokens)
                if given is not None:
                    tests.setdefault(task, []).append((given, output))
    return tests


def task_images(names: list[str], task: str) -> dict[int, Image]:
    """The identifiers of a task's images, itself first; empty where the folder does not have it."""
    found = {number: arc.named_image(name) for number, name in enumerate(names)}
    own = {number: image for number, (name, image) in found.items() if name == task}
    return dict(sorted(own.items(), key=lambda item: item[1] != Image()))
