"""The benchmark runner: no speed figure from a wrong result, ratios and bars as documented."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastattn as fa
from fastattn import masks, testing

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import gpu_check, limits, pictures, readme, registry, report, runner
from benchmarks.cases import attention

ROOT = Path(__file__).parents[1]


def scaled(x):
    return 2 * x


def missing(x):
    raise NotImplementedError("there is no such thing here")


def problem(dtype, n, own=scaled, peer=scaled):
    return registry.Problem(
        inputs=(testing.random_tensor(n, dtype=dtype, requires_grad=True),),
        contenders={"fastattn": own, "peer": peer, "absent": missing},
        reference=scaled,
        bytes=8 * n,
    )


CASE = registry.Case(
    "group", "scaled", problem, {"n": 100}, torch.float32, bars=(registry.faster_than("peer", 1e-6),)
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(limits, "PEAK_ITERATIONS", 100)


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_right_result_is_timed_against_the_peers_that_run(direction):
    result = runner.run(dataclasses.replace(CASE, direction=direction), {"copy": 10.0}, quick=True)
    assert result.correct and set(result.times) == {"fastattn", "peer"}
    assert result.bar_met(CASE.bars[0]) is True and result.share > 0
    assert "no such thing" in result.not_run["absent"]
    assert result.bar_met(registry.faster_than("absent", 1)) is None
    assert result.bar_met(registry.time_at_most("peer", 1e-9)) is False


def test_a_wrong_result_gives_no_figures():
    def wrong_forward(x):
        return 2.001 * x

    def wrong_gradient(x):
        return x + x.detach()

    for own, direction in ((wrong_forward, "forward"), (wrong_gradient, "backward")):
        case = dataclasses.replace(CASE, options={"own": own}, direction=direction)
        result = runner.run(case, {}, quick=True)
        assert not result.correct and not result.times and "WRONG" in result.error
    peer = runner.run(dataclasses.replace(CASE, options={"peer": wrong_forward}), {}, quick=True)
    assert peer.correct and "peer" not in peer.times and "another result" in peer.not_run["peer"]


def test_a_slow_peer_is_called_once_for_its_result_and_its_time(monkeypatch):
    monkeypatch.setattr(runner, "CASE_SECONDS", 0.05)
    calls, seen = [], {}

    def peer(x):
        calls.append(x)
        time.sleep(0.06)
        return x

    def build(dtype):
        x = torch.ones(3, dtype=dtype)
        return registry.Problem((x,), {"fastattn": lambda x: x + 0, "peer": peer}, compare=seen.update)

    case = registry.Case("group", "slow", build, {}, torch.float32, "step", needs={"copy": 1e9})
    assert "needs copy" in runner.run(case, {}, quick=True).error and not calls
    result = runner.run(case, {}, quick=True, slow=True)
    assert len(calls) == 1 and set(seen) == {"fastattn", "peer"}
    assert result.ratios["peer"].median > 1 and result.times["peer"].low == result.times["peer"].high >= 0.06


def test_a_row_that_has_nothing_to_compare_with_is_wrong():
    def build(dtype):
        contenders = {"fastattn": torch.zeros, "peer": missing}
        return registry.Problem((1,), contenders, compare=lambda found: None)

    result = runner.run(registry.Case("group", "op", build, {}, torch.float32, "step"), {}, quick=True)
    assert result.wrong and "peer did not run" in result.error


def test_rows_that_are_not_run_again_stay_with_their_date(tmp_path):
    path, limit = tmp_path / "group.json", {"copy": 10.0}
    first, second = runner.run(CASE, limit), runner.run(dataclasses.replace(CASE, op="other"), limit)
    env = report.environment()
    report.write_json(path, report.as_json("group", env | {"date": "then"}, limit, [first, second]))
    rows = report.joined(path, report.as_json("group", env | {"date": "now"}, limit, [second]))["results"]
    assert [(row["name"], row["measured"]["date"]) for row in rows] == [
        (second.case.name, "now"),
        (first.case.name, "then"),
    ]
    assert report.joined(tmp_path / "none.json", {"results": rows}) == {"results": rows}


def test_results_are_written_as_json_and_shown(tmp_path):
    results = [runner.run(CASE, {}, quick=True)]
    report.table("group", results)
    path = tmp_path / "new" / "group.json"
    report.write_json(path, report.as_json("group", report.environment(), {"copy": 10.0}, results))
    row = json.loads(path.read_text())["results"][0]
    assert row["name"] == "scaled fp32 n=100 forward" and row["bars"][0]["met"] is True
    assert [p.name for p in path.parent.iterdir()] == ["group.json"]


def test_a_bar_may_be_a_time():
    result = runner.run(
        registry.Case("group", "scaled", problem, {"n": 100}, torch.float32, "forward"), {}, quick=True
    )
    assert result.bar_met(registry.milliseconds_at_most(1e4)) and not result.bar_met(
        registry.milliseconds_at_most(1e-9)
    )
    assert str(registry.milliseconds_at_most(3)) == "<= 3 ms"


def test_rows_have_names_of_their_own_and_bars_name_their_peers():
    cases = registry.all_cases()
    assert len({(c.group, c.name) for c in cases}) == len(cases)
    assert registry.select("recurrence", pattern="swiglu*forward")
    with pytest.raises(ValueError, match="direction"):
        registry.Case("group", "op", problem, {}, torch.float32, "sideways")


def test_the_arithmetic_peak_is_measured_on_every_instruction_set(isa):
    assert limits.arithmetic_peak(False, 1) > 0
    assert (limits.arithmetic_peak(True, 1) > 0) == (isa == "avx512bf16")


@pytest.mark.parametrize(
    "case",
    [c for c in registry.select("attention") if c.op.split()[0] != "transformers" and c.shape["L"] >= 4096],
    ids=lambda c: c.name,
)
def test_attention_rows_compute_what_they_say(case):
    """The same rows at a length of 32: their reference, sampling, peers and yardsticks fit together."""
    shape = {**case.shape, "L": 32, "H": min(case.shape["H"], 4), "Hkv": 2, "D": 8}
    small = dataclasses.replace(case, shape=shape, options={**case.options, "mask_mod": None})
    result = runner.run(small, {}, quick=True)
    assert result.correct, result.error
    assert {bar.peer for bar in case.bars} - {None} <= set(result.times)


@pytest.mark.parametrize("mask", [None, fa.Mask(causal=True)], ids=repr)
def test_attention_rows_check_gradients(mask):
    shape = {"H": 2, "L": 24, "D": 8}
    options = {"passes": 2.5, "mask": mask and (lambda n: mask), "yardsticks": ("full",)}
    case = registry.Case("a", "a", attention.attention, shape, torch.float32, "backward", options=options)
    result = runner.run(case, {}, quick=True)
    assert result.correct, result.error
    assert "sdpa" in result.ratios and "full" in result.ratios


def test_pairs_of_a_mask_are_counted():
    for mask in (fa.Mask(causal=True), fa.Mask(causal=True, window=(3, None)), fa.Mask(window=(1, 2)),
                 fa.Mask(prefix_lengths=torch.tensor([5]))):  # fmt: skip
        for lq, lk in ((9, 9), (4, 9)):
            q, k = torch.empty(1, 1, lq, 1), torch.empty(1, 1, lk, 1)
            allowed = masks.dense_allowed(lq, lk, q.device, mask.args("attention", q, k))
            assert attention._pairs(mask, lq, lk) == int(allowed.sum())


# --- pages -----------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_the_results_say(tmp_path):
    """`python -m benchmarks readme` writes them."""
    for page in readme.PAGES:
        text = (ROOT / page).read_text()
        assert readme.generated(page, text) == text
    for path in pictures.write(readme.RESULTS, tmp_path):
        assert "<svg" in path.read_text() and "<svg" in (ROOT / "docs" / path.name).read_text()
    for case in (*pictures.SHARES.values(), *pictures.LENGTHS.values()):
        assert case in {known.name for known in registry.all_cases()}
    names = {case.name for case in registry.all_cases()}
    assert not [name for row in readme.ROWS.values() for name in row if name not in names]


def measured(name, ratio, bar, **more):
    timing = {"median": 12.34, "low": 1, "high": 99}
    row = {"name": name, "correct": True, "milliseconds": {"fastattn": timing}, "bars": bar}
    return row | {"ratios": {"sdpa": {"median": ratio}} if ratio else {}} | more


def test_rows_of_the_readme_show_missed_bars_and_what_is_not_there():
    missed = {"bar": ">= 2x sdpa", "value": 1.5, "met": False}
    share = {"of": "fp32 fma", "value": 0.7}
    first, second = measured("a", 1.5, [missed], share=share), measured("b", 12.0, [], share=share)
    assert readme.row("both", [first, second]) == (
        "| both | 12.3 ms | 70% of peak | 1.50x / 12x SDPA | ≥ 2x SDPA: **missed** / – |"
    )
    assert readme.row("one", [None, second]) == "| one | – / 12.3 ms | – / 70% of peak | – / 12x SDPA |  |"
    wrong = {"name": "c", "correct": False, "error": "WRONG"}
    assert readme.row("wrong", [wrong]) == "| wrong |  |  |  |  |"
    held = measured("d", 0.8, [{"bar": "<= 1.7 of sdpa's time", "value": 1.25, "met": True}], gflops=6.1e5)
    assert (
        readme.row("d", [held])
        == "| d | 12.3 ms | 610 TFLOP/s | 1.25 of SDPA's time | ≤ 1.7 of SDPA's time: met |"
    )


def test_the_readme_of_a_checked_gpu(tmp_path):
    environment = {"device": "A GPU", "date": "2026-01-02T03", "commit": "abc", "torch": "2", "python": "3"}
    results = {"attention": "passed", "CUDA C++ sinkhorn": "Traceback\nAssertionError: off"}
    steps = {
        "checks": {"results": results},
        "sanitizer": {"not run": "there is none"},
        "rows": {"results": {"sigmoid": measured("sigmoid", 1.5, []), "late": "not run: out of time"}},
    }
    report.write_json(tmp_path / "gpu" / "check.json", {"environment": environment, "steps": steps})
    rows = [measured("sigmoid", 1.5, [], gflops=5e5)]
    data = {"group": "gpu", "environment": environment, "limits": {}, "results": rows}
    report.write_json(tmp_path / "gpu" / "gpu.json", data)
    said = readme.support(tmp_path)
    assert "A GPU: 1 of 1 checks passed" in said and "A GPU: 0 of 1 checks passed" in said
    assert "checks 1 of 2 passed; sanitizer not run (there is none); rows 1 of 2 passed." in said
    assert "- checks: CUDA C++ sinkhorn: AssertionError: off" in said and "ever run" not in said
    assert "### A GPU" in readme.speed(tmp_path) and "| sigmoid | 12.3 ms | 500 TFLOP/s |" in readme.speed(
        tmp_path
    )


# --- gpu_check ---------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(arguments["--log"], "a", buffering=1) as lines:
    for name in json.loads(arguments["--names"]):
        lines.write(json.dumps({"name": name}) + "\\n")
        if name == "aborts":
            os.abort()
        if name == "hangs":
            time.sleep(60)
        lines.write(json.dumps({"name": name, "result": "passed"}) + "\\n")
"""


