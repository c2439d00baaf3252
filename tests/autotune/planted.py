"""A synthetic op: what it declares, and entries of tables for it."""

from fastattn import _config

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
