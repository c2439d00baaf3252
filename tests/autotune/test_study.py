"""Trials are kept, shared between processes and survive kills."""

import json
import os
import signal
import subprocess
import sys

import optuna
import pytest
import replay
from fastattn.autotune import search, study

RUN = """
import sys, time
import replay
from fastattn.autotune import search, study
from fastattn.autotune.study import Outcome
url, every = sys.argv[1], sys.argv[2] == "every"
seed, most, pause = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
sweep = replay.modelled()
class Slow:
    def trial(self, config, hopeless):
        print(config, flush=True)
        time.sleep(pause)
        return sweep.trial(config, hopeless)
trials = study.Trials(study.open_storage(url), "shared", sweep.space, seed=seed)
search.explore(sweep.space, trials, Slow(), search.Clock(1e9), seed=seed, most=most, every=every)
"""


def start(url, seed=0, most=8, pause=0.0, every="model"):
    command = [sys.executable, "-c", RUN, url, every, str(seed), str(most), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return out.splitlines()


def trials_in(url, sweep=None):
    sweep = sweep or replay.modelled()
    return study.Trials(study.open_storage(url), "shared", sweep.space, seed=9)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_processes_share_a_study(kind, tmp_path):
    url = f"journal:{tmp_path}/trials.journal" if kind == "journal" else f"sqlite:///{tmp_path}/trials.db"
    evaluated = [finish(process) for process in [start(url, seed) for seed in (1, 2)]]
    trials = trials_in(url)
    assert [len(one) for one in evaluated] == [8, 8]
    # the default may be evaluated by both at the start; beyond that each learns what the other finished
    assert 12 <= len(trials.known) <= 16
    assert all(outcome.ratio is not None or outcome.reason for outcome in trials.known.values())


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_trial_that_another_run_has_finished_is_let_be(kind, tmp_path):
    """A queued trial may be taken twice where a database locks no rows."""
    url = f"journal:{tmp_path}/trials.journal" if kind == "journal" else f"sqlite:///{tmp_path}/trials.db"
    one, other = trials_in(url), trials_in(url)
    trial, point = one.propose()
    other._study.tell(trial.number, 0.5)
    one.record(point, study.Outcome(0.7, seconds=1.0), trial)
    one.record(point, study.Outcome(None, "wrong"), trial)
    assert trials_in(url).known[point].ratio == 0.5


def test_killed_run_resumes(tmp_path):
    url = f"journal:{tmp_path}/trials.journal"
    first = start(url, pause=0.05, most=100)
    seen = [first.stdout.readline() for _ in range(6)]
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    trials = trials_in(url)
    assert 5 <= len(trials.known) <= 6
    running = trials._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert not running, "what the killed run was at is free again"
    sweep = replay.modelled()
    known = len(trials.known)
    search.explore(sweep.space, trials, sweep, search.Clock(1e9), most=4, every=False)
    assert len(trials.known) == known + 4
    done = {str(line.strip()) for line in seen[:known]}
    assert not done & {str(sweep.space.config(point)) for point in sweep.calls}


def test_truncated_last_line_is_cut(tmp_path):
    sweep, url, path = replay.modelled(), f"journal:{tmp_path}/t.journal", tmp_path / "t.journal"
    trials = trials_in(url, sweep)
    search.explore(sweep.space, trials, sweep, search.Clock(1e9), most=3, every=True)
    with open(path, "ab") as file:
        file.write(b'{"op_code": 4, "worker')
    again = trials_in(url, sweep)
    assert len(again.known) == 3
    search.explore(sweep.space, again, sweep, search.Clock(1e9), most=2, every=True)
    assert len(trials_in(url, sweep).known) == 5


@pytest.mark.parametrize(
    "contents",
    [
        b"\x00\x01binary\n",
        b'{"a": 1}\nnonsense\n{"b": 2}\n',
        b"[1]\n",
        b"no line end",
        b"[" * 100_000 + b"\n",
    ],
    ids=range(5),
)
def test_corrupt_journal_is_set_aside(contents, tmp_path, caplog):
    path = tmp_path / "t.journal"
    path.write_bytes(contents)
    assert trials_in(f"journal:{path}").known == {}
    (aside,) = tmp_path.glob("*.corrupt-*")
    assert aside.read_bytes() == contents and "set aside" in caplog.text


def test_journal_of_another_kind_is_set_aside(tmp_path):
    path = tmp_path / "t.journal"
    path.write_text(json.dumps({"valid": "json", "but": "no journal"}) + "\n")
    assert trials_in(f"journal:{path}").known == {}


def test_changed_space_starts_afresh(tmp_path):
    url = f"journal:{tmp_path}/t.journal"
    sweep = replay.modelled()
    search.explore(sweep.space, trials_in(url, sweep), sweep, search.Clock(1e9), most=3, every=True)
    other = replay.Sweep({"rows": [8, 16]}, {"rows": 8}, {(8,): 1.0, (16,): 2.0})
    assert trials_in(url, other).known == {}
    assert len(trials_in(url, sweep).known) == 3


def test_bad_storage_url(monkeypatch):
    with pytest.raises(ValueError, match="expected journal:PATH"):
        study.open_storage("trials.txt")
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="storage nosuch:// cannot be opened") as raised:
        study.open_storage("nosuch://user:secret@host/trials")
    assert "secret" not in str(raised.value)
