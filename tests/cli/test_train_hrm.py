"""HRM from the command line: Sudoku through `train --model hrm`, a folder through `train-hrm`."""

import numpy as np
import pytest

from fastattn.data.puzzles import write_folder
from fastattn.models import Hrm


def test_sudoku(run, tmp_path):
    code, out, err = run(
        *("train", "--model", "hrm", "--data", "sudoku", "--output", tmp_path, "--steps", 2, "--threads", 1)
    )
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "accuracy.json", "accuracy.png"),
    }
    assert "puzzle\n" in out and "segment 16: " in out and "solved" in out
    assert Hrm.from_pretrained(tmp_path).config.seq_len == 16


def test_folder(run, tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(6, 9))
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, tokens, tokens, vocab_size=6)
    options = ("--steps", 2, "--batch-size", 4, "--trm", "--threads", 1)
    code, _, err = run("train-hrm", "--data", tmp_path / "data", "--output", tmp_path / "run", *options)
    assert (code, err) == (0, "")
    assert Hrm.from_pretrained(tmp_path / "run").config.shared_stack


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--model", "gpt", "--data", "x"), "--model is 'gpt'; it must be hrm-text or hrm"),
        (("train", "--model", "hrm", "--data", "sudoku", "--resume"), "--resume is for --model hrm-text"),
        (("train-hrm", "--blanks", "many"), "--blanks is 'many'"),
        (("train-hrm", "--blanks", "9-3"), "blanks is (9, 3)"),
        (("train-hrm", "--size", "huge"), "size is 'huge'"),
        (("train-hrm", "--data", "nowhere"), "nowhere/train/dataset.json: not a puzzle folder's metadata"),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    code, _, err = run(*arguments, "--output", tmp_path)
    assert code == 2 and message in err
