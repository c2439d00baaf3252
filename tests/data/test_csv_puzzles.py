"""Folders from Sudoku-Extreme's and Maze-Hard's CSV files."""

import json

import numpy as np
import pytest

from fastattn.train.data import sudoku
from fastattn.train.data.csv_puzzles import build_maze, build_sudoku
from fastattn.train.data.grids import symmetry
from fastattn.train.data.puzzles import PuzzleFolder


def text_of(board, blank="."):
    return "".join(blank if digit == 0 else str(digit) for digit in board.ravel())


def write_csv(folder, splits, head="source,question,answer,rating"):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        lines = [head, *(",".join(row) for row in rows)]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def boards():
    rng = np.random.default_rng(0)
    grids = [sudoku.random_grid(3, rng) for _ in range(5)]
    return [(np.where(rng.random((9, 9)) < 0.5, 0, grid), grid) for grid in grids]


@pytest.fixture
def sudoku_files(tmp_path, boards):
    rows = [
        ("puzzles0", text_of(board, ".0"[number % 2]), text_of(grid), str(10 * number))
        for number, (board, grid) in enumerate(boards)
    ]
    write_csv(tmp_path / "raw", {"train": rows[:4], "test": rows[4:] + rows[:1]})
    return tmp_path / "raw"


def rows_of(folder):
    batches = list(folder.examples(100))
    return [np.concatenate([batch[name] for batch in batches]) for name in ("inputs", "labels")]


def test_sudoku(sudoku_files, boards, tmp_path):
    said = build_sudoku(sudoku_files, tmp_path / "out")
    assert said == ["train: 4 puzzles of 9 x 9 cells", "test: 2 puzzles of 9 x 9 cells"]
    for split, numbers in (("train", range(4)), ("test", (4, 0))):
        folder = PuzzleFolder(tmp_path / "out", split)
        assert (folder.metadata.vocab_size, folder.metadata.seq_len, folder.metadata.total_groups) == (
            *(11, 81),
            len(numbers),
        )
        for i, name in enumerate(("inputs", "labels")):
            wanted = np.stack([sudoku.to_tokens(boards[number][i]) for number in numbers])
            np.testing.assert_array_equal(rows_of(folder)[i], wanted, err_msg=name)
    assert json.loads((tmp_path / "out" / "identifiers.json").read_text()) == ["<blank>"]


def test_sudoku_symmetries_are_groups_of_solved_boards(sudoku_files, tmp_path):
    said = build_sudoku(sudoku_files, tmp_path / "out", sample=2, augmentations=5, seed=1)
    assert said[0] == "train: 2 puzzles of 9 x 9 cells, each under 6 symmetries"
    folder = PuzzleFolder(tmp_path / "out", "train")
    assert len(folder) == 12 and folder.metadata.total_groups == 2 and folder.metadata.total_puzzles == 12
    inputs, labels = (sudoku.from_tokens(rows) for rows in rows_of(folder))
    assert len({board.tobytes() for board in inputs}) == 12
    for group in (slice(0, 6), slice(6, 12)):
        blanks = {int((board == 0).sum()) for board in inputs[group]}
        assert len(blanks) == 1  # images of one
    for board, grid in zip(inputs, labels, strict=True):
        assert sudoku.is_solution(grid) and ((board == 0) | (board == grid)).all()
    assert len(PuzzleFolder(tmp_path / "out", "test")) == 2
    build_sudoku(sudoku_files, tmp_path / "again", sample=2, augmentations=5, seed=1)
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


def test_sudoku_of_a_rating(sudoku_files, tmp_path):
    said = build_sudoku(sudoku_files, tmp_path / "out", min_rating=15)
    assert said == ["train: 2 puzzles of 9 x 9 cells", "test: 1 puzzles of 9 x 9 cells"]
    with pytest.raises(ValueError, match=r"train.csv: holds no puzzle of this rating"):
        build_sudoku(sudoku_files, tmp_path / "none", min_rating=1000)


