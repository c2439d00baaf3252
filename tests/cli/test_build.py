"""`fastattn build`, and `evaluate` and `solve` on what it makes."""

import json

import numpy as np
import pytest

from fastattn.cli import main
from fastattn.models import Hrm
from fastattn.train.data import arc, sudoku
from fastattn.train.data.arc_folder import read_votes
from fastattn.train.data.puzzles import PuzzleFolder

TRAIN = ("train", "--model", "hrm", "--threads", 1, "--batch-size", 8)


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code


@pytest.fixture(scope="module")
def arc_run(tmp_path_factory):
    """(task files, folder of puzzles, model)"""
    folder = tmp_path_factory.mktemp("arc")
    rng = np.random.default_rng(0)
    for number, set_name in enumerate(["training", "evaluation", "evaluation"]):
        pairs = [{key: rng.integers(0, 10, (2, 3)).tolist() for key in ("input", "output")} for _ in range(4)]
        path = folder / "raw" / set_name / f"t{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"train": pairs[:3], "test": pairs[3:]}))
    call("build", "arc", folder / "raw", "--output", folder / "data", "--augmentations", 4, "--side", 4)
    call(*TRAIN, "--data", folder / "data", "--output", folder / "model", "--steps", 2)
    return folder / "raw", folder / "data", folder / "model"


def test_arc_is_built_trained_and_evaluated(run, arc_run, tmp_path):
    _, data, model = arc_run
    assert Hrm.from_pretrained(model).config.num_puzzles == 16
    code, out, err = run("evaluate", "--model", model, "--data", data, "--submission", tmp_path / "s.json")
    assert (code, err) == (0, "")
    assert "puzzles of 10 solved" in out and "ARC: 2 tasks, 2 tests" in out
    assert [line.split(":")[0] for line in out.splitlines()[2:]] == [
        f"pass@{k}" for k in (1, 2, 5, 10, 100, 1000)
    ]
    submission = json.loads((tmp_path / "s.json").read_text())
    assert {name: len(tests) for name, tests in submission.items()} == {"t1": 1, "t2": 1}
    assert set(submission["t1"][0]) == {"attempt_1", "attempt_2"}
    for options, count in (
        (("--augmentations", 0), "of 2 solved"),
        (("--puzzles", 1, "--augmentations", 1), "of 2 solved"),
        (("--puzzles", 1), "of 5 solved"),
    ):
        assert count in run("evaluate", "--model", model, "--data", data, "--segments", 2, *options)[1]


def test_a_perfect_model_passes(run, arc_run, monkeypatch):
    """The answers are brought back: the right image of each output is a vote for the output."""
    raw, data, model = arc_run
    answers = {}
    for batch in PuzzleFolder(data, "test").examples(4):
        for number, given, answer in zip(batch["puzzle_ids"], batch["inputs"], batch["labels"], strict=True):
            answers[int(number), given.numpy().tobytes()] = answer.where(answer != -100, 0)

    def solve(self, inputs, puzzle_ids, *, segments):
        import torch

        rows = [answers[int(n), given.numpy().tobytes()] for n, given in zip(puzzle_ids, inputs, strict=True)]
        yield torch.stack(rows), torch.zeros(len(rows))

    monkeypatch.setattr(Hrm, "solve", solve)
    _, out, _ = run("evaluate", "--model", model, "--data", data)
    assert "puzzles of 10 solved 100.0%" in out and "pass@1: 100.00% of tests" in out
    code, out, err = run("solve", "t2", "--model", model, "--data", data)
    assert (code, err) == (0, "")
    output = json.loads((raw / "evaluation" / "t2.json").read_text())["test"][0]["output"]
    assert f"answer 1: 5 of 5 images, sure 0.50\n{arc.draw(np.array(output))}\n" in out
    assert "answer 2" not in out and "pass@1: 100.00% of tests; tasks with all tests right 100.00%" in out
    _, out, _ = run(
        "solve", f"@{raw}/evaluation/t2.json", "--model", model, "--data", data, "--augmentations", 1
    )
    assert "answer 1: 2 of 2 images" in out


