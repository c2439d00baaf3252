"""Folders of puzzles in HRM's layout: ``<split>/dataset.json`` and ``<split>/<set>__<field>.npy``.

Fields: ``inputs`` and ``labels`` (examples, seq_len); ``puzzle_indices`` (puzzles + 1), where each puzzle's examples
begin; ``puzzle_identifiers`` (puzzles,); ``group_indices`` (groups + 1), where each group's puzzles begin (the
augmentations of one puzzle).
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.files import parse_json, replacing, write_text

IGNORED = -100
_FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


@dataclass(frozen=True)
class PuzzleMetadata:
    """``dataset.json``. Labels equal to ignore_label_id don't count; the identifier blank_identifier_id is no
    puzzle's."""

    seq_len: int
    vocab_size: int
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0
    num_puzzle_identifiers: int = 1
    total_groups: int = 0
    total_puzzles: int = 0
    mean_puzzle_examples: float = 1.0
    sets: tuple[str, ...] = ("all",)


class PuzzleFolder:
    """One split of a puzzle folder, its large arrays mapped, not read.

    Raises:
        ValueError: a file that is missing, unreadable or does not fit the others, by name.
    """

    def __init__(self, directory: str | os.PathLike, split: str) -> None:
        folder = Path(directory) / split
        self.metadata = _read_metadata(folder / "dataset.json")
        self._sets = {name: self._read_set(folder, name) for name in self.metadata.sets}
        if len(self) == 0:
            raise ValueError(f"{folder}: holds no examples")

    def _read_set(self, folder: Path, name: str) -> dict[str, np.ndarray]:
        arrays = {}
        for field in _FIELDS:
            path = folder / f"{name}__{field}.npy"
            mapped = "r" if field in ("inputs", "labels") else None
            try:
                arrays[field] = np.load(path, mmap_mode=mapped, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{path}: not readable as an array: {error}") from error
            if arrays[field].dtype.kind not in "iu" or arrays[field].ndim == 0:
                raise ValueError(
                    f"{path}: has dtype {arrays[field].dtype} and shape {arrays[field].shape}; integers are needed"
                )
        examples = (len(arrays["inputs"]), self.metadata.seq_len)
        for field in ("inputs", "labels"):
            if arrays[field].shape != examples:
                raise ValueError(
                    f"{folder / name}__{field}.npy: has shape {arrays[field].shape}; it must be {examples}"
                )
        puzzles = len(arrays["puzzle_identifiers"])
        for field, count in (("puzzle_indices", examples[0]), ("group_indices", puzzles)):
            starts = arrays[field]
            if (
                starts.ndim != 1
                or len(starts) == 0
                or starts[0] != 0
                or starts[-1] != count
                or (np.diff(starts) < 0).any()
            ):
                raise ValueError(f"{folder / name}__{field}.npy: must be offsets that rise from 0 to {count}")
        if len(arrays["puzzle_indices"]) != puzzles + 1:
            raise ValueError(
                f"{folder / name}__puzzle_indices.npy: has {len(arrays['puzzle_indices'])} entries; "
                f"{puzzles} puzzles need {puzzles + 1}"
            )
        return arrays

    def __len__(self) -> int:
        return sum(len(arrays["inputs"]) for arrays in self._sets.values())

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of one random puzzle of each group, in random order, all its examples up to the batch's end.

        A batch that can't be filled is padded with examples whose labels are all ignored.
        """
        for arrays in self._sets.values():
            chosen: list[np.ndarray] = []
            puzzles: list[np.ndarray] = []
            room = batch_size
            for group in rng.permutation(len(arrays["group_indices"]) - 1):
                first, last = arrays["group_indices"][group : group + 2]
                if first == last:
                    continue
                puzzle = rng.integers(first, last)
                start, end = arrays["puzzle_indices"][puzzle : puzzle + 2]
                take = min(int(end - start), room)
                chosen.append(start + rng.choice(int(end - start), take, replace=False))
                puzzles.append(np.full(take, puzzle))
                room -= take
                if room == 0:
                    yield self._batch(arrays, np.concatenate(chosen), np.concatenate(puzzles), batch_size)
                    chosen, puzzles, room = [], [], batch_size
            if chosen:
                yield self._batch(arrays, np.concatenate(chosen), np.concatenate(puzzles), batch_size)

    def examples(
        self, batch_size: int, count: int | None = None, *, index: np.ndarray | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Every example once, in order, or ``count`` of them at even distances, or those of ``index``, rising; the last
        batch of a set may be short."""
        total, before = len(self), 0
        if index is not None:
            chosen = index
        else:
            chosen = (
                np.arange(total) if count is None or count >= total else np.arange(count) * total // count
            )
        for arrays in self._sets.values():
            end = before + len(arrays["inputs"])
            own = chosen[(chosen >= before) & (chosen < end)] - before
            for start in range(0, len(own), batch_size):
                rows = own[start : start + batch_size]
                puzzle = np.searchsorted(arrays["puzzle_indices"], rows, side="right") - 1
                yield self._batch(arrays, rows, puzzle, len(rows))
            before = end

    def of_groups(self, count: int | None = None, images: int | None = None) -> np.ndarray:
        """The examples of every group, or of ``count`` at even distances; of each its first ``images`` puzzles alone."""
        ranges, before = [], 0
        for arrays in self._sets.values():
            starts = arrays["group_indices"]
            ends = starts[1:] if images is None else np.minimum(starts[:-1] + images, starts[1:])
            examples = arrays["puzzle_indices"].astype(np.int64) + before
            ranges += list(zip(examples[starts[:-1]], examples[ends], strict=True))
            before += len(arrays["inputs"])
        if count is not None and count < len(ranges):
            ranges = [ranges[n * len(ranges) // count] for n in range(count)]
        return np.concatenate([np.arange(start, end) for start, end in ranges])

    def digest(self) -> str:
        """Of every puzzle and label, in order."""
        return digest(arrays[field] for arrays in self._sets.values() for field in _FIELDS)

    def _batch(
        self, arrays: dict[str, np.ndarray], index: np.ndarray, puzzle: np.ndarray, size: int
    ) -> dict[str, torch.Tensor]:
        labels = arrays["labels"][index].astype(np.int64)
        if self.metadata.ignore_label_id is not None:
            labels[labels == self.metadata.ignore_label_id] = IGNORED
        missing = size - len(index)
        values = {
            "inputs": (arrays["inputs"][index].astype(np.int64), self.metadata.pad_id),
            "labels": (labels, IGNORED),
            "puzzle_ids": (
                arrays["puzzle_identifiers"][puzzle].astype(np.int64),
                self.metadata.blank_identifier_id,
            ),
        }
        return {
            name: torch.from_numpy(
                np.pad(value, ((0, missing),) + ((0, 0),) * (value.ndim - 1), constant_values=fill)
            )
            for name, (value, fill) in values.items()
        }


class PuzzleOrder:
    """An endless stream of batches whose place is two numbers, so that a run can resume exactly.

    ``data.epoch(batch_size, rng)`` yields the batches of an epoch, made from (seed, epoch) alone.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, epoch: int = 0, position: int = 0) -> None:
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self.epoch, self.position = epoch, position
        self._batches = itertools.islice(self._begin(), position, None)

    def __copy__(self) -> "PuzzleOrder":
        return PuzzleOrder(self._data, self._batch_size, self._seed, self.epoch, self.position)

    def next(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches, None)
        if batch is None:
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._begin()
            batch = next(self._batches)
        self.position += 1
        return batch

    def _begin(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._data.epoch(self._batch_size, np.random.default_rng([self._seed, self.epoch]))


def digest(arrays: Iterable[np.ndarray]) -> str:
    """By which a resumed run knows its data again."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def write_folder(
    directory: str | os.PathLike,
    split: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    vocab_size: int,
    group_indices: np.ndarray | None = None,
) -> None:
    """Writes one split with a single set "all", a puzzle an example and identifier 0; a group an example
    unless ``group_indices`` says otherwise."""
    each = np.arange(len(inputs) + 1)
    write_split(
        *(directory, split, [(inputs, labels)]),
        vocab_size=vocab_size,
        seq_len=inputs.shape[1],
        dtype=inputs.dtype,
        puzzle_identifiers=np.zeros(len(inputs)),
        puzzle_indices=each,
        group_indices=each if group_indices is None else group_indices,
    )


def write_split(
    directory: str | os.PathLike,
    split: str,
    examples: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    vocab_size: int,
    seq_len: int,
    puzzle_identifiers: np.ndarray,
    puzzle_indices: np.ndarray,
    group_indices: np.ndarray,
    num_identifiers: int = 1,
    dtype: Any = np.uint8,
) -> None:
    """Writes one split with a single set "all".

    examples: pieces of (inputs, labels), each (n, seq_len), as many rows in all as the last of ``puzzle_indices``; they go
    to the files as they come, so that a split may be larger than the memory. The other arrays are the layout's.

    Raises:
        ValueError: another number of rows.
    """
    folder, count = Path(directory) / split, int(puzzle_indices[-1])
    with (
        replacing(folder / "all__inputs.npy") as inputs_file,
        replacing(folder / "all__labels.npy") as labels_file,
    ):
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (count, seq_len),
        }
        rows = 0
        with open(inputs_file, "wb") as inputs, open(labels_file, "wb") as labels:
            for file in (inputs, labels):
                np.lib.format.write_array_header_1_0(file, header)
            for pair in examples:
                for file, values in zip((inputs, labels), pair, strict=True):
                    file.write(np.ascontiguousarray(values, dtype=dtype).data)
                rows += len(pair[0])
        if rows != count:
            raise ValueError(f"{folder}: there are {rows} examples; puzzle_indices has {count}")
    arrays = {
        "puzzle_identifiers": puzzle_identifiers,
        "puzzle_indices": puzzle_indices,
        "group_indices": group_indices,
    }
    for field, array in arrays.items():
        with replacing(folder / f"all__{field}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(array, dtype=np.int32), allow_pickle=False)
    puzzles = len(puzzle_identifiers)
    metadata = PuzzleMetadata(
        seq_len=seq_len,
        vocab_size=vocab_size,
        num_puzzle_identifiers=num_identifiers,
        total_groups=len(group_indices) - 1,
        total_puzzles=puzzles,
        mean_puzzle_examples=count / max(puzzles, 1),
    )
    write_text(folder / "dataset.json", json.dumps(asdict(metadata), indent=2) + "\n")


def _read_metadata(path: Path) -> PuzzleMetadata:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a folder of puzzles has dataset.json in train and in test"
        )
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(PuzzleMetadata)}
        metadata = PuzzleMetadata(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a puzzle folder's metadata: {error}") from error
    return metadata
