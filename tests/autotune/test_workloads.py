"""Every op's workload makes the call that looks its declaration up, and its default passes the tuner's check."""

import pytest
import torch
from fastattn.autotune import measure, space

from fastattn.runtime import device as _device
from fastattn.runtime import tuning as _config

PLANTED = ("planted", "trapped")  # the other tests' own
DECLARED = {key: one for key, one in _config.tunings().items() if key[0] not in PLANTED}
WORKLOADS = space.load_workloads(space.workload_modules())
CPU = sorted(name for name, (_, workload) in WORKLOADS.items() if "cpu" in workload.devices)


def test_all_cpu_kernels_have_a_workload():
    assert {f"{op}.{backend}" for op, backend in DECLARED if backend == "cpu"} <= set(CPU)
    assert {tuple(name.split(".")) for name in WORKLOADS} <= set(DECLARED)


def test_examples_are_workloads_of_an_op_that_has_no_others():
    from fastattn.ops.gated import examples

    found = {workload.name: workload for workload in space.of_examples(examples)}
    assert {name for name in found if name.endswith(".cpu")} == {
        "gated_attention.cpu",
        "gated_attention_backward.cpu",
    }
    for workload in (found["gated_attention.cpu"], found["gated_attention_backward.cpu"]):
        (shape,) = workload.shapes("quick", _device.target("cpu"))
        case = measure.Case(workload, workload.check_shape(shape), torch.device("cpu"), 0)
        with _config.watch() as seen:
            results = case.run()
        assert (workload.op, "cpu") in {(look.op, look.backend) for look in seen}
        case.check(results)


@pytest.mark.parametrize("name", CPU)
def test_default_is_right_and_looked_up(name, monkeypatch):
    workload = WORKLOADS[name][1]
    declaration = DECLARED[workload.op, workload.backend]
    shape = workload.check_shape(workload.shapes("full", _device.target("cpu"))[0])
    case = measure.Case(workload, shape, torch.device("cpu"), 0)
    with _config.watch() as seen:
        case.run()
    looks = [look for look in seen if (look.op, look.backend) == (workload.op, workload.backend)]
    assert looks
    key = {**looks[0].structural, **looks[0].sizes}
    points = space.Space(declaration, [key], _device.target("cpu"))
    assert points.default in points and len(points) > 1
    monkeypatch.setattr(measure, "CPU_FLUSH", 4096)
    bench = measure.Bench(workload, [shape], "cpu", 0, points.config(points.default))
    for point in (points.default, points.points[0], points.points[-1]):
        bench.check(points.config(point))
        bench.agree(points.config(point))


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_shapes_are_plain(effort):
    for name, (_, workload) in WORKLOADS.items():
        for shape in workload.shapes(effort, _device.target("cpu")):
            assert all(type(value) in (int, float, str, bool) for value in shape.values()), name
            assert workload.check_shape(shape).keys() == shape.keys(), name
