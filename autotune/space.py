"""What is tuned: the call an op is timed by, and the points its parameters may take.

An op joins the tuner by declaring what it can be tuned by (`ops/<op>/tuning.py`). Its examples are what it is timed by, at their
large sizes, or `ops/<op>/workload.py` says more: a module with `WORKLOADS`, a tuple of Workload. Which keys a call looks its
configuration up by is not repeated there: the tuner runs the call and watches.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastattn.runtime import tuning
from fastattn.runtime.device import Target
from fastattn.runtime.hints import did_you_mean
from fastattn.runtime.tuning import Declaration, Value

if TYPE_CHECKING:
    import torch

    from fastattn.runtime.examples import Example

MAX_PRODUCT = 1 << 20  # a space larger than this is a mistake in its declaration

Shape = Mapping[str, Any]  # what a workload makes inputs from: strings, numbers and bools, nothing else
Config = dict[str, Value]
DTYPES = ("float32", "bfloat16", "float16")  # of the calls that are tuned


@dataclass(frozen=True)
class Workload:
    """One call of one backend that exercises the parameters declared as (op, backend).

    shapes(effort, target) gives the calls worth tuning for, "quick" the few that matter most, "full" more.
    inputs(shape, device, seed) makes a call's arguments; tensors that require gradients are differentiated
    unless `timed` is "forward". call(shape, *inputs) runs the backend, reference(shape, *inputs) is the same in
    plain torch for any float dtype. `timed` says what is measured and compared: the call ("forward"), the
    computation of its gradients ("backward"), or "both" in one, for ops that find gradients while they are at it.
    terms(shape) is the length of the longest sum behind one output element: it scales the error budget.
    worth: ops of more worth are tuned first, those that a model spends most of its time in.
    check_shape(shape) is a smaller call with the same key, for references that cost far more than the kernel;
    a finalist is still compared with the default's result at the full shape.
    """

    op: str
    backend: str
    shapes: Callable[[str, Target], Sequence[Shape]]
    inputs: Callable[..., tuple]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    timed: str = "forward"
    terms: Callable[[Shape], int] = field(default=lambda shape: 1)
    devices: tuple[str, ...] = ("cpu",)  # torch device types
    worth: int = 0
    check_shape: Callable[[Shape], Shape] = field(default=lambda shape: shape)

    @property
    def name(self) -> str:
        return f"{self.op}.{self.backend}"


def workload_modules() -> list[str]:
    """The modules of installed ops that describe workloads: `workload.py`, or where an op has none, its examples."""
    from fastattn.runtime import examples

    names = []
    for module in examples.modules():
        folder = module.__name__.removesuffix(".examples")
        own, tuned = (importlib.util.find_spec(f"{folder}.{name}") for name in ("workload", "tuning"))
        if own or tuned:
            names.append(f"{folder}.workload" if own else module.__name__)
    return names


def load_workloads(modules: Sequence[str]) -> dict[str, tuple[str, Workload]]:
    """{"op.backend": (module, workload)} of these modules, their declarations made."""
    tuning.tunings()
    found = {}
    for name in modules:
        module = importlib.import_module(name)
        for workload in module.WORKLOADS if hasattr(module, "WORKLOADS") else of_examples(module):
            found[workload.name] = (name, workload)
    return found


def of_examples(module: ModuleType) -> Iterator[Workload]:
    """A workload for each declaration that is named as an example of this module, or as one's backward."""
    from fastattn.runtime.examples import Make

    typical = module.examples(Make())
    for op, backend in tuning.declared():
        name = op.removesuffix("_backward")
        if name in typical:
            yield _of_example(module, name, typical[name], op, backend)


def _of_example(module: ModuleType, name: str, example: Example, op: str, backend: str) -> Workload:
    import torch

    from fastattn.runtime.examples import Make

    def made(shape: Shape, device: Any, seed: int = 1) -> dict[str, torch.Tensor]:
        make = Make(getattr(torch, shape["dtype"]), str(device), large=shape["large"], seed=seed + 1)
        return module.examples(make)[name].tensors

    def inputs(shape: Shape, device: Any, seed: int) -> tuple:
        tensors = made(shape, device, seed).values()
        return tuple(t.requires_grad_(example.gradients and t.is_floating_point()) for t in tensors)

    def call(backend: str) -> Callable[..., Any]:
        def run(shape: Shape, *tensors):
            given = dict(zip(example.tensors, tensors, strict=True))
            return example.function(**given, **example.options, backend=backend)

        return run

    alone = (
        "both" if example.gradients and (f"{op}_backward", backend) not in tuning.declared() else "forward"
    )
    kinds = {"quick": ("bfloat16",), "full": ("bfloat16", "float16", "float32")}
    return Workload(
        op,
        backend,
        shapes=lambda effort, target: [{"dtype": kind, "large": True} for kind in kinds[effort]],
        inputs=inputs,
        call=call(backend),
        reference=call("reference"),
        timed=alone if op == name else "backward",
        terms=lambda shape: max(t.numel() for t in made(shape, "meta").values()),
        devices=("cpu" if backend == "cpu" else "cuda",),
        check_shape=lambda shape: {**shape, "large": False},
    )


