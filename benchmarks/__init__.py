"""Benchmarks: `python -m benchmarks <group>`. Rows live in cases/, see registry.py for how to add one."""

import sys
from pathlib import Path

# `python -m` puts the repository first on the path, where fastattn is source without its compiled module: what is
# measured is the installed package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parents[1]]
