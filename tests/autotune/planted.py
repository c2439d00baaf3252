"""A synthetic op, a workload to tune it by, candidates planted to go wrong, and entries of tables for it.

Both ops add 1 to a matrix, and what they take by the tuner's clock depends on their configuration alone: the
clock is this module's, and moves when they run. The traps of `trapped.cpu` do what their names say.
"""

import os
import sys
import time

import torch
from fastattn.autotune import measure
from fastattn.autotune.space import Workload

from fastattn.runtime import tuning as _config

STRUCTURAL = {"dtype": "float32", "head_dim": 64}


def feasible(values, key, target):
    if values["tile"] * key["head_dim"] > 4096 and values["variant"] == "wide":
        return "tile does not fit"
    return None


def declare():
    return _config.declare(
        "planted",
        "cpu",
        parameters={
            "tile": _config.Parameter(32, (16, 32, 64, 128)),
            "variant": _config.Parameter("plain", ("plain", "wide")),
        },
        structural=("dtype", "head_dim"),
        sizes=("length",),
        feasible=feasible,
    )


def entry(length=512, tile=64, variant="plain", **structural):
    return {
        "key": STRUCTURAL | structural,
        "sizes": {"length": length},
        "config": {"tile": tile, "variant": variant},
    }


def table(target, *entries):
    return {
        "schema": 1,
        "device": target.describe(),
        "ops": {"planted": {"cpu": {"entries": list(entries)}}},
    }


def look_up(length=512, **structural):
    return _config.lookup(
        "planted", "cpu", structural=STRUCTURAL | structural, sizes={"length": length}, device="cpu"
    )


TRAPS = ("crash", "hang", "wrong", "raise", "full", "unwritten")
COST = {16: 3e-3, 32: 2e-3, 64: 1e-3, 128: 1.5e-3}  # seconds by tile; "wide" takes a quarter off
_now = 0.0


def use_own_clock():
    measure.clock = lambda: _now
    measure.CPU_FLUSH = 4096


def _take(seconds):
    global _now
    _now += seconds


def declare_trapped():
    return _config.declare(
        "trapped",
        "cpu",
        parameters={
            "tile": _config.Parameter(32, (32, 64)),
            "trap": _config.Parameter("none", ("none", *TRAPS)),
        },
        structural=("dtype", "head_dim"),
        sizes=("length",),
        feasible=lambda values, key, target: (
            "one of each trap is enough" if values["tile"] == 64 and values["trap"] != "none" else None
        ),
    )


def _inputs(shape, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape["length"], shape["head_dim"], generator=generator).to(device),)


def _values(op, x):
    return _config.lookup(
        op,
        "cpu",
        structural={"dtype": str(x.dtype).removeprefix("torch."), "head_dim": x.shape[1]},
        sizes={"length": x.shape[0]},
        device=x.device,
    ).values


def _call(shape, x):
    values = _values("planted", x)
    _take(COST[values["tile"]] * (0.75 if values["variant"] == "wide" else 1.0))
    return x + 1.0


def _trapped_call(shape, x):
    values = _values("trapped", x)
    trap = values["trap"]
    if trap == "crash":
        os.abort()
    if trap == "hang":
        time.sleep(1000)
    if trap == "raise":
        raise RuntimeError("planted")
    if trap == "full":
        raise MemoryError("planted")
    if trap == "unwritten":
        return torch.empty_like(x)
    if trap == "wrong":
        return x + 1.001
    _take(COST[values["tile"]])
    return x + 1.0


def _reference(shape, x):
    return x + 1.0


def _shapes(effort, target):
    lengths = (500, 512) if effort == "quick" else (500, 512, 4096)
    return [{"length": length, "head_dim": 32} for length in lengths]


WORKLOADS = (
    Workload("planted", "cpu", shapes=_shapes, inputs=_inputs, call=_call, reference=_reference),
    Workload("trapped", "cpu", shapes=_shapes, inputs=_inputs, call=_trapped_call, reference=_reference),
)


declare()
declare_trapped()
if sys.argv[0].endswith("worker.py"):
    use_own_clock()
