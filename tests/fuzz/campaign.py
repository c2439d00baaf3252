"""Random calls of fastattn's ops, each checked in float64: `python fuzz/campaign.py attention --cases 1000 --seed 0`.

A case is drawn from a seed of its own, so that every one can be repeated. One that fails is printed as a test ready to paste.
"""

from __future__ import annotations

import argparse
import importlib
import pprint
import random
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = tuple(
    sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith(("_", "test_", "campaign")))
)


def load(family: str):
    """The module of a family: draw(rng) -> case, check(case)."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return importlib.import_module(family)


def run(
    family: str, cases: int, seed: int = 0, seconds: float = float("inf"), most: int = 10
) -> tuple[int, list[str]]:
    """(cases run, failures as text); stops after `seconds` or `most` failures."""
    module, failures, started, count = load(family), [], time.monotonic(), 0
    while count < cases and time.monotonic() - started < seconds and len(failures) < most:
        number = seed * 1_000_000 + count
        case = module.draw(random.Random(number))
        try:
            module.check(case)
        except Exception as error:
            failures.append(as_test(family, number, case, error))
        count += 1
    return count, failures


def as_test(family: str, number: int, case: dict, error: Exception) -> str:
    """A failing case as the source of a test."""
    what = "".join(traceback.format_exception_only(error)).strip()
    body = pprint.pformat(case, width=100, sort_dicts=False)
    lines = "\n".join("    # " + line for line in what.splitlines())
    return f"def test_{family}_case_{number}():\n{lines}\n    {family}.check(\n{_indent(body)}\n    )\n"


def _indent(text: str) -> str:
    return "\n".join("        " + line for line in text.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "families",
        nargs="*",
        default=FAMILIES,
        metavar="FAMILY",
        help=f"of {', '.join(FAMILIES)}; default all",
    )
    parser.add_argument("--cases", type=int, default=1000, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each family at most")
    options = parser.parse_args()
    unknown = [f for f in options.families if f not in FAMILIES]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    failed = 0
    for family in options.families:
        started = time.monotonic()
        count, failures = run(family, options.cases, options.seed, options.seconds)
        print(
            f"{family}: {count} cases in {time.monotonic() - started:.0f} s, {len(failures)} failed",
            flush=True,
        )
        for failure in failures:
            print("\n" + failure, flush=True)
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
