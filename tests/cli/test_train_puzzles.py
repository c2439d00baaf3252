"""HRM from the command line: `train --model hrm` on Sudoku and on a folder, stopping it, going on."""

import json
import re
import signal

import numpy as np
import pytest

from fastattn.cli import main
from fastattn.models import Hrm
from fastattn.train.data.puzzle_sets import FolderData
from fastattn.train.data.puzzles import write_folder
from fastattn.train.puzzles import HrmTrainer

SUDOKU = ("train", "--model", "hrm", "--data", "sudoku", "--puzzles", 40, "--batch-size", 8, "--threads", 1)


def test_sudoku(run, tmp_path):
    code, out, err = run(*SUDOKU, "--output", tmp_path, "--steps", 2)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "training.safetensors"),
        *("history.jsonl", "accuracy.svg", "report.html"),
    }
    assert "puzzle\n" in out and "segment 16: " in out and "solved" in out
    assert Hrm.from_pretrained(tmp_path).config.seq_len == 16
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4  # accuracy, loss, speed, ops
    assert 2 <= page.count('<table class="board">') <= 17 and "guessing" in page and "no image of one" in page
    assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page)
    code, _, err = run(*SUDOKU, "--output", tmp_path, "--steps", 2)
    assert code == 2 and "--resume" in err


def test_ctrl_c_saves_and_resume_goes_on(run, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*SUDOKU, "--steps", 6)
    run(*options, "--output", whole)
    step = HrmTrainer.step

    def interrupted(self):
        if self.step_number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(HrmTrainer, "step", interrupted)
        code, out, _ = run(*options, "--output", parts)
    assert code == 130 and "saved at step 3" in out
    code, out, err = run(*SUDOKU, "--output", parts, "--resume")
    assert (code, err) == (0, "") and "at step 3 of 6" in out
    for name in ("model.safetensors", "training.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_folder(run, tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(6, 9))
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, tokens, tokens, vocab_size=6)
    command = ("train", "--model", "hrm", "--data", tmp_path / "data", "--output", tmp_path / "run")
    code, _, err = run(
        *command,
        *("--minutes", 1e-4, "--threads", 1, "--batch-size", 4, "--shape", "trm", "--learning-rate", 1e-4),
    )
    assert (code, err) == (0, "")
    assert Hrm.from_pretrained(tmp_path / "run").config.shared_stack
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and "exact" in rows[0]