def test_unknown_outputs_are_answered_and_not_scored(run, arc_run, tmp_path):
    raw, data, model = arc_run
    task = json.loads((raw / "evaluation" / "t1.json").read_text())
    del task["test"][0]["output"]
    (tmp_path / "t1.json").write_text(json.dumps(task))
    code, out, _ = run("solve", f"@{tmp_path}/t1.json", "--model", model, "--data", data, "--segments", 1)
    assert code == 0 and "test 1\n" in out and "pass@" not in out


def test_sudoku_and_mazes(run, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        grid = sudoku.random_grid(2, rng)
        board = np.where(rng.random((4, 4)) < 0.5, 0, grid)
        rows.append(",".join(["x", *("".join(map(str, b.ravel())) for b in (board, grid)), "1"]))
    raw = tmp_path / "raw"
    raw.mkdir()
    for split in ("train", "test"):
        (raw / f"{split}.csv").write_text("\n".join(["source,question,answer,rating", *rows]))
    out_folder = tmp_path / "sudoku"
    code, out, err = run("build", "sudoku", raw, "--output", out_folder, "--augmentations", 2, "--sample", 4)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "train: 4 puzzles of 4 x 4 cells, each under 3 symmetries",
        "test: 6 puzzles of 4 x 4 cells",
    ]
    assert run(*TRAIN, "--data", out_folder, "--output", tmp_path / "run", "--steps", 1)[0] == 0
    code, out, err = run("evaluate", "--model", tmp_path / "run", "--data", out_folder, "--puzzles", 5)
    assert (code, err) == (0, "") and "puzzles of 5 solved" in out and "ARC" not in out
    code, _, err = run("build", "sudoku", raw, "--output", out_folder)
    assert code == 2 and "holds puzzles already" in err
    for split in ("train", "test"):
        (raw / f"{split}.csv").write_text("question,answer\nS  ##  G#,Soo##ooG#\n")
    code, out, _ = run("build", "maze", raw, "--output", tmp_path / "maze", "--symmetries")
    assert code == 0 and out.splitlines()[0] == "train: 1 puzzles of 3 x 3 cells, each under 8 symmetries"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("build", "arc", "{raw}", "--output", "x", "--side", 31),
            "--side is 31; ARC's grids are at most 30 x 30",
        ),
        (("build", "arc", "{raw}", "--output", "x", "--augmentations", -1), "--augmentations is -1"),
        (("build", "arc", "{raw}", "--output", "{data}"), "holds puzzles already; give another folder"),
        (("build", "arc", "{raw}", "--output", "x", "--test-set", "test"), "there is no set 'test'"),
        (("build", "maze", "{raw}", "--output", "x"), "train.csv: no such file"),
        (("evaluate", "--model", "nowhere", "--data", "{data}"), "nowhere: no such folder"),
        (("evaluate", "--model", "{model}", "--data", "{data}", "--puzzles", "few"), "--puzzles is 'few'"),
        (("evaluate", "--model", "{model}", "--data", "{data}", "--segments", 0), "--segments is 0"),
        (("solve", "t0", "--model", "{model}", "--data", "{data}"), "'t0' is no held-out task"),
        (("solve", "@{raw}", "--model", "{model}", "--data", "{data}"), "holds 3 tasks; one is needed"),
        (("solve", "t1", "--model", "{model}", "--augmentations", 1), "--augmentations is for --data"),
        (("solve", "t1", "--model", "{model}", "--data", "{data}", "--puzzle-id", 1), "--data is for ARC"),
    ],
)
def test_mistakes(run, arc_run, words, message):
    names = dict(zip(("raw", "data", "model"), arc_run, strict=True))
    code, _, err = run(*(str(word).format(**names) for word in words))
    assert code == 2 and message in err and "Traceback" not in err


def test_a_model_of_other_puzzles_is_refused(run, arc_run, tmp_path):
    raw, data, model = arc_run
    assert run("build", "arc", raw, "--output", tmp_path / "few", "--augmentations", 0, "--side", 4)[0] == 0
    code, _, err = run("evaluate", "--model", model, "--data", tmp_path / "few")
    assert code == 2 and "its model has num_puzzles 16, the data 4" in err
    code, _, err = run("solve", "t1", "--model", model, "--data", tmp_path / "few")
    assert code == 2 and "names 4 puzzles; the model has 16" in err
    assert read_votes(data) is not None
