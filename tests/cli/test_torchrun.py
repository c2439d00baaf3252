"""Several processes: the losses of one, a state that any number of them reads, and one end for all."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from fastattn.train.data.puzzles import write_folder

STEPS, STOP = 4, 2

# `fastattn` with something happening on one rank once STOP steps are done.
SCRIPT = f"""
import os, signal, sys
from fastattn.cli import main
from fastattn.train.run import Run as Trainer

event, *args = sys.argv[1:]
step = Trainer.step

def stepped(self):
    if self.step_number == {STOP} - 1 and os.environ["RANK"] == "1":
        if event == "error":
            raise OSError("no room left on rank 1")
        signal.raise_signal(signal.SIGINT)
    return step(self)

Trainer.step = stepped
main(args)
"""


@pytest.fixture
def args(data, config):
    """Arguments of `fastattn` for a run in a folder."""

    def make(folder, *more):
        options = ["--vocab-size", 300, "--batch-tokens", 128, "--threads", 1, "--steps", STEPS, *more]
        return list(map(str, ["train", "--data", data, "--config", config, "--output", folder, *options]))

    return make


def torchrun(tmp_path, args, event=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    program = ["-m", "fastattn.cli"] if event is None else [str(script), event]
    return subprocess.run(
        [sys.executable, *launcher, *program, *args],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def same_run(folder, whole):
    """Losses and averaged weights of `folder` are those of one process that never stopped."""

    def history(path):
        rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        return [(row["step"], row.get("loss", row.get("held_out"))) for row in rows]

    steps, losses = zip(*history(folder), strict=True)
    expected_steps, expected = zip(*history(whole), strict=True)
    assert steps == expected_steps
    assert losses == pytest.approx(expected, rel=1e-5)  # fp32: sums over the tokens in another order
    weights, others = (load_file(path / "model.safetensors") for path in (folder, whole))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        # in the norm: Adam's step is as long where a gradient is rounding alone, either way
        assert (weight - others[name]).norm() <= 1e-5 * others[name].norm(), name


@pytest.fixture
def whole(run, args, tmp_path):
    assert run(*args(tmp_path / "whole"))[0] == 0
    return tmp_path / "whole"


@pytest.fixture
def stop(monkeypatch):
    """Ends a run in this process after STOP steps, as Ctrl-C does."""
    from fastattn.train.text import Trainer

    def do(run, args):
        with monkeypatch.context() as patch:
            trains = Trainer.run
            patch.setattr(
                Trainer,
                "run",
                lambda self, on_step, stop: trains(self, on_step, lambda: self.step_number >= STOP),
            )
            run(*args)

    return do


def states(folder):
    return sorted(
        path.name for path in folder.iterdir() if "training-" in path.name or "training." in path.name
    )


def test_runs_change_hands_between_one_process_and_two(run, args, stop, whole, tmp_path):
    folder = tmp_path / "two-one"
    two = torchrun(tmp_path, args(folder), "interrupt")
    assert two.returncode and f"saved at step {STOP}" in two.stdout, two.stderr
    assert states(folder) == [f"training-{STOP}.dcp"]
    torn = shutil.copytree(folder, tmp_path / "torn")
    assert run(*args(folder, "--resume"))[0] == 0
    assert states(folder) == ["training.safetensors"]
    same_run(folder, whole)

    folder = tmp_path / "one-two"
    stop(run, args(folder))
    assert states(folder) == ["training.safetensors"]
    two = torchrun(tmp_path, args(folder, "--resume"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("report in") == 1 and (folder / "report.html").exists()
    assert states(folder) == [f"training-{STEPS}.dcp"]
    same_run(folder, whole)

    for shard in (torn / f"training-{STOP}.dcp").iterdir():
        kept = shard.read_bytes()
        for damage in (lambda path, kept: path.write_bytes(kept[:-1]), lambda path, kept: path.unlink()):
            damage(shard, kept)
            code, _, err = run(*args(torn, "--resume"))
            assert code == 2 and f"training-{STOP}.dcp: " in err, err
        shard.write_bytes(kept)


def test_puzzles_begun_by_two_processes_are_ended_by_one(run, tmp_path):
    """Vectors of several puzzles, padding, and a batch that two processes cannot halve."""
    tokens = np.random.default_rng(0).integers(1, 6, size=(8, 9))
    for split in ("train", "test"):
        write_folder(tmp_path / "data", split, tokens, tokens, vocab_size=6)
        metadata = json.loads((tmp_path / "data" / split / "dataset.json").read_text())
        metadata["num_puzzle_identifiers"] = 5
        (tmp_path / "data" / split / "dataset.json").write_text(json.dumps(metadata))
        np.save(tmp_path / "data" / split / "all__puzzle_identifiers.npy", np.arange(8) % 4 + 1)

    def args(folder, *more):
        command = ["train", "--model", "hrm", "--data", tmp_path / "data", "--output", folder]
        return list(map(str, [*command, "--batch-size", 5, "--threads", 1, "--steps", STEPS, *more]))

    assert run(*args(tmp_path / "whole"))[0] == 0
    folder = tmp_path / "run"
    two = torchrun(tmp_path, args(folder), "interrupt")
    assert two.returncode and f"saved at step {STOP}" in two.stdout, two.stderr
    assert run(*args(folder, "--resume"))[0] == 0
    rows, expected = (
        [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "whole")
    )
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-5), name
    weights, others = (load_file(path / "training.safetensors") for path in (folder, tmp_path / "whole"))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        difference = (weight.double() - others[name].double()).norm()
        # fp32: sums in another order; moments of gradients that nearly cancel are among them
        assert difference <= 1e-4 * others[name].double().norm(), name


def test_an_error_on_one_rank_ends_all(args, tmp_path):
    two = torchrun(tmp_path, args(tmp_path / "run"), "error")
    assert two.returncode and "error: no room left on rank 1" in two.stderr


# `fastattn` with each list of arguments in turn; every rank says what it exits with.
REFUSALS = """
import json, os, sys
from fastattn.cli import main

