"""Training HRM: held-out puzzles kept apart, a run that learns, stopping and going on bit for bit, what is printed."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastattn.models import Hrm, HrmConfig
from fastattn.train.data import sudoku
from fastattn.train.data.puzzle_sets import FolderData, SudokuData
from fastattn.train.data.puzzles import PuzzleOrder, write_folder
from fastattn.train.puzzles import HrmTrainConfig, HrmTrainer, evaluate, model_config, show_steps
from fastattn.train.run import is_evaluation

TINY = {
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "H_layers": 1,
    "L_layers": 1,
    "halt_max_steps": 2,
}


@pytest.fixture(scope="module")
def easy():
    return SudokuData(2, blanks=(2, 6), puzzles=200, held_out=64)


def start(folder, data, seed=0, **options):
    torch.manual_seed(seed)
    model = Hrm(HrmConfig(**data.config, **TINY))
    options = {"steps": 12, "batch_size": 16, "eval_every": 5, "seed": seed} | options
    return HrmTrainer(folder, model, data, HrmTrainConfig(sudoku=data.options, **options))


def boards(batch, name="inputs"):
    return sudoku.from_tokens(batch[name].numpy())


def test_no_image_of_a_held_out_puzzle_is_shown():
    data = SudokuData(2, blanks=(5, 8), puzzles=60, held_out=20, seed=3)
    held_out = {sudoku.canonical(board) for board in boards(data.held_out)}
    assert len(held_out) == 20
    batches = list(data.epoch(32, np.random.default_rng(0)))
    assert [len(batch["inputs"]) for batch in batches] == [32, 32]
    shown = np.concatenate([boards(batch) for batch in batches])
    kinds = {sudoku.canonical(board) for board in shown}
    assert not kinds & held_out
    assert kinds == {sudoku.canonical(board) for board in data.train[0]}  # all of them, as images
    assert not {board.tobytes() for board in shown} <= {board.tobytes() for board in data.train[0]}


@pytest.mark.parametrize(("box", "blanks"), [(2, (5, 8)), (3, (4, 6))])
def test_batches_are_puzzles_and_their_solutions(box, blanks):
    data = SudokuData(box, blanks=blanks, puzzles=40, held_out=10, seed=3)
    for batch in (*data.epoch(32, np.random.default_rng(0)), *data.evaluation(8)):
        blank = (batch["inputs"] == 1).sum(-1)
        assert blank.min() >= blanks[0] - 1 and blank.max() <= blanks[1]
        given = batch["inputs"] > 1
        assert torch.equal(batch["inputs"][given], batch["labels"][given])
        assert all(sudoku.is_solution(board) for board in boards(batch, "labels"))
    assert not {b.tobytes() for b in boards(data.held_out)} & {b.tobytes() for b in data.train[0]}
    assert data.config == {"vocab_size": box * box + 2, "seq_len": box**4}
    assert data.digest() == SudokuData(**data.options).digest()
    assert data.digest() != SudokuData(**data.options | {"seed": 4}).digest()


def test_guesses():
    data = SudokuData(2, blanks=(1, 1), puzzles=5, held_out=1)  # the lacking digit is known
    assert data.guesses() == {"any digit": 0.25, "a digit the board lacks": 1.0}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_an_order_goes_on_where_it_was(easy):
    order = PuzzleOrder(easy, 48, seed=1)
    batches = [order.next() for _ in range(12)]  # five an epoch
    assert (order.epoch, order.position) == (2, 2)
    again = PuzzleOrder(easy, 48, seed=1, epoch=1, position=3)
    apart = copy.copy(again)
    assert all(same(again.next(), batch) for batch in batches[8:])
    assert same(apart.next(), batches[8])
    assert not any(same(a, b) for a, b in itertools.combinations(batches, 2))


def test_a_run_learns(easy, tmp_path):
    # weights drawn from four other seeds end at more than half of the cells: what a seed draws is torch's to change
    run = start(tmp_path, easy, steps=300, learning_rate=1e-2, eval_every=300, ema=0.95)
    run.run()
    before, after = (row for row in run.history if is_evaluation(row))
    assert before["step"] == 0 and after["step"] == 300
    # guessing gets a quarter of about 250 cells right, with a deviation of sqrt(3 / 16 / 250) = 0.027: four of them
    assert before["cells"] < 0.36 < after["cells"] and before["exact"] < after["exact"]
    losses = [row["loss"] for row in run.history if "loss" in row]
    assert sum(losses[-20:]) / 20 < math.log(4)  # what guessing among the four digits costs
    with run.averaged():
        measured = evaluate(run.model, easy.evaluation(16))
    saved = Hrm.from_pretrained(tmp_path)
    assert (
        measured
        == evaluate(saved, easy.evaluation(16))
        == {k: after[k] for k in ("cells", "exact", "puzzles")}
    )
    shown = list(show_steps(saved, easy.held_out))
    assert str(shown[0]).startswith("puzzle\n") and shown[1].title.startswith("segment 1: ")
    assert all(np.any(a.board != b.board) for a, b in itertools.pairwise(shown[:-1])), (
        "only what changed is shown"
    )
    assert shown[-1].title.startswith("segment 16: ") or " changed" in shown[-1].title


def same_files(a, b):
    for name in ("model.safetensors", "training.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{name}: {key}"


@pytest.mark.parametrize("stop_after", [0, 1, 7])
def test_a_resumed_run_equals_one_that_never_stopped(easy, tmp_path, stop_after):
    whole = start(tmp_path / "whole", easy)
    whole.run()
    first = start(tmp_path / "parts", easy)
    first.run(stop=lambda: first.step_number >= stop_after)
    torch.manual_seed(999)  # what ran in between must not matter
    second = HrmTrainer.resume(tmp_path / "parts")
    assert second.step_number == stop_after and not second.done
    second.run()
    same_files(tmp_path / "whole", tmp_path / "parts")
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (whole, second)
    ]
    assert histories[0] == histories[1]


def test_planning_leaves_the_run_alone(easy, tmp_path):
    start(tmp_path / "a", easy).run()
    tried = start(tmp_path / "b", easy)
    assert tried.seconds_per_step(steps=1) > 0 and tried.seconds_per_evaluation() > 0
    assert any(op.ours for op in tried.op_times(steps=1))
    tried.run()
    same_files(tmp_path / "a", tmp_path / "b")


def test_the_averaged_weights_are_evaluated_and_saved(easy, tmp_path):
    run = start(tmp_path, easy, steps=4, ema=0.5, eval_every=100)
    average = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    while not run.done:
        run.step()
        for name, p in run.model.named_parameters():
            average[name].lerp_(p.detach(), 0.5)
    run.save()
    saved = Hrm.from_pretrained(tmp_path)
    for name, p in saved.named_parameters():
        torch.testing.assert_close(p, average[name], rtol=0, atol=0)
        assert not torch.equal(p, dict(run.model.named_parameters())[name])
    assert torch.equal(saved.puzzle_emb.weights, run.model.puzzle_emb.weights)


def test_folders_of_puzzles(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(6, 16))
    for split in ("train", "test"):
        write_folder(tmp_path, split, tokens, tokens, vocab_size=6)
    data = FolderData(tmp_path)
    run = start(tmp_path / "run", data, steps=4, batch_size=4)
    run.run(stop=lambda: run.step_number >= 3)
    assert sum(len(batch["inputs"]) for batch in data.evaluation(4)) == 6
    assert HrmTrainer.resume(tmp_path / "run", data).step_number == 3
    with pytest.raises(ValueError, match="folder of puzzles, which has to be given"):
        HrmTrainer.resume(tmp_path / "run")
    write_folder(tmp_path, "test", tokens, tokens[::-1], vocab_size=6)
    with pytest.raises(ValueError, match="other data"):
        HrmTrainer.resume(tmp_path / "run", FolderData(tmp_path))


def test_padding_is_not_solved(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(3, 16))
    for split in ("train", "test"):
        write_folder(tmp_path, split, tokens, tokens, vocab_size=6)
    run = start(tmp_path / "run", FolderData(tmp_path), batch_size=16)  # 13 rows of padding
    row = run.step()
    assert row["tokens"] == 3 * 16 and row["solved"] == 0
    assert run.model(run.carry, run.order.next())[1].counted.sum() == 3


def test_puzzles_without_labels_are_no_successes(easy, tmp_path):
    """As the unknown solutions of a competition's test split."""
    torch.manual_seed(0)
    model = Hrm(HrmConfig(**easy.config, **TINY))
    batch = {name: value[:8] for name, value in easy.held_out.items()}
    expected = evaluate(model, [batch])
    unknown = batch | {"labels": torch.full_like(batch["labels"], -100)}
    mixed = {name: torch.cat([unknown[name], batch[name], unknown[name]]) for name in batch}
    assert evaluate(model, [mixed]) == evaluate(model, [unknown, batch]) == expected
    assert evaluate(model, [unknown]) == {"cells": 0, "exact": 0, "puzzles": 0}


