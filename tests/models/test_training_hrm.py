"""Training HRM: data that keeps held-out solutions apart, a run that learns, what is saved and printed."""

import json
import math

import numpy as np
import pytest
import torch

from fastattn.data import sudoku
from fastattn.data.puzzles import write_folder
from fastattn.models import Hrm, HrmConfig
from fastattn.training_hrm import (
    FolderData,
    HrmTrainConfig,
    SudokuData,
    evaluate,
    save_run,
    show_steps,
    train,
)

TINY = {
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "H_layers": 1,
    "L_layers": 1,
    "halt_max_steps": 2,
}


def boards(batch, name):
    return {board.tobytes() for board in sudoku.from_tokens(batch[name].numpy())}


@pytest.mark.parametrize(("box", "blanks"), [(2, (5, 8)), (3, (4, 6))])
def test_held_out_solutions_are_never_shown(box, blanks):
    data = SudokuData(box, blanks=blanks, puzzles=60, held_out=20, seed=3)
    held_out = boards(data.held_out, "labels")
    batches = data.batches(32, np.random.default_rng(0))
    for _ in range(4):
        batch = next(batches)
        assert not boards(batch, "labels") & held_out
        blank = (batch["inputs"] == 1).sum(-1)
        assert blank.min() >= blanks[0] - 1 and blank.max() <= blanks[1]
        assert torch.equal(batch["inputs"][batch["inputs"] > 1], batch["labels"][batch["inputs"] > 1])
        assert all(sudoku.is_solution(board) for board in sudoku.from_tokens(batch["labels"].numpy()))
    assert data.config == {"vocab_size": box * box + 2, "seq_len": box**4}


def test_a_run_learns_and_repeats(tmp_path):
    data = SudokuData(2, blanks=(1, 1), puzzles=200, held_out=32)

    def run():
        torch.manual_seed(0)
        model = Hrm(HrmConfig(**data.config, **TINY))
        points = train(
            model, data, HrmTrainConfig(steps=40, batch_size=16, lr=1e-2, warmup=5, eval_every=20, ema=0.9)
        )
        return model, points

    model, points = run()
    assert [point.step for point in points] == [20, 40]
    # guessing among the four digits costs ln 4 a cell
    assert points[1].loss < min(points[0].loss, math.log(4))
    assert evaluate(model, data.evaluation(16)) == (points[1].cells, points[1].exact)
    again, _ = run()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    save_run(tmp_path, model, points, HrmTrainConfig())
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "accuracy.json").read_text())["points"][1]["exact"] == points[1].exact
    shown = list(show_steps(Hrm.from_pretrained(tmp_path), data.held_out))
    assert len(shown) == 3 and shown[0].startswith("puzzle\n") and shown[2].startswith("segment 2: ")


def test_folder_data(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(6, 16))
    for split in ("train", "test"):
        write_folder(tmp_path, split, tokens, tokens, vocab_size=6)
    data = FolderData(tmp_path)
    model = Hrm(HrmConfig(**data.config, **TINY))
    points = train(model, data, HrmTrainConfig(steps=3, batch_size=4, eval_every=3))
    assert len(points) == 1 and sum(len(batch["inputs"]) for batch in data.evaluation(4)) == 6


def test_bad_options():
    with pytest.raises(ValueError, match="box is 4"):
        SudokuData(4, blanks=(1, 2))
    with pytest.raises(ValueError, match=r"blanks is \(3, 2\)"):
        SudokuData(2, blanks=(3, 2))
    with pytest.raises(ValueError, match="steps is 0"):
        HrmTrainConfig(steps=0)
