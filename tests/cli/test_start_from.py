"""Runs that start from a model or a tokenizer, and puzzles solved from the command line."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from fastattn.models import Hrm, HrmConfig, HrmText
from fastattn.train.data.puzzles import write_folder
from fastattn.train.data.tokenizer import SPECIAL_TOKENS, Tokenizer

OPTIONS = ("--batch-tokens", 128, "--threads", 1)


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_text_starts_from_a_trained_model(run, data, trained, tmp_path):
    code, _, err = run(
        "train", "--data", data, "--output", tmp_path, "--init", trained, *OPTIONS, "--steps", 1
    )
    assert (code, err) == (0, "")
    assert history(tmp_path)[0]["held_out"] == pytest.approx(history(trained)[-1]["held_out"], rel=1e-5)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    own, before = (HrmText.from_pretrained(folder) for folder in (tmp_path, trained))
    assert own.config == before.config
    assert (own.config.bos_token_id, own.config.eos_token_id) == (0, 2)  # the tokenizer's, for generate
    command = ("train", "--data", data, "--output", tmp_path, *OPTIONS)
    assert run(*command, "--resume")[0] == 0
    for option, value in (("--init", trained), ("--tokenizer", trained)):
        code, _, err = run(*command, "--resume", option, value)
        assert code == 2 and f"{option} is for the start of a run" in err


def test_a_released_model_in_16_bits_trains_in_float32(run, data, trained, tmp_path):
    HrmText.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(tmp_path / "released")
    (tmp_path / "released" / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    command = ("train", "--data", data, "--output", tmp_path / "run", *OPTIONS)
    assert run(*command, "--init", tmp_path / "released", "--steps", 2)[0] == 0
    assert run(*command, "--resume")[0] == 0
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_an_own_tokenizer(run, config, tmp_path):
    """One without the format's tokens, which truncates; tags are added too."""
    rows = [{"instruction": f"say {n}", "response": f"it is {n}", "condition": "cot"} for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"say": 0, "it": 1, "is": 2, "?": 3}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.enable_truncation(1)
    inner.save(str(tmp_path / "own.json"))
    command = (
        "train",
        "--data",
        tmp_path / "data.jsonl",
        "--output",
        tmp_path / "run",
        "--config",
        config,
        *OPTIONS,
    )
    code, _, err = run(*command, "--tokenizer", tmp_path / "own.json", "--steps", 1)
    assert (code, err) == (0, "")
    own = Tokenizer.load(tmp_path / "run")
    assert own.vocab_size == HrmText.from_pretrained(tmp_path / "run").config.vocab_size == 4 + 3 + 1
    assert own.encode("say it is") == [0, 1, 2] and set(own.tags) == {"<|cot|>"}
    assert all(own._inner.token_to_id(token) >= 4 for token in SPECIAL_TOKENS)
    for option, value, other in (
        ("--vocab-size", 300, "--tokenizer"),
        ("--config", config, "--init"),
        ("--head", "vq", "--init"),
    ):
        given = (
            ("--tokenizer", tmp_path / "own.json") if other == "--tokenizer" else ("--init", tmp_path / "run")
        )
        output = ("train", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "other")
        code, _, err = run(*output, *given, option, value)
        assert code == 2 and f"{option} is not for {other}" in err


@pytest.fixture
def puzzle_model(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "H_layers": 1, "L_layers": 1}
    model = Hrm(HrmConfig(vocab_size=6, seq_len=16, num_puzzles=3, halt_max_steps=2, **shape))
    model.puzzle_emb.weights.normal_()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_puzzles_start_from_a_model_for_others(run, puzzle_model, tmp_path):
    model, folder = puzzle_model
    cells = np.random.default_rng(0).integers(1, 6, size=(8, 16))
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, cells, cells, vocab_size=6)  # one puzzle
    command = ("train", "--model", "hrm", "--data", tmp_path / "data", "--init", folder, "--threads", 1)
    code, out, err = run(*command, "--output", tmp_path / "run", "--steps", 1, "--puzzle-learning-rate", 0)
    assert (code, err) == (0, "") and "1 puzzles in place of 3" in out
    again = Hrm.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(again.puzzle_emb.weights, model.puzzle_emb.weights.mean(0, keepdim=True))
    assert again.config.num_puzzles == 1 and again.config.halt_max_steps == 2
    code, _, err = run(*command, "--output", tmp_path / "other", "--shape", "trm")
    assert code == 2 and "--shape is not for --init" in err
    command = ("train", "--model", "hrm", "--data", "sudoku-9x9", "--puzzles", 10, "--init", folder)
    code, _, err = run(*command, "--output", tmp_path / "other", "--steps", 1)
    assert code == 2 and "its model has vocab_size 6, the data 11" in err


GIVEN = "1..4 .41. 21.. 4.2."
GRID = "1234 3412 2143 4321"


