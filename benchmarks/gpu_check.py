"""python -m benchmarks.gpu_check: hold every GPU kernel to its reference on this device, then time the rows of group gpu.

Steps: `checks` (outputs and gradients in float32, float16 and bfloat16 at the suite's error budgets, repeatability bit by bit,
CUDA graphs, the CUDA C++ kernels that are built), `rows` (the benchmarks), `sanitizer` (compute-sanitizer over the small shapes,
where it is installed) and `suite` (the tests: those of the Triton kernels on the device, then all others). Each runs in
processes of its own under a time limit: what takes one down is noted against the check at hand and the rest goes on.
<out>/<device>/check.json is written after every step, <out>/<device>/gpu.json with the rows; steps that are not run again keep
their results. Exits 1 when a check failed, 2 without a device. `--device cpu` with TRITON_INTERPRET=1 rehearses the checks.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from benchmarks import registry, report, runner
from fastattn.runtime import device as _device

STEPS = ("checks", "rows", "sanitizer", "suite")
SHARES = {
    "checks": 0.35,
    "rows": 0.6,
    "sanitizer": 0.5,
    "suite": 1.0,
}  # of the time that is left when a step begins
COMMAND = (sys.executable, "-m", "benchmarks.gpu_check")
TESTS = Path(__file__).parents[1] / "tests"
SUITE = (
    "interp",
    "compile",
    "ops",
    "nn",
    "models",
    "cuda",
    "native",
    "integrations",
    "autotune",
    "data",
    "cli",
)
NEEDS = {"autotune": ("optuna",)}  # a folder's tests, beside pytest and hypothesis
PASSED = "passed"
NOT_INSTALLED = "not run: not installed: "


# --- the process that does the work ----------------------------------------------------------------------------------


def tasks(step: str, device: str, pattern: str) -> dict[str, Callable[[], object]]:
    if step == "rows":
        cases = registry.select("gpu", pattern=pattern)
        return {case.name: lambda case=case: row_of(case) for case in cases}
    from benchmarks import gpu_checks

    checks = gpu_checks.all_checks(device, small=step == "sanitizer")
    return {name: check for name, check in checks.items() if fnmatch.fnmatch(name, pattern)}


def row_of(case: registry.Case) -> dict:
    result = runner.run(case, {}, quick=True)
    return report.as_json("gpu", {}, {}, [result])["results"][0]


def work(step: str, device: str, names: Sequence[str], log: Path) -> int:
    """Runs the named tasks; each leaves a line in `log` before it starts and one with its result."""
    todo = tasks(step, device, "*")
    assert torch.ones(9, device=device).sum() == 9, "the device does not compute"
    with log.open("a", buffering=1) as lines:
        for name in names:
            lines.write(json.dumps({"name": name}) + "\n")
            started, broken = time.perf_counter(), False
            try:
                result = todo[name]() or PASSED
            except Exception as error:
                result = traceback.format_exc(limit=3)
                # after such an error every call of this process fails
                broken = "CUDA error" in str(error) or "device-side assert" in str(error)
            seconds = round(time.perf_counter() - started, 2)
            lines.write(json.dumps({"name": name, "result": result, "seconds": seconds}) + "\n")
            print(f"{brief(result):>12}  {name}  {seconds:.1f} s", flush=True)
            if broken:
                return 3
    return 0


def brief(result: object) -> str:
    if isinstance(result, dict):
        return "timed" if result.get("correct") else str(result.get("error"))[:100]
    return str(result).strip().splitlines()[-1][:100]


# --- the process that watches it -------------------------------------------------------------------------------------


def finished(log: Path) -> tuple[dict[str, object], str | None]:
    """(results by name, the task that has begun and left none)."""
    results, current = {}, None
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off
            continue
        current = entry["name"]
        if "result" in entry:
            results[current], current = entry["result"], None
    return results, current


def resumable(
    command: Sequence[str], step: str, device: str, names: Sequence[str], log: Path, deadline: float
) -> dict[str, object]:
    """Every name's result. A task that stops its process is noted and the rest goes on in a new one."""
    failures: dict[str, object] = {}
    while True:
        results, _ = finished(log)
        left = [name for name in names if name not in results and name not in failures]
        seconds = deadline - time.monotonic()
        if not left or seconds <= 0:
            return results | failures | dict.fromkeys(left, "not run: out of time")
        arguments = ["--work", step, "--device", device, "--log", str(log), "--names", json.dumps(left)]
        try:
            code = subprocess.run([*command, *arguments], timeout=seconds, check=False).returncode
            why = f"stopped its process, which exited with {code}"
        except subprocess.TimeoutExpired:
            why = "not finished: out of time"
        now, current = finished(log)
        if current is not None:
            failures[current] = why
        elif len(now) == len(results):
            return results | failures | dict.fromkeys(left, f"not run: the process exited with {code}")


