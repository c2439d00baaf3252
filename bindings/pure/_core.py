"""Stands in for the compiled module in the wheel for any platform: its facts, from `_core.json`, and no kernels."""

import json
from pathlib import Path
from types import SimpleNamespace

_FACTS = json.loads(Path(__file__).with_suffix(".json").read_text())

limits = SimpleNamespace(**_FACTS["limits"])
fields = _FACTS["fields"]
score_ops = tuple(_FACTS["score_ops"])


def cpu_isas() -> tuple[str, ...]:
    return ()


def cpu_isa() -> str:
    return "none"


def select_cpu_isa(name: str) -> bool:
    return False


def set_dtypes(codes: dict) -> None:
    pass


def run(kernel: str, /, **values: object) -> None:
    raise NotImplementedError(f"fastattn: this installation has no compiled kernels, so no {kernel}")