@pytest.fixture
def solver(puzzle_model, monkeypatch):
    """The model's folder; it answers with `answers`, in their order."""
    answers = []

    def solve(self, inputs, puzzle_ids, segments):
        for answer in answers:
            yield torch.tensor([answer]), torch.tensor([2.0])

    monkeypatch.setattr(Hrm, "solve", solve)
    return puzzle_model[1], answers


def cells(text):
    return [int(digit) + 1 for digit in text.replace(" ", "")]


def test_solve_draws_a_sudoku(run, solver, tmp_path, monkeypatch):
    folder, answers = solver
    answers += [cells(GRID.replace("3", "1")), cells(GRID)]
    code, out, err = run("solve", "--model", folder, GIVEN)
    assert (code, err) == (0, "")
    assert out.splitlines()[:5] == [" 1 . | . 4", " . 4 | 1 .", "-----+-----", " 2 1 | . .", " 4 . | 2 ."]
    assert "segment 2: 4 cells changed, sure 0.88" in out
    assert out.splitlines()[-6:] == [
        " 1 2 | 3 4",
        " 3 4 | 1 2",
        "-----+-----",
        " 2 1 | 4 3",
        " 4 3 | 2 1",
        "solved",
    ]
    (tmp_path / "puzzle.txt").write_text("\n".join(out.splitlines()[:5]))  # a drawing
    assert run("solve", "--model", folder, f"@{tmp_path / 'puzzle.txt'}")[1] == out
    monkeypatch.setattr("sys.stdin", (tmp_path / "puzzle.txt").open())
    assert run("solve", "--model", folder, "-")[1] == out
    for answer, reason in (
        (GRID.replace("3", "1"), "repeat digits"),
        (GRID.translate(str.maketrans("12", "21")), "givens changed"),
    ):
        answers[:] = [cells(answer)]
        code, out, _ = run("solve", "--model", folder, GIVEN)
        assert code == 1 and f"not solved: {reason}" in out.replace("rows, columns or boxes ", "")


def test_solve_draws_other_puzzles(run, solver):
    folder, answers = solver
    answers.append([1] * 4 + [5] * 12)
    code, out, err = run("solve", "--model", folder, "--alphabet", "#.SGo", "#####S....G.####")
    assert code == 0 and out == "####\noooo\noooo\noooo\n" and "segment 1: " in err


@pytest.mark.parametrize(
    ("puzzle", "options", "message"),
    [
        ("1..4", (), "has 4 cells; this model's have 16"),
        ("@none.txt", (), "none.txt: no such file"),
        (GIVEN.replace("2", "5"), (), "'5' is no cell of a Sudoku with digits 1 to 4"),
        (GIVEN.replace("2", "é"), (), "'é' is no cell"),
        ("#" * 15 + "x", ("--alphabet", "#.SGo"), "'x' is not in --alphabet"),
        ("#" * 16, ("--alphabet", ".....+#"), "holds the token 7"),
        (GIVEN, ("--puzzle-id", 3), "--puzzle-id is 3; this model's are from 0 to 2"),
        (GIVEN, ("--segments", 0), "--segments is 0"),
    ],
)
def test_puzzles_that_cannot_be_solved(run, puzzle_model, puzzle, options, message):
    code, _, err = run("solve", "--model", puzzle_model[1], *options, puzzle)
    assert code == 2 and message in err


def test_solving_needs_an_hrm(run, trained, tmp_path):
    code, _, err = run("solve", "--model", trained, GIVEN)
    assert code == 2 and "only HRM solves puzzles" in err
    code, _, err = run("solve", "--model", tmp_path / "none", GIVEN)
    assert code == 2 and "no such folder" in err


def test_a_converted_model_solves(run, puzzle_model, tmp_path):
    _, folder = puzzle_model
    state = {f"_orig_mod.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (tmp_path / "theirs").mkdir()
    torch.save(state, tmp_path / "theirs" / "step_5")
    arch = "arch:\n  hidden_size: 16\n  num_heads: 2\n  expansion: 4\n  H_layers: 1\n  L_layers: 1\n  puzzle_emb_ndim: 16\n"
    (tmp_path / "theirs" / "all_config.yaml").write_text(
        arch.replace("expansion: 4\n", "intermediate_size: 32\n")
    )
    code, _, err = run("solve", "--model", tmp_path / "theirs", GIVEN)
    assert code == 2 and "`fastattn convert" in err
    code, _, err = run("convert", tmp_path / "theirs", tmp_path / "ours", "--seq-len", 16)
    assert (code, err) == (0, "")
    first, second = (
        run("solve", "--model", name, "--segments", 2, GIVEN) for name in (folder, tmp_path / "ours")
    )
    assert first == second and first[0] in (0, 1)
    code, _, err = run("convert", tmp_path / "theirs", tmp_path / "ours", "--seq-len", 16)
    assert code == 2 and "holds a model already" in err
