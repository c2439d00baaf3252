"""Timing a table's entries against the default again, apart from the run that made them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastattn.autotune import space
from fastattn.autotune.measure import Comparison, compare
from fastattn.autotune.table import every_entry, refusal
from fastattn.autotune.tuner import OPEN_LIMIT
from fastattn.autotune.worker import Failure, Unavailable, Worker

from fastattn.runtime import device as _device
from fastattn.runtime import tuning

SECONDS = 60.0  # for one entry at most


def remeasure(
    tables: Sequence[tuple[str, dict]],
    target: _device.Target,
    device: str,
    rounds: int,
    *,
    modules: Sequence[str] | None = None,
    threads: int | None = None,
) -> Iterator[tuple[str, str, Comparison | None, str]]:
    """(op.backend, key and sizes, comparison, or why there is none) of each entry that has its shapes."""
    workloads = space.load_workloads(space.workload_modules() if modules is None else modules)
    with Worker(device, threads=threads) as worker:
        for _, table in tables:
            for op, backend, entry in every_entry(table):
                name = f"{op}.{backend}"
                if name not in workloads or refusal(op, backend, entry, target) is not None:
                    continue
                key, shapes = {**entry["key"], **entry["sizes"]}, entry.get("shapes")
                label = " ".join(f"{field}={value}" for field, value in key.items())
                if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
                    yield name, label, None, "does not say what it was measured on"
                    continue
                default = tuning.declared()[op, backend].defaults(key, target)
                if entry["config"] == default:
                    yield name, label, None, "is the default"
                    continue
                request = {"module": workloads[name][0], "name": name, "shapes": shapes, "seed": 1}
                try:
                    worker.open({"do": "open", "default": default, **request}, OPEN_LIMIT)
                    race = {"configs": [default, entry["config"]], "rounds": rounds, "seconds": SECONDS}
                    times = worker.ask({"do": "race", **race}, 2 * SECONDS)
                except (Failure, Unavailable) as failure:
                    yield name, label, None, str(failure)
                    continue
                yield name, label, compare(times[1], times[0]), ""
