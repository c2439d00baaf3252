"""Whole runs over a synthetic op in a worker process: candidates that go wrong, tables, the report."""

import json
import re
from dataclasses import replace

import planted
import pytest
from fastattn.autotune import report, tuner
from fastattn.autotune.worker import Worker
from planted import TRAPS

from fastattn.runtime import tables as _tables
from fastattn.runtime import tuning as _config


class Recorder(tuner.Listener):
    def __init__(self):
        self.events = []

    def planned(self, buckets):
        self.events.append(("planned", len(buckets)))

    def started(self, result, seconds):
        self.events.append(("started", result.bucket.name))

    def tried(self, result, config, outcome):
        self.events.append(("tried", outcome.reason))

    def finished(self, result):
        self.events.append(("finished", result.bucket.name))


def _no_space(*args):
    raise OSError("No space left on device")


def test_ops_of_most_worth_come_first(synthetic, monkeypatch):
    first = tuple(replace(one, worth=one.op == "trapped") for one in planted.WORKLOADS)
    monkeypatch.setattr(planted, "WORKLOADS", first)
    with Worker("cpu", threads=1) as worker:
        buckets, failures, _ = tuner.plan(worker, ["planted"], (), (), "quick")
    assert not failures and [bucket.op for _, bucket in buckets] == ["trapped", "planted"]


def test_whole_run(synthetic, target, tmp_path, monkeypatch):
    monkeypatch.setitem(tuner.TRIAL_LIMITS, "cpu", 5.0)  # what the hang takes
    recorder = Recorder()
    run = tuner.tune(modules=["planted"], budget=1000.0, threads=1, listener=recorder)
    planted, trapped = run.results
    assert not run.failures and not run.skipped
    assert recorder.events[0] == ("planned", 2)
    assert [event for event in recorder.events if event[0] == "finished"] == [
        ("finished", "planted.cpu"),
        ("finished", "trapped.cpu"),
    ]
    # of the feasible ones, 64 wide takes 0.75 ms and the default 2 ms
    assert planted.config == {"tile": 64, "variant": "wide"} and not planted.kept
    assert planted.comparison.ratio == pytest.approx(0.375)
    assert planted.comparison.seconds == pytest.approx(0.75e-3)
    # each trap is a failed trial with its reason, and the study goes on to the better tile
    assert trapped.config == {"tile": 64, "trap": "none"}
    assert {config["trap"]: outcome.reason for config, outcome in trapped.trials} == {
        "none": "",
        "crash": "crashed",
        "hang": "timed out",
        "wrong": "wrong",
        "raise": "error",
        "full": "out of resources",
        "unwritten": "wrong",
    }
    assert trapped.feasible == len(trapped.trials) == 8 and trapped.refused.total() == len(TRAPS)

    table = json.loads((_tables.cache_dir() / "tables" / f"{target.slug}.json").read_text())
    (entry,) = table["ops"]["planted"]["cpu"]["entries"]
    assert entry["config"] == planted.config and entry["shapes"] == [
        {"length": 500, "head_dim": 32},
        {"length": 512, "head_dim": 32},
    ]
    assert entry["key"] == {"dtype": "float32", "head_dim": 32} and entry["sizes"] == {"length": 512}
    choice = _config.lookup("planted", "cpu", structural=entry["key"], sizes={"length": 600}, device="cpu")
    assert dict(choice.values) == planted.config and choice.source == run.path

    page = report.page(run)
    assert page.count("<svg") == 3 and page.count("<svg") == page.count("</svg>")
    for text in ("planted.cpu", "trapped.cpu", "crashed", "timed out", target.name, "geometric mean gain"):
        assert text in page
    assert not re.search(r"(src|href)=[\"'](http|//)|<script|@import", page), "needs no network"
    with monkeypatch.context() as nothing_gained:
        for result in run.results:
            nothing_gained.setattr(result, "kept", "no gain")
        page = report.page(run)
        lead = "The defaults were already the fastest of what was tried, in all"
        assert "<svg" not in page and lead in page and page.index(lead) < page.index("<section")
    trapped.failure, trapped.comparison = "<b>&", None
    assert "<b>&" not in report.page(run) and "&lt;b&gt;&amp;" in report.page(run)
    report.write(run, tmp_path / "new" / "report.html")
    before = (tmp_path / "new" / "report.html").read_bytes()
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr("os.fsync", _no_space)
        report.write(run, tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_bytes() == before
    assert (tmp_path / "new" / "report.html").read_text().endswith("</html>\n")

    again = tuner.tune(modules=["planted"], ops=["planted"], budget=60.0, threads=1)
    (result,) = again.results
    assert result.trials == [] and result.inherited == 8, "everything is known from the first run"
    assert result.config == planted.config


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="effort is 'fast'"):
        tuner.tune(effort="fast")
    with pytest.raises(
        ValueError, match=r"nothing to tune for nonsense on cpu; there is planted.cpu, trapped.cpu"
    ):
        tuner.tune(modules=["planted"], ops=["nonsense"])