def sharded(
    command: Sequence[str], step: str, options, names: Sequence[str], folder: Path, deadline: float
) -> dict[str, object]:
    """`resumable` over several processes at once, in the order of names."""
    workers = options.workers if step == "checks" else 1
    with ThreadPoolExecutor(workers) as pool:
        parts = [names[i::workers] for i in range(workers)]
        running = [
            pool.submit(resumable, command, step, options.device, part, folder / f"{i}.jsonl", deadline)
            for i, part in enumerate(parts)
        ]
        found = {}
        for one in running:
            found |= one.result()
    return {name: found[name] for name in names}


def run_step(step: str, options, deadline: float) -> dict:
    if step == "suite":
        return suite(options.workers, deadline)
    command, environment = list(COMMAND), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if step == "sanitizer":
            tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
            if tool is None:
                return {"not run": "compute-sanitizer is not installed"}
            # an out-of-bounds access shows at the end of an allocation, so each tensor has its own
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            watch = [tool, "--target-processes", "all", "--report-api-errors", "no", "--log-file"]
            if refused := unwatchable([*watch, str(folder / "probe")], options.device):
                return {"not run": f"compute-sanitizer does not work here: {refused}"}
            command = [*watch, str(folder / "%p.txt"), *command]
        names = list(tasks(step, options.device, options.only))
        if not names:
            return {"not run": f"nothing is named {options.only!r}"}
        with mock.patch.dict(os.environ, environment):
            results = sharded(command, step, options, names, folder, deadline)
        if step == "sanitizer":
            results["compute-sanitizer"] = sanitized([p.read_text() for p in sorted(folder.glob("*.txt"))])
        return {"results": results}


def unwatchable(watch: Sequence[str], device: str) -> str:
    """Why compute-sanitizer cannot watch a process that uses the device, or ""."""
    nothing = ("--work", "sanitizer", "--device", device, "--names", "[]", "--log", os.devnull)
    try:
        done = subprocess.run([*watch, *COMMAND, *nothing], capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "its first process did not end within 120 seconds"
    report = Path(watch[-1])
    said = report.read_text() if report.exists() else ""
    if done.returncode == 0 and "not supported" not in said:
        return ""
    return (said or done.stderr or done.stdout or f"it exited with {done.returncode}").strip()[-500:]


def sanitized(reports: Sequence[str]) -> str:
    """What compute-sanitizer says of the processes that it watched."""
    found = []
    for text in reports:
        counted = re.search(r"ERROR SUMMARY: (\d+) error", text)
        # a process that was out of time leaves no summary, one that never used the device says so
        met = re.search(r"========= (Invalid|Misaligned|Out-of-range|Program hit|Fatal)", text)
        if int(counted[1]) if counted else met:
            found.append(text[:3000])
    return "\n".join(found) or PASSED


def suite(workers: int, deadline: float) -> dict:
    """The test suite by folder: the Triton kernels' on the device, which the other tests, of the CPU, do not see."""

    def missing(*names: str) -> str:
        return ", ".join(name for name in names if importlib.util.find_spec(name) is None)

    if lacking := missing("pytest", "hypothesis"):
        return {"not run": f"not installed: {lacking}"}
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(workers), "--dist", "worksteal"]
    results: dict[str, object] = {}
    for folder in SUITE:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            results[f"tests/{folder}"] = "not run: out of time"
            continue
        if lacking := missing(*NEEDS.get(folder, ())):
            results[f"tests/{folder}"] = NOT_INSTALLED + lacking
            continue
        started = time.monotonic()
        hidden = {} if folder == "interp" else {"CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                [*pytest, folder], cwd=TESTS, env=os.environ | hidden, timeout=seconds, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            results[f"tests/{folder}"] = (
                PASSED if done.returncode == 0 else (done.stdout + done.stderr)[-6000:]
            )
        except subprocess.TimeoutExpired:
            results[f"tests/{folder}"] = "not finished: out of time"
        print(f"{brief(results[f'tests/{folder}']):>12}  tests/{folder}  {time.monotonic() - started:.1f} s", flush=True)  # fmt: skip
    return {"results": results}


