"""The verdicts of families.json for the model types that are judged fastest. All of them: python -P tests/judges/families.py."""

import json
import subprocess
import sys
from pathlib import Path

import transformers

FROZEN = json.loads(Path(__file__).with_name("families.json").read_text())
COUNT = 60


def quick():
    """The types that were judged fastest, in the order of their names."""
    judged = [t for t, (verdict, *_) in FROZEN["verdicts"].items() if not verdict.startswith("not ")]
    return sorted(sorted(judged, key=lambda t: (FROZEN["seconds"][t], t))[:COUNT])


def test_no_verdict_of_all_types_is_a_crash_and_few_are_wrong():
    words = {t: [v.split(":")[0] for v in verdicts] for t, verdicts in FROZEN["verdicts"].items()}
    assert not [t for t, found in words.items() if "crashed" in found]
    assert sorted(t for t, found in words.items() if "wrong" in found) == KNOWN


# Why: docs/guide.md, "transformers"
KNOWN = ["recurrent_gemma"]


def test_the_fastest_types_have_their_verdicts():
    types = quick()
    assert len(types) == COUNT
    program = Path(__file__).with_name("families.py")
    command = [sys.executable, "-P", str(program), *types]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == COUNT, done.stderr[-3000:]
    if transformers.__version__ == FROZEN["transformers"]:
        assert done.returncode == 0, "\n".join(line for line in lines if "CHANGED" in line)
    else:  # other classes, other counts: what was equal is not wrong
        worse = [line for line in lines if " wrong: " in line or "crashed: " in line]
        assert not worse or all(line.split(":")[0] in KNOWN for line in worse), "\n".join(worse)