def test_an_evaluation_solves_a_sample_and_all_on_demand(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(600, 16))
    for split in ("train", "test"):
        write_folder(tmp_path, split, tokens, tokens, vocab_size=6)
    data = FolderData(tmp_path)
    sample = torch.cat([batch["inputs"] for batch in data.evaluation(64, 100)])
    assert torch.equal(sample, torch.from_numpy(tokens[::6]))
    assert torch.equal(torch.cat([b["inputs"] for b in data.evaluation(64, 601)]), torch.from_numpy(tokens))
    for asked, count in ((None, 600), (100, 100), (256, 256), (10, 10)):
        run = start(tmp_path / "run", data, eval_puzzles=asked, batch_size=64)
        assert run.seconds_per_evaluation() > 0
        # a folder may hold half a million puzzles, and solving some hundred may take longer than a person waits
        assert run.evaluate()["puzzles"] == min(32, count)
        run.step()
        assert run.evaluate()["puzzles"] == count
    assert HrmTrainConfig(steps=1).eval_puzzles == 256


def test_a_test_split_without_labels_is_not_evaluated(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 6, size=(6, 16))
    write_folder(tmp_path, "train", tokens, tokens, vocab_size=6)
    write_folder(tmp_path, "test", tokens, np.zeros_like(tokens), vocab_size=6)
    run = start(tmp_path / "run", FolderData(tmp_path), steps=2, batch_size=4)
    run.run()
    assert not any(is_evaluation(row) for row in run.history) and run.seconds_per_evaluation() == 0


