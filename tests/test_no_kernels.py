"""The package of the wheel for any platform, without compiled kernels: every op is served, by plain torch, and the commands say so."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn as fa

MAKER = Path(__file__).parents[1] / "bindings" / "pure_wheel.py"

EVERY_EXAMPLE = """
import torch, fastattn as fa
from fastattn.runtime.examples import examples
assert fa.cpu_isas() == ()
NO_KERNELS = "this installation has no compiled kernels", "rotary_append has no cpu backend", "merge has no cpu backend"
for name, example in examples(torch.float32, "cpu").items():
    assert example.refusal("cpu") in NO_KERNELS, (name, example.refusal("cpu"))
    example.function(**example.arguments)
    print(name)
q = torch.randn(1, 2, 8, 16, requires_grad=True)
fa.attention(q, q, q, mask=fa.Mask(causal=True)).sum().backward()
assert q.grad.isfinite().all()
try:
    fa.attention(q, q, q, backend="cpu")
except NotImplementedError as error:
    assert "no compiled kernels" in str(error), error
else:
    raise AssertionError("backend='cpu' was served")
assert fa.explain(fa.attention, q, q, q).backend == "reference"
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("pure_wheel", MAKER)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    root = tmp_path_factory.mktemp("pure")
    shutil.copytree(
        Path(fa.__file__).parent, root / "fastattn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    maker.without_kernels(root / "fastattn")
    return root


def run(package, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "100"}
    environment.pop("FASTATTN_CPU_ISA", None)
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_plain_torch_serves_every_op(package):
    done = run(package, "-c", EVERY_EXAMPLE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 25


def test_doctor_and_tune_say_that_there_are_no_kernels(package):
    facts = json.loads(run(package, "-m", "fastattn.cli", "doctor", "--json").stdout)
    assert facts["environment"]["instruction set"].startswith("no compiled kernels")
    assert facts["why_not_fast"][0].startswith("no compiled kernels")
    assert facts["devices"]["cpu"]["ops"]["attention"]["gradients"] == "reference"
    tune = run(package, "-m", "fastattn.cli", "tune")
    assert tune.returncode == 2 and "no compiled kernels to tune" in tune.stderr