def with_fields(workload: Workload, given: Mapping[str, Any], target: Target, command: str = "tune") -> Shape:
    """The workload's first shape with the given fields in place of its own; key heads are as many as heads where only those are
    given. ValueError for a field that it has not, or a value of another kind."""
    shapes = list(workload.shapes("quick", target)) or list(workload.shapes("full", target))
    first = dict(shapes[0])
    for name, value in given.items():
        if name not in first:
            mean = did_you_mean(name, first)
            raise ValueError(
                f"{command}: {workload.name} has no field {name!r}; it has {', '.join(first)}{mean}"
            )
        check_field(name, value, first[name], command)
    same = {"kv_heads": given["heads"]} if "heads" in given and "kv_heads" in first else {}
    return {**first, **same, **given}


def lacks(workload: Workload, given: Sequence[Mapping[str, Any]], target: Target) -> str:
    """The first given field that the workload's shapes do not have, or ""."""
    shapes = list(workload.shapes("quick", target)) or list(workload.shapes("full", target))
    return next((name for fields in given for name in fields if name not in shapes[0]), "")


def check_field(name: str, value: Any, usual: Any, command: str = "tune") -> None:
    """ValueError unless a field's value is of the kind that it usually has."""
    if isinstance(usual, bool):
        wanted, good = "true or false", isinstance(value, bool)
    elif isinstance(usual, int):
        wanted, good = "a whole number from 1 on", type(value) is int and value >= 1
    elif name == "dtype":
        wanted, good = ", ".join(DTYPES), value in DTYPES
    else:
        wanted, good = f"a name such as {usual}", isinstance(value, str)
    if not good:
        mean = did_you_mean(str(value), DTYPES) if name == "dtype" else ""
        raise ValueError(f"{command}: {name} is {value!r}, expected {wanted}{mean}")


@dataclass(frozen=True)
class Bucket:
    """One entry of a table: a structural key, its sizes rounded in log2, and the shapes it is tuned on."""

    op: str
    backend: str
    structural: Mapping[str, Any]
    sizes: Mapping[str, int]
    shapes: tuple[Shape, ...]
    keys: tuple[Mapping[str, Any], ...]  # structural and exact sizes of each shape

    @property
    def name(self) -> str:
        return f"{self.op}.{self.backend}"

    def label(self) -> str:
        return label(self.structural, self.sizes)

    def study_name(self, target: Target) -> str:
        fields = json.dumps({**self.structural, **self.sizes}, sort_keys=True)
        return f"{self.name} {fields} on {target.kind} {target.slug}"


def label(structural: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """A key for people: names of variants speak for themselves."""
    fields = (*structural.items(), *sizes.items())
    return " ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in fields)


def round_size(size: int) -> int:
    """The nearest power of two in log2."""
    return 1 << round(math.log2(size)) if size > 0 else 1


def make_buckets(op: str, backend: str, calls: Sequence[tuple[Shape, Mapping, Mapping]]) -> list[Bucket]:
    """Group (shape, structural, sizes) of an op's calls into buckets, in the order they first appear."""
    groups: dict[str, list] = {}
    for shape, structural, sizes in calls:
        rounded = {name: round_size(size) for name, size in sizes.items()}
        place = json.dumps([structural, rounded], sort_keys=True)
        groups.setdefault(place, []).append((shape, structural, sizes, rounded))
    buckets = []
    for members in groups.values():
        _, structural, _, rounded = members[0]
        shapes = tuple(shape for shape, *_ in members)
        keys = tuple({**structural, **sizes} for _, _, sizes, _ in members)
        buckets.append(Bucket(op, backend, structural, rounded, shapes, keys))
    return buckets


class Space:
    """The feasible points of one bucket, and which of them are neighbours."""

    def __init__(self, declaration: Declaration, keys: Sequence[Mapping[str, Any]], target: Target):
        self.names = tuple(declaration.parameters)
        self.options = tuple(_ordered(parameter.allowed) for parameter in declaration.parameters.values())
        self.total = math.prod(len(options) for options in self.options)
        if self.total > MAX_PRODUCT:
            raise ValueError(
                f"{declaration.op}.{declaration.backend}: {self.total} points are too many to list"
            )
        self.refused: Counter[str] = Counter()  # infeasible points by reason
        self.points: list[tuple[Value, ...]] = []
        for point in itertools.product(*self.options):
            config = self.config(point)
            reasons = (declaration.refuses(config, key, target) for key in keys)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                self.points.append(point)
            else:
                self.refused[reason] += 1
        self._known = frozenset(self.points)
        self.default = self.point(declaration.defaults(keys[0], target))

    def __len__(self) -> int:
        return len(self.points)

    def __contains__(self, point: object) -> bool:
        return point in self._known

    def config(self, point: tuple[Value, ...]) -> Config:
        return dict(zip(self.names, point, strict=True))

    def point(self, config: Mapping[str, Value]) -> tuple[Value, ...]:
        return tuple(config[name] for name in self.names)

    def neighbours(self, point: tuple[Value, ...]) -> Iterator[tuple[Value, ...]]:
        """Feasible points one step away: the next value either way of a number, any other of a variant."""
        for place, options in enumerate(self.options):
            at = options.index(point[place])
            if numeric(options):
                steps = [options[i] for i in (at - 1, at + 1) if 0 <= i < len(options)]
            else:
                steps = [option for option in options if option != point[place]]
            for value in steps:
                near = (*point[:place], value, *point[place + 1 :])
                if near in self:
                    yield near


def _ordered(allowed: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(sorted(set(allowed))) if numeric(allowed) else tuple(dict.fromkeys(allowed))


def numeric(options: Sequence[Value]) -> bool:
    return all(isinstance(option, int) for option in options)
