"""Benchmarks: `python -m benchmarks <group>`. Rows live in cases/, see registry.py for how to add one."""
