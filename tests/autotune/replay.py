"""A recorded sweep played back: the search runs as it does on a device, and nothing is timed."""

import itertools
import json
from pathlib import Path

from fastattn.autotune.space import Space
from fastattn.autotune.study import Outcome

from fastattn.runtime import tuning as _config


class Sweep:
    """times: {point: microseconds, or the reason it failed}; points not in it are infeasible."""

    def __init__(self, parameters, default, times):
        self.times = times

        def feasible(values, key, target):
            return None if tuple(values.values()) in times else "not recorded"

        self.declaration = _config.Declaration(
            "replayed",
            "cpu",
            {name: _config.Parameter(default[name], tuple(values)) for name, values in parameters.items()},
            (),
            (),
            feasible,
        )
        self.space = Space(self.declaration, [{}], None)
        self.fastest = min(time for time in times.values() if not isinstance(time, str))
        self.calls = []

    def trial(self, config, hopeless):
        point = self.space.point(config)
        self.calls.append(point)
        time = self.times[point]
        if isinstance(time, str):
            return Outcome(None, time)
        return Outcome(time / self.times[self.space.default], seconds=time * 1e-6)

    def race(self, configs, rounds, seconds):
        return [[[self.times[self.space.point(config)] * 1e-6] * rounds] for config in configs]

    def agree(self, config):
        pass


def recorded():
    """Every point of a real kernel, measured once (sweep.json says where)."""
    found = json.loads((Path(__file__).parent / "sweep.json").read_text())
    return Sweep(found["parameters"], found["default"], {tuple(row[:-1]): row[-1] for row in found["points"]})


def modelled():
    """A sweep made by a formula: a ridge between two tile sizes, a variant that only pays for large tiles."""
    import math

    parameters = {
        "rows": [8, 16, 24, 32, 48, 64, 96, 128],
        "columns": [32, 64, 128, 256, 512],
        "pack": ["none", "keys", "both"],
        "grain": [1, 2, 4, 8],
    }
    times = {}
    for rows, columns, pack, grain in itertools.product(*parameters.values()):
        if rows * columns > 32768:
            continue
        area = math.log2(rows * columns / 12288)
        aspect = math.log2(columns / rows) - 1.4
        time = 100 * (1 + 0.06 * area**2 + 0.04 * aspect**2)
        time *= {"none": 1.25, "keys": 1.08, "both": 1.0 if rows >= 32 else 1.3}[pack]
        time *= 1 + 0.03 * abs(math.log2(grain) - 1)
        times[rows, columns, pack, grain] = "wrong" if rows == 24 and pack == "both" else time
    return Sweep(parameters, {"rows": 16, "columns": 64, "pack": "none", "grain": 1}, times)
