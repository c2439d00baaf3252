"""How many of torch's own samples (the OpInfo tables of the installed torch) are served and right. Any change is a change here."""

import json
import subprocess
import sys
from pathlib import Path

SERVED = {
    "linear_cross_entropy": 119,
    "linear_cross_entropy chunked": 133,
    "linear_cross_entropy chunked_none": 77,
    "cross_entropy": 21,
    "rms_norm": 5,
    "scaled_dot_product_attention": 25,
}
REFUSED = {"rms_norm": {"refused: fastattn.rms_norm: eps must be zero or more, given -0.5": 1}}


def test_samples_are_served_and_right():
    program = Path(__file__).with_name("opinfo.py")
    done = subprocess.run([sys.executable, "-P", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {name: {"served": count} | REFUSED.get(name, {}) for name, count in SERVED.items()}
    assert json.loads(done.stdout) == expected