def failures(steps: dict) -> Iterator[str]:
    for step, record in steps.items():
        for name, result in record.get("results", {}).items():
            if isinstance(result, dict):
                wrong = not result.get("correct") and not str(result.get("error")).startswith("not run")
            else:
                absent = "out of time" in result or result.startswith(NOT_INSTALLED)
                wrong = result != PASSED and not absent
            if wrong:
                yield f"{step}: {name}: {brief(result)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--steps", default=",".join(STEPS), help="which of them, by comma; the others' results are kept"
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="checks and rows whose name matches")
    parser.add_argument(
        "--budget", type=float, default=480.0, metavar="SECONDS", help="for all steps together"
    )
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--commit", default="", help="of what is checked, where this is a copy without git")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--work", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--names", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print(
            "gpu_check: torch finds no CUDA or ROCm device here; nothing was checked or written",
            file=sys.stderr,
        )
        return 2
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1")
    if options.work:
        return work(options.work, options.device, options.names, options.log)
    wanted = options.steps.split(",")
    if not set(wanted) <= set(STEPS):
        parser.error(f"--steps must be of {', '.join(STEPS)}, given {options.steps}")

    target = _device.target(options.device)
    path = options.out / target.slug / "check.json"
    steps = {}
    if path.exists():
        steps = json.loads(path.read_text()).get("steps", {})
    environment = report.environment(options.device)
    environment["commit"] = options.commit or environment["commit"]
    end = time.monotonic() + options.budget
    for step in wanted:
        started = time.monotonic()
        print(f"== {step}", flush=True)
        share = SHARES[step] if step != wanted[-1] else 1.0
        try:
            steps[step] = run_step(step, options, started + (end - started) * share)
        except Exception:
            steps[step] = {"not run": traceback.format_exc(limit=3)}
        steps[step]["seconds"] = round(time.monotonic() - started, 1)
        if "not run" in steps[step]:
            print(f"not run: {brief(steps[step]['not run'])}")
        report.write_json(path, {"environment": environment, "steps": steps})
    rows = [row for row in steps.get("rows", {}).get("results", {}).values() if isinstance(row, dict)]
    if "rows" in wanted and rows:
        kept, when = path.with_name("gpu.json"), report.when(environment)
        data = {"group": "gpu", "environment": environment, "limits": {}}
        data["results"] = [row | {"measured": when} for row in rows]
        report.write_json(kept, report.joined(kept, data))
    failed = list(failures({step: steps[step] for step in wanted}))
    late = sum("out of time" in str(r) for step in wanted for r in steps[step].get("results", {}).values())
    print("\n".join([f"wrote {path}", *failed, f"{len(failed)} failed, {late} out of time"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
