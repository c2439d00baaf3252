"""Stopping and going on: bit for bit, whatever stopped it."""

import io
import itertools
import os
import signal
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fastattn as fa
from fastattn.cli import _run
from fastattn.models import HrmText, HrmTextConfig
from fastattn.train.data.jsonl import Example
from fastattn.train.data.tokenizer import Tokenizer
from fastattn.train.state import read_state
from fastattn.train.text import STATE, TrainConfig, Trainer, bp_steps_at

EXAMPLES = [Example(f"What is {w}{n}?", f"A {w} of {n} parts.") for w in ("list", "set") for n in range(12)]
CONFIG = TrainConfig(
    steps=8, batch_tokens=128, warmup_steps=3, eval_every=3, save_every=100, update_codes_every=2, seed=5
)
VQ = {"head": "vq", "codebook_size": 40}


@pytest.fixture(scope="module")
def parts():
    """(tokenizer, training samples, held-out samples)"""
    tokenizer = Tokenizer.train(EXAMPLES, 300)
    samples = tokenizer.samples(EXAMPLES)
    return tokenizer, samples[4:], samples[:4]


@pytest.fixture
def fresh(parts):
    def make(folder, **changes):
        tokenizer, samples, held_out = parts
        shape = HrmTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            **changes,
        )
        return _run.start(folder, shape, tokenizer, samples, held_out, CONFIG)

    return make


def same_files(a, b):
    for name in ("model.safetensors", STATE):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{name}: {key}"


def untimed(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize(
    ("stop_after", "head"),
    [
        (1, {}),
        (3, {}),
        (5, {}),
        (3, VQ),
        (3, VQ | {"codebook_assignment": "straight_through"}),
        (5, VQ | {"codebook_assignment": "ema", "codebook_bias": False}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_one_that_never_stopped(fresh, parts, tmp_path, stop_after, head):
    whole = fresh(tmp_path / "whole", **head)
    whole.run()

    first = fresh(tmp_path / "parts", **head)
    first.run(stop=lambda: first.step_number >= stop_after)
    assert first.step_number == stop_after and not first.done
    torch.manual_seed(999)  # what ran in between must not matter
    second = Trainer.resume(tmp_path / "parts", *parts)
    assert second.step_number == stop_after
    second.run()

    same_files(tmp_path / "whole", tmp_path / "parts")
    assert untimed(second.history) == untimed(whole.history)


@pytest.mark.parametrize("assignment", ["fixed", "straight_through", "ema"])
def test_codes_move_every_so_many_steps(fresh, tmp_path, assignment):
    trainer = fresh(tmp_path, **VQ, codebook_assignment=assignment)
    head = trainer.model.lm_head
    codes = [head.codes.clone()]
    for _ in range(4):
        trainer.step()
        codes.append(head.codes.clone())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(codes)]
    assert moved == [False, assignment != "fixed"] * 2
    trainer.save()
    saved = HrmText.from_pretrained(tmp_path).lm_head
    if assignment == "fixed":
        assert torch.equal(saved.codes, codes[-1])
    else:
        assert torch.equal(saved.codes, fa.nearest_codes(saved.weight, saved.codebook))
    assert torch.equal(head.codes, codes[-1])  # the averaged weights' codes are theirs alone


def test_ctrl_c_ends_the_step_and_saves(fresh, parts, tmp_path, monkeypatch):
    trainer = fresh(tmp_path)
    step = trainer.step

    def interrupted():
        if trainer.step_number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(trainer, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert not _run.train(trainer)
    assert signal.getsignal(signal.SIGINT) is before
    assert read_state(tmp_path / STATE)[1]["step"] == 3
    resumed = Trainer.resume(tmp_path, *parts)
    assert _run.train(resumed) and resumed.done


def test_a_closed_pipe_ends_the_step_and_saves(fresh, parts, tmp_path, monkeypatch):
    """As with `fastattn train ... | head -3`."""
    trainer = fresh(tmp_path)
    nobody = io.StringIO()
    monkeypatch.setattr(nobody, "write", mock.Mock(side_effect=BrokenPipeError), raising=False)
    monkeypatch.setattr(_run, "console", Console(file=nobody))
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)  # rich would send pytest's own output nowhere
    assert not _run.train(trainer)
    assert read_state(tmp_path / STATE)[1]["step"] == trainer.step_number < trainer.config.steps
    resumed = Trainer.resume(tmp_path, *parts)
    assert _run.train(resumed) and resumed.done


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_save_that_dies_leaves_the_last_good_one(fresh, parts, tmp_path, monkeypatch, moment):
    trainer = fresh(tmp_path)
    trainer.step()
    trainer.save()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer.step()
    replace = os.replace

    def die(*args, **kwargs):
        raise Killed

    def die_at_the_state(source, target):
        return die() if str(target).endswith(STATE) else replace(source, target)

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr("safetensors.torch.save_file", die)
        else:
            patch.setattr(os, "replace", die_at_the_state)
        with pytest.raises(Killed):
            trainer.save()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()  # no temporary file stays
    assert all(after[name] == before[name] for name in (STATE, "model.safetensors", "config.json"))
    assert Trainer.resume(tmp_path, *parts).step_number == 1


def test_planning_and_profiling_leave_the_run_alone(fresh, tmp_path):
    plain, tried = fresh(tmp_path / "a"), fresh(tmp_path / "b")
    assert tried.seconds_per_step(steps=1) > 0
    names = {op.name for op in tried.op_times(steps=1)}
    assert "aten::mm" in names and any(name.startswith("fastattn::rms_norm") for name in names)
    plain.run()
    tried.run()
    same_files(tmp_path / "a", tmp_path / "b")


def test_a_plan_holds_until_the_first_step(fresh, tmp_path):
    trainer = fresh(tmp_path)
    _run.plan_steps(trainer, minutes=1e-6)
    assert trainer.config.steps == 10 and trainer.config.ema == 0.8
    assert trainer.optimizer.param_groups[0]["ema"] == 0.8
    trainer.step()
    with pytest.raises(ValueError, match="keeps its config"):
        trainer.replan(CONFIG)


def test_a_plan_leaves_evaluations_a_quarter_at_most(fresh, tmp_path, monkeypatch):
    trainer = fresh(tmp_path)
    monkeypatch.setattr(trainer, "seconds_per_step", lambda: 0.5)
    monkeypatch.setattr(Trainer, "average_cost", 1.0)
    for looking, steps, every in ((1.0, 104, 13), (5.0, 90, 30), (60.0, 90, 90)):
        monkeypatch.setattr(trainer, "seconds_per_evaluation", lambda looking=looking: looking)
        _run.plan_steps(trainer, minutes=1.0)
        assert (trainer.config.steps, trainer.config.eval_every) == (steps, every)


def test_a_loss_that_is_not_finite_is_said(fresh, tmp_path):
    trainer = fresh(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        trainer.step()


def test_credit_reaches_further_back():
    config = TrainConfig(steps=100, credit_warmup=0.2)
    assert [bp_steps_at(s, config, 5) for s in (0, 6, 7, 13, 14, 19, 20, 99)] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert bp_steps_at(0, TrainConfig(steps=100, credit_warmup=0.0), 5) == 5


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"steps": 1, "ema": 1.0}, {"steps": 1, "learning_rate": -1.0}]
)
def test_a_config_is_checked(values):
    with pytest.raises(ValueError, match=f"train: {list(values)[-1]} is"):
        TrainConfig(**values)


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match="unknown key 'stepz'"):
        TrainConfig.from_dict({"stepz": 3})
