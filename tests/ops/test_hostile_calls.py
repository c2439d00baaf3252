"""torch.ops.fastattn's ops, as compiled graphs and exported programs call them: a hostile call gives a clear error or an
ordinary result, whatever a public function would have refused before."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("hostile.py")


def _run(seed: int, first: int, last: int) -> tuple[list[str], int]:
    """(the program's lines, its exit status)."""
    command = [sys.executable, str(PROGRAM), str(seed), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() or [done.stderr], done.returncode


def _complaints(seed: int, first: int, last: int) -> list[str]:
    """What is wrong with calls first .. last; a call that ends its process is one, and the next ones go on."""
    found: list[str] = []
    while first < last and len(found) < 20:
        lines, status = _run(seed, first, last)
        for before, line in zip([""] + lines, lines, strict=False):
            if line.startswith("wrong "):
                found.append(f"{before}\n    {line.removeprefix('wrong ')}")
        if lines[-1] == "done":
            break
        found.append(f"{lines[-1]}\n    ended the process with status {status}")
        number = lines[-1].split(" ", 1)[0]
        if not number.isdecimal():
            break
        first = int(number) + 1
    return found


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_hostile_call_is_refused_or_served(seed):
    complaints = _complaints(seed, 0, 3000 if seed == 1 else 30000)
    assert not complaints, "\n".join(complaints)
