"""Fixtures of the whole suite: repeatable hypothesis runs, NaN-filled outputs, two threads, peak memory."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastattn import testing
from fastattn.runtime import native as _native

sys.path.append(str(Path(__file__).parent))  # tests are no packages

# What a person has tuned on this machine is not what is tested; inherited by the processes that tests start.
_cache = tempfile.TemporaryDirectory(prefix="fastattn-tests-")
os.environ["FASTATTN_CACHE_DIR"] = _cache.name

settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastattn")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """At most two: more than one, so that the split of work is tested, and few enough for a small machine."""
    torch.set_num_threads(2)


@pytest.fixture
def nan_outputs():
    """torch.empty gives NaN inside the test: an output that a kernel leaves unwritten fails it."""
    with testing.nan_filled_outputs():
        yield


@pytest.fixture(params=testing.isas())
def isa(request):
    """Runs the test once for each instruction set this machine has."""
    with _native.use_cpu_isa(request.param):
        yield request.param


# Peak memory, by the kernel's own count, in a process of its own.
_PEAK = """
import json, sys
import torch
import fastattn as fa

torch.set_num_threads(2)


def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

{case}
small, arguments = json.loads(sys.argv[1])
run(*problem(*small))  # libraries loaded, thread buffers made
inputs = problem(*arguments)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS:")
run(*inputs)
print(memory("VmHWM:") - before)
"""


@pytest.fixture(scope="session")
def peak_bytes():
    """peak_bytes(case, small, arguments): the bytes `run(*problem(*arguments))` takes beyond the problem.

    `case` is source that defines both functions; they have run once on `small` before.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resetting the peak needs Linux's /proc")

    def measure(case: str, small: tuple, arguments: tuple) -> int:
        command = [sys.executable, "-c", _PEAK.format(case=case), json.dumps([small, arguments])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return measure
