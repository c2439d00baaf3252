"""Sudoku: the solver against the known number of grids and brute force, unique puzzles, symmetries, folders."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.train.data import sudoku
from fastattn.train.data.puzzles import PuzzleFolder, write_folder


def every_grid():
    return sudoku.solutions(np.zeros((4, 4), dtype=np.int64), limit=1000)


def test_the_288_grids_of_four_by_four():
    grids = every_grid()
    assert len({grid.tobytes() for grid in grids}) == len(grids) == 288
    assert all(sudoku.is_solution(grid) for grid in grids)


@given(st.lists(st.integers(0, 4), min_size=16, max_size=16))
def test_solutions_equal_filtering_every_grid(cells):
    board = np.array(cells).reshape(4, 4)
    board = np.where(
        np.arange(16).reshape(4, 4) % 3 == 0, board, 0
    )  # few givens: often more than one solution
    expected = {grid.tobytes() for grid in every_grid() if ((board == 0) | (board == grid)).all()}
    assert {grid.tobytes() for grid in sudoku.solutions(board, limit=1000)} == expected
    assert len(sudoku.solutions(board, limit=2)) == min(2, len(expected))


@given(st.integers(0, 2**32), st.sampled_from([2, 3]))
def test_puzzles_have_one_solution_under_every_symmetry(seed, box):
    rng = np.random.default_rng(seed)
    grid = sudoku.random_grid(box, rng)
    assert sudoku.is_solution(grid)
    puzzle = sudoku.make_puzzle(grid, 8 if box == 2 else 40, rng)
    for board, answer in ((puzzle, grid), sudoku.shuffle(puzzle, grid, rng)):
        (found,) = sudoku.solutions(board, limit=2)
        assert (found == answer).all() and sudoku.is_solution(answer)
        assert ((board == 0) | (board == answer)).all() and (board == 0).sum() == (puzzle == 0).sum() > 0


@given(st.integers(0, 2**32))
def test_a_canonical_number_is_shared_by_images_alone(seed):
    rng = np.random.default_rng(seed)
    grid = sudoku.random_grid(2, rng)
    puzzle = sudoku.make_puzzle(grid, int(rng.integers(1, 11)), rng)
    image, _ = sudoku.shuffle(puzzle, grid, rng)
    assert sudoku.canonical(image) == sudoku.canonical(puzzle)
    other = puzzle.copy()
    other[tuple(rng.choice(np.argwhere(puzzle > 0)))] = 0  # fewer givens: no image
    assert sudoku.canonical(other) != sudoku.canonical(puzzle)


def test_the_grids_are_images_of_two():
    kinds = [sudoku.canonical(grid) for grid in every_grid()]
    assert sorted(kinds.count(kind) for kind in set(kinds)) == [96, 192]
    with pytest.raises(ValueError, match="canonical is for 4 x 4"):
        sudoku.canonical(np.zeros((9, 9), dtype=np.int64))


def test_symmetries_reach_every_band_order_and_transpose():
    grid = np.arange(81).reshape(9, 9) % 9 + 1
    marked = np.zeros((9, 9), dtype=np.int64)
    marked[0, 1] = 1
    rng = np.random.default_rng(0)
    places = {tuple(np.argwhere(sudoku.shuffle(marked, grid, rng)[0])[0]) for _ in range(2000)}
    assert places == set(itertools.product(range(9), range(9)))


def test_tokens_and_drawing():
    board = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]])
    tokens = sudoku.to_tokens(board)
    assert tokens.tolist() == [2, 3, 4, 5, 4, 5, 2, 3, 3, 2, 5, 4, 5, 4, 3, 1]
    assert (sudoku.from_tokens(tokens) == board).all()
    right = board.copy()
    right[3, 3], right[0, 0] = 1, 2
    assert sudoku.draw(board, right).splitlines() == [
        " 1!2 | 3 4",
        " 3 4 | 1 2",
        "-----+-----",
        " 2 1 | 4 3",
        " 4 3 | 2 .",
    ]


def test_contradictions_and_bad_boards():
    board = np.zeros((4, 4), dtype=np.int64)
    board[0, :2] = 1
    assert sudoku.solutions(board, limit=1) == []
    for shape in ((4, 3), (3, 3), (16,)):
        with pytest.raises(ValueError, match="it must be square"):
            sudoku.solutions(np.zeros(shape, dtype=np.int64), limit=1)


@pytest.fixture
def folder(tmp_path):
    inputs = np.arange(24).reshape(6, 4)
    labels = inputs.copy()
    labels[:, 0] = 0
    write_folder(tmp_path, "train", inputs, labels, vocab_size=24, group_indices=np.array([0, 3, 5, 6]))
    return tmp_path, inputs


def test_folder(folder):
    path, inputs = folder
    data = PuzzleFolder(path, "train")
    assert len(data) == 6 and data.metadata.total_groups == 3
    batches = list(data.examples(4))
    assert [len(batch["inputs"]) for batch in batches] == [4, 2]
    assert (np.concatenate([batch["inputs"] for batch in batches]) == inputs).all()
    assert (batches[0]["labels"][:, 0] == -100).all()

    seen = set()
    rng = np.random.default_rng(0)
    for _ in range(40):
        (batch,) = data.epoch(4, rng)  # three groups, and one row of padding
        assert (batch["labels"][3] == -100).all() and (batch["inputs"][3] == 0).all()
        rows = [int(np.flatnonzero((inputs == row.numpy()).all(1))[0]) for row in batch["inputs"][:3]]
        groups = sorted(np.searchsorted([0, 3, 5], rows, side="right").tolist())
        assert groups == [1, 2, 3]
        seen.update(rows)
    assert seen == set(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "dataset.json").write_text("{"), "dataset.json: not a puzzle folder's metadata"),
        (lambda p: (p / "dataset.json").write_text(json.dumps({"vocab_size": 5})), "seq_len"),
        (lambda p: (p / "all__inputs.npy").write_bytes(b"half"), "all__inputs.npy: not readable"),
        (
            lambda p: (p / "dataset.json").write_text('{"seq_len": 4, "vocab_size": 5, "sets": []}'),
            "no examples",
        ),
        (lambda p: (p / "all__labels.npy").unlink(), "all__labels.npy: not readable"),
        (
            lambda p: np.save(p / "all__labels.npy", np.zeros((6, 3), dtype=np.int64)),
            r"has shape \(6, 3\); it must be \(6, 4\)",
        ),
        (
            lambda p: np.save(p / "all__inputs.npy", np.full((6, 4), 1.5)),
            r"all__inputs.npy: has dtype float64 .*; integers are needed",
        ),
        (lambda p: np.save(p / "all__group_indices.npy", np.zeros(0, dtype=np.int64)), "rise from 0 to 6"),
        (lambda p: np.save(p / "all__puzzle_indices.npy", np.array([0, 7])), "rise from 0 to 6"),
        (lambda p: np.save(p / "all__group_indices.npy", np.array([0, 4, 2, 6])), "rise from 0 to 6"),
    ],
)
def test_bad_folders(folder, change, message):
    change(folder[0] / "train")
    with pytest.raises(ValueError, match=message):
        PuzzleFolder(folder[0], "train")
