"""Peak memory of an op, measured by the kernel's own count in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
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
        command = [sys.executable, "-c", _SCRIPT.format(case=case), json.dumps([small, arguments])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return measure