def test_shapes(easy):
    small, trm, published = (model_config(easy, shape) for shape in ("small", "trm", "published"))
    assert not small.shared_stack and trm.shared_stack and small.hidden_size == trm.hidden_size
    assert published == HrmConfig(**easy.config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box": 4}, "box is 4"),
        ({"blanks": (3, 2)}, r"blanks is \(3, 2\)"),
        ({"puzzles": 0}, "puzzles is 0"),
        ({"blanks": (1, 1), "held_out": 50}, "too few different puzzles to hold out 50"),
    ],
)
def test_bad_data(arguments, message):
    with pytest.raises(ValueError, match=message):
        SudokuData(**{"box": 2, "blanks": (1, 2), "puzzles": 5} | arguments)


def test_the_learning_rate_warms_up_and_falls():
    def rates(**options):
        config = HrmTrainConfig(steps=8, warmup_steps=3, **options)
        return [round(config.rate_at(step), 6) for step in range(8)]

    warm = [round(n / 3, 6) for n in (1, 2, 3)]
    assert rates() == [*warm, 1, 1, 1, 1, 1]
    half = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert rates(schedule="cosine") == [*warm, *(round(x, 6) for x in half)]
    assert rates(schedule="cosine", min_learning_rate_ratio=0.2)[3:] == [
        round(0.2 + 0.8 * x, 6) for x in half
    ]


def test_bad_options(easy):
    with pytest.raises(ValueError, match="batch_size is 0"):
        HrmTrainConfig(steps=1, batch_size=0)
    with pytest.raises(ValueError, match="shape is 'huge'"):
        model_config(easy, "huge")