def test_rates_decays_schedule_epochs_and_averages(run, tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(10, 9))
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, tokens, tokens, vocab_size=6)
    options = {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "min_learning_rate_ratio": 0.1,
        "warmup_steps": 2,
        "weight_decay": 1.0,
        "ema": 0.5,
        "puzzle_learning_rate": 1e-2,
        "puzzle_weight_decay": 0.3,
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = (
        "train",
        "--model",
        "hrm",
        "--data",
        tmp_path / "data",
        "--output",
        tmp_path / "run",
        "--threads",
        1,
    )
    code, _, err = run(*command, "--batch-size", 4, "--epochs", 2, *words)
    assert (code, err) == (0, "")
    again = HrmTrainer.resume(tmp_path / "run", FolderData(tmp_path / "data"))
    assert again.config.steps == 6  # three batches of four
    assert {name: getattr(again.config, name) for name in options} == options
    # one puzzle is in every batch: the vector's dims all move by the rate a step, and decay
    weights = again.model.puzzle_emb.weights
    rates = [1e-2 * again.config.rate_at(step) for step in range(6)]
    assert 0.05 * sum(rates) < weights.abs().max() <= sum(rates)
    assert run(*command, "--resume", *words)[0] == 0
    for name, value in (
        ("ema", 0.7),
        ("schedule", "constant"),
        ("puzzle_learning_rate", 1),
        ("warmup_steps", 3),
    ):
        code, _, err = run(*command, "--resume", f"--{name.replace('_', '-')}", value)
        assert code == 2 and f"--{name.replace('_', '-')} is {value}" in err
    code, _, err = run(*command, "--resume", "--epochs", 3)
    assert code == 2 and "--epochs is for the start of a run" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "hrm", "--schedule", "linear"), "schedule is 'linear'; it must be constant or cosine"),
        (("--min-learning-rate-ratio", 0.1), "--min-learning-rate-ratio is for --schedule cosine"),
        (("--puzzle-learning-rate", 0.1), "--puzzle-learning-rate is not for --model hrm-text"),
        (("--model", "hrm", "--puzzle-weight-decay", -1), "puzzle_weight_decay is -1"),
        (("--model", "hrm", "--epochs", 0), "--epochs is 0"),
        (("--model", "hrm", "--epochs", 1, "--steps", 3), "--steps and --epochs exclude each other"),
        (("--model", "hrm", "--steps", 0), "steps is 0"),
        (("--model", "hrm", "--ema", 1), "ema is 1"),
        (("--model", "gpt"), "--model is 'gpt'; it must be hrm-text or hrm"),
        (("--model", "hrm", "--head", "vq"), "--head is not for --model hrm"),
        (("--batch-size", 3), "--batch-size is not for --model hrm-text"),
        (("--model", "hrm", "--blanks", "many"), "--blanks is 'many'"),
        (("--model", "hrm", "--blanks", "9-3"), "blanks is (9, 3)"),
        (
            ("--model", "hrm", "--eval-puzzles", "most"),
            "--eval-puzzles is 'most'; it must be a number of puzzles, or all",
        ),
        (("--model", "hrm", "--shape", "huge"), "shape is 'huge'"),
        (("--model", "hrm", "--resume"), "no such file; there is no run to resume"),
        (("--model", "hrm", "--data", "nowhere", "--blanks", 4), "--blanks is for Sudoku that is made"),
        (("--model", "hrm", "--data", "nowhere", "--puzzles", 4), "--puzzles is for Sudoku that is made"),
        (("--model", "hrm", "--steps", 4, "--minutes", 1), "--steps and --minutes exclude each other"),
        (
            ("--model", "hrm", "--data", "nowhere"),
            "nowhere/train/dataset.json: no such file; a folder of puzzles has",
        ),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    code, _, err = run("train", "--data", "sudoku", "--output", tmp_path, *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_one_model_is_not_resumed_as_the_other(run, trained):
    code, _, err = run(*SUDOKU, "--output", trained, "--resume")
    assert code == 2 and "is a run of hrm_text, not of hrm" in err


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A finished run on Sudoku."""
    folder = tmp_path_factory.mktemp("hrm")
    with pytest.raises(SystemExit):
        main([str(word) for word in (*SUDOKU, "--steps", 1, "--blanks", "4-6", "--output", folder)])
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3), "--steps is 3, but the run"),
        (("--seed", 1), "--seed is 1"),
        (("--batch-size", 4), "--batch-size is 4"),
        (("--eval-puzzles", "all"), "--eval-puzzles is all, but the run in {} has 256"),
        (("--puzzles", 41), "--puzzles is 41"),
        (("--blanks", "4"), "--blanks is 4, but the run in {} has 4-6"),
        (("--shape", "trm"), "--shape is trm, but the run in {} has small"),
        (("--data", "sudoku-9x9"), "--data is sudoku-9x9, but the run in {} has sudoku-4x4"),
        (("--data", "elsewhere"), "--puzzles is for Sudoku that is made"),
    ],
)
def test_a_resumed_run_keeps_its_options(run, solved, options, message):
    code, out, err = run(*SUDOKU, "--output", solved, "--resume", *options)
    assert code == 2 and message.format(solved) in err and "resuming" not in out


def test_a_resumed_run_takes_its_own_options(run, solved):
    own = ("--steps", 1, "--blanks", "4-6", "--shape", "small", "--data", "sudoku-4x4", "--seed", 0)
    code, out, _ = run(*SUDOKU, "--output", solved, "--resume", *own)
    assert code == 0 and "at step 1 of 1" in out


def test_puzzles_are_not_answered_or_resumed_as_text(run, solved, data):
    code, _, err = run("generate", "--model", solved, "x")
    assert code == 2 and "solves puzzles" in err
    code, _, err = run("train", "--data", data, "--output", solved, "--resume")
    assert code == 2 and "is a run of hrm, not of hrm-text; give --model hrm" in err