def test_gpu_check_goes_on_after_a_check_that_takes_its_process_down(tmp_path):
    command = [sys.executable, "-c", WORKER]
    names = ["one", "aborts", "two", "hangs", "three"]
    deadline = time.monotonic() + 5
    found = gpu_check.resumable(command, "checks", "cpu", names, tmp_path / "log", deadline)
    assert found["one"] == found["two"] == "passed"
    assert "stopped its process" in found["aborts"] and "out of time" in found["hangs"]
    assert found["three"] == "not run: out of time"
    assert [line.split(": ")[1] for line in gpu_check.failures({"checks": {"results": found}})] == ["aborts"]


def test_gpu_check_gives_up_on_a_worker_that_does_nothing(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    found = gpu_check.resumable(command, "checks", "cpu", ["one"], tmp_path / "log", time.monotonic() + 20)
    assert found == {"one": "not run: the process exited with 4"}


def test_gpu_check_needs_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and "nothing was checked or written" in done.stderr


def test_sanitizer_reports_are_read():
    clean = "========= ERROR SUMMARY: 0 errors"
    child = "========= Error: Target application terminated before first instrumented API call"
    assert gpu_check.sanitized([clean, "========= COMPUTE-SANITIZER", child]) == "passed"
    access = "========= Invalid __global__ read of size 4 bytes"
    for found in (f"{access}\n========= ERROR SUMMARY: 1 error", access):
        assert "Invalid __global__ read" in gpu_check.sanitized([clean, found])


def test_a_sanitizer_that_cannot_watch_is_not_run(tmp_path):
    report = tmp_path / "probe"
    refuses = [sys.executable, "-c", f"open({str(report)!r}, 'w').write('Device not supported')", str(report)]
    assert "not supported" in gpu_check.unwatchable(refuses, "cpu")


def test_the_suite_is_run_by_folder(tmp_path, monkeypatch):
    for name, holds in (("good", True), ("bad", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").write_text(f"def test_it():\n    assert {holds}\n")
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    monkeypatch.setattr(gpu_check, "SUITE", ("good", "bad"))
    found = gpu_check.suite(1, time.monotonic() + 600)["results"]
    assert found["tests/good"] == "passed" and "1 failed" in found["tests/bad"]
    assert "out of time" in gpu_check.suite(1, time.monotonic() - 1)["results"]["tests/good"]


def test_the_suites_cpu_tests_see_no_device(tmp_path, monkeypatch):
    for folder, expected in (("interp", "0"), ("plain", "")):
        (tmp_path / folder).mkdir()
        source = (
            f"import os\n\n\ndef test_it():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == {expected!r}\n"
        )
        (tmp_path / folder / "test_it.py").write_text(source)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    monkeypatch.setattr(gpu_check, "SUITE", ("interp", "plain", "needy"))
    monkeypatch.setattr(gpu_check, "NEEDS", {"needy": ("a_package_of_no_one",)})
    found = gpu_check.suite(1, time.monotonic() + 600)
    assert found["results"]["tests/interp"] == found["results"]["tests/plain"] == "passed"
    assert found["results"]["tests/needy"] == "not run: not installed: a_package_of_no_one"
    assert not list(gpu_check.failures({"suite": found}))