def test_mazes(tmp_path):
    maze, path = "S  ##  G#", "Soo##ooG#"
    write_csv(tmp_path / "raw", {"train": [("a", maze, path, "3")] * 3, "test": [("a", maze, path, "3")]})
    said = build_maze(tmp_path / "raw", tmp_path / "out", sample=2, symmetries=True)
    assert said == [
        "train: 2 puzzles of 3 x 3 cells, each under 8 symmetries",
        "test: 1 puzzles of 3 x 3 cells",
    ]
    tokens = [np.array(["# SGo".index(c) + 1 for c in text]).reshape(3, 3) for text in (maze, path)]
    train, test = (PuzzleFolder(tmp_path / "out", split) for split in ("train", "test"))
    assert train.metadata.vocab_size == 6 and len(train) == 16 and train.metadata.total_groups == 2
    for i in range(2):
        wanted = [symmetry(tokens[i], number).ravel() for number in range(8)] * 2
        np.testing.assert_array_equal(rows_of(train)[i], np.stack(wanted))
        np.testing.assert_array_equal(rows_of(test)[i], tokens[i].ravel()[None])


def test_columns_are_found_by_name(tmp_path, boards):
    board, grid = boards[0]
    rows = [(text_of(grid), text_of(board))]
    write_csv(tmp_path / "raw", {"train": rows, "test": rows}, head="answer,question")
    build_sudoku(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(
        rows_of(PuzzleFolder(tmp_path / "out", "test"))[0][0], sudoku.to_tokens(board)
    )
    with pytest.raises(
        ValueError, match=r"train.csv: its first line names no column rating; it has answer, question"
    ):
        build_sudoku(tmp_path / "raw", tmp_path / "rated", min_rating=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "1" * 81), r"train.csv:3: has 2 fields; the first line names 4"),
        (("x", "1" * 80, "1" * 81, "0"), r"train.csv:3: has 80 cells and 81 in its answer, not 81"),
        (("x", "1" * 80 + "x", "1" * 81, "0"), r"train.csv:3: 'x' is no cell of its question"),
        (("x", "1" * 81, "1" * 80 + ".", "0"), r"train.csv:3: '.' is no cell of its answer"),
        (
            ("x", "1" * 81, "1" * 81, "0"),
            r"the answer of puzzle 2 is no solution of its question; 1 are none",
        ),
        (("x", "." * 81, "123456789" * 9, "0"), r"the answer of puzzle 2 is no solution"),
        (("x", "." * 81, "." * 81, "hard"), r"'\.' is no cell of its answer"),
    ],
)
def test_bad_lines(tmp_path, boards, row, message):
    good = ("x", text_of(boards[0][0]), text_of(boards[0][1]), "1")
    write_csv(tmp_path / "raw", {"train": [good, row], "test": [good]})
    with pytest.raises(ValueError, match=message):
        build_sudoku(tmp_path / "raw", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_a_solution_that_changes_a_given_is_none(tmp_path, boards):
    board, grid = boards[0]
    first = tuple(np.argwhere(board > 0)[0])
    changed = board.copy()
    changed[first] = changed[first] % 9 + 1
    rows = [("x", text_of(changed), text_of(grid), "1")]
    write_csv(tmp_path / "raw", {"train": rows, "test": rows})
    with pytest.raises(ValueError, match="the answer of puzzle 1 is no solution"):
        build_sudoku(tmp_path / "raw", tmp_path / "out")


def test_bad_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train.csv: no such file; a folder with train.csv and test.csv"
    ):
        build_maze(tmp_path, tmp_path / "out")
    write_csv(tmp_path, {"train": [("x", "##", "##", "0")]})
    with pytest.raises(ValueError, match="a puzzle has 2 cells; a square number is needed"):
        build_maze(tmp_path, tmp_path / "out")
    write_csv(tmp_path, {"train": [("x", "#" * 4, "#" * 4, "hard")]})
    with pytest.raises(ValueError, match=r"train.csv:2: rating is 'hard'; a whole number is needed"):
        build_sudoku(tmp_path, tmp_path / "out", min_rating=1)
    write_csv(tmp_path, {"train": [("x", "1" * 25, "1" * 25, "0")]})
    with pytest.raises(ValueError, match="its boards are 5 x 5; 9 x 9 and 4 x 4 are read"):
        build_sudoku(tmp_path, tmp_path / "out")
    (tmp_path / "train.csv").write_bytes(b"question,answer\n\xff,\xff\n")
    with pytest.raises(ValueError, match="not readable as CSV"):
        build_maze(tmp_path, tmp_path / "out")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(ValueError, match="names no column question, answer"):
        build_maze(tmp_path, tmp_path / "out")
