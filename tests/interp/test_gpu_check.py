"""What runs on a GPU alone, rehearsed: the tests' way to the device, gpu_check's steps on a pretended one."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pretend_cuda
import pytest
import torch
from on_device import moved, triton_on

import fastattn as fa
from fastattn import testing

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is not installed

from benchmarks import gpu_check, gpu_checks, registry

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a device is there: the interpreter's stand-in is not"
)


def test_tensors_keep_their_layout_on_the_way():
    x = testing.random_tensor(2, 3, 5, layout="odd")
    there = moved([x, 3, None], "cpu")[0]
    assert there.stride() == x.stride() and torch.equal(there, x) and there.data_ptr() != x.data_ptr()
    assert there.untyped_storage().nbytes() == x.untyped_storage().nbytes()
    negated = torch.randn(4, 1, dtype=torch.complex64).conj().imag
    assert moved(negated, "cpu").is_neg() and torch.equal(moved(negated, "cpu"), negated)


def test_the_suite_goes_by_way_of_the_device(nan_outputs):
    inputs = testing.attention_inputs(1, 2, 1, 9, 9, 16, layout="odd")
    with triton_on("cpu"):
        testing.check_op(
            lambda *a: fa.attention(*a, backend="triton"),
            lambda *a: fa.attention(*a, backend="reference"),
            inputs,
            terms=9,
        )
        assert fa.explain("attention", *inputs).backend == "cpu"
        with fa.set_backend("triton"):
            assert fa.explain("attention", *inputs).backend == "triton"
            q, k, v = (testing.random_tensor(1, 2, 1, 8, seed=i) for i in range(3))
            places = torch.tensor([[2]])
            keys, values = torch.zeros(2, 1, 2, 4, 8)
            fa.ops.rowwise.rotary_append(q, k, v, places, places, keys, values)
    assert torch.equal(values[:, :, 2], v[:, :, 0]) and not values[:, :, 3].any()


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """Runs gpu_check on the pretended device, its processes in this one; returns the files that it wrote."""
    rows = [c for c in registry.all_cases() if c.group == "gpu"]
    small = [dataclasses.replace(case, shape=pretend_cuda.small_rows(case.shape)) for case in rows]
    monkeypatch.setattr(registry, "all_cases", lambda: list({case.name: case for case in small}.values()))
    twice = functools.partial(gpu_checks.assert_repeats, times=1)
    monkeypatch.setattr(gpu_checks, "assert_repeats", lambda fn, inputs, times=1: twice(fn, inputs))

    def process(command, **options):
        work = command.index("--work")
        values = dict(zip(command[work::2], command[work + 1 :: 2], strict=True))
        if "--log-file" in command:
            report = Path(command[command.index("--log-file") + 1].replace("%p", "1"))
            report.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
        names = json.loads(values["--names"])
        with pretend_cuda.installed():  # a mode of a thread's own
            code = gpu_check.work(values["--work"], values["--device"], names, Path(values["--log"]))
        return SimpleNamespace(returncode=code, stdout="", stderr="")

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=process))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda tool, **_: tool)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--workers", "1", "--out", str(tmp_path), *flags])
        with pretend_cuda.installed():
            code = gpu_check.main()
        (folder,) = tmp_path.iterdir()
        return code, {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}

    return run


@pytest.mark.parametrize("only", ("s[aw][mi]*", pytest.param("*", marks=pytest.mark.slow)))
def test_every_step_of_gpu_check(rehearsed, only):
    code, found = rehearsed("--steps", "rows", "--only", "rotary*", "--commit", "abc", "--budget", "1000")
    (row,) = found["gpu"]["results"]
    assert code == 0 and row["correct"] and row["measured"]["commit"] == "abc"
    assert found["gpu"]["environment"]["device"] == "Pretended GPU"
    flags = ("--steps", "checks,rows,sanitizer", "--only", only, "--budget", "3000")
    code, found = rehearsed(*flags)
    steps = found["check"]["steps"]
    assert code == 0 and set(steps) == {"checks", "rows", "sanitizer"}
    assert steps["sanitizer"]["results"]["compute-sanitizer"] == "passed"