for args in json.loads(sys.argv[1]):
    try:
        main([arg.replace("RANK", os.environ["RANK"]) for arg in args])
    except SystemExit as end:
        os.write(1, f"rank {os.environ['RANK']} exits with {end.code}\\n".encode())
os._exit(0)
"""


def refused(tmp_path, *runs):
    script = tmp_path / "refusals.py"
    script.write_text(REFUSALS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(runs)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [done.stdout.count(f"rank {rank} exits with 2") for rank in (0, 1)] == [len(runs)] * 2, done.stdout
    return done.stderr


def test_what_several_processes_cannot_do_is_refused_by_every_rank(args, tmp_path):
    minutes = args(tmp_path / "run")
    at = minutes.index("--steps")
    del minutes[at : at + 2]
    puzzles = [
        "train",
        "--model",
        "hrm",
        "--data",
        "sudoku",
        "--steps",
        "4",
        "--batch-size",
        "1",
        "--puzzles",
        "10",
    ]
    puzzles += ["--output", str(tmp_path / "run")]
    # the last has joined the others by then
    text = refused(tmp_path, minutes, args(tmp_path / "nothing", "--resume"), puzzles)
    for message in (
        "give --steps",
        "nothing/training.safetensors: no such file; there is no run to resume",
        "batch_size is 1; 2 processes need a puzzle each",
    ):
        assert text.count(message) == 2, text


@pytest.mark.parametrize("dropped", [1, 2])  # the last example is held out, the one before is not
def test_ranks_with_different_data_are_refused(args, data, tmp_path, dropped):
    for rank in (0, 1):
        kept = data.read_text().splitlines()
        del kept[len(kept) - rank * dropped :]
        (tmp_path / f"data-{rank}.jsonl").write_text("\n".join(kept) + "\n")
    given = [str(tmp_path / "data-RANK.jsonl") if arg == str(data) else arg for arg in args(tmp_path / "run")]
    assert refused(tmp_path, given).count("the processes were given different data or options") == 2


def test_moving_codes_are_refused(args, tmp_path):
    text = refused(tmp_path, args(tmp_path / "run", "--head", "vq", "--codebook-size", 16))
    assert text.count("are for one process") == 2
