"""What is measured. A benchmark is a row, not a script.

To add one, put a module in benchmarks/cases/ with a list `CASES`:

    def softmax_problem(dtype, H, L, D):
        q, k, v = testing.attention_inputs(1, H, H, L, L, D, dtype=dtype)
        return Problem(
            inputs=(q, k, v),
            contenders={"fastattn": fa.attention, "sdpa": F.scaled_dot_product_attention},
            reference=attention_definition,
            flops=4 * H * L * L * D,
        )

    CASES = [
        Case("attention", "softmax", softmax_problem, {"H": 8, "L": 2048, "D": 64}, torch.bfloat16,
             bars=(faster_than("sdpa", 4.0),), quick=True),
    ]

`python -m benchmarks attention --case 'softmax*L=2048*'` then checks the result, times fastattn and its
peers in interleaved rounds, and says whether the bar is met. Nothing is allocated before a row runs.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

OWN = "fastattn"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
DIRECTIONS = ("forward", "backward", "forward+backward", "step")


@dataclass(frozen=True)
class Bar:
    """A ratio to reach. `peer` None: the share of the measured limit, `tflops` TFLOP/s, or `milliseconds` at most."""

    peer: str | None
    at_least: float | None = None
    at_most: float | None = None
    tflops: float | None = None
    milliseconds: float | None = None

    def __str__(self) -> str:
        if self.milliseconds is not None:
            return f"<= {self.milliseconds:g} ms"
        if self.tflops is not None:
            return f">= {self.tflops:g} TFLOP/s"
        if self.peer is None:
            return f">= {self.at_least:.0%} of peak"
        if self.at_most is not None:
            return f"<= {self.at_most:g} of {self.peer}'s time"
        return f">= {self.at_least:g}x {self.peer}"


def faster_than(peer: str, ratio: float) -> Bar:
    """The peer's time over ours is at least `ratio`."""
    return Bar(peer, at_least=ratio)


def time_at_most(peer: str, share: float) -> Bar:
    """Our time is at most `share` of the peer's."""
    return Bar(peer, at_most=share)


def share_of_peak(share: float) -> Bar:
    return Bar(None, at_least=share)


def tflops_at_least(rate: float) -> Bar:
    return Bar(None, tflops=rate)


def milliseconds_at_most(limit: float) -> Bar:
    return Bar(None, milliseconds=limit)


@dataclass
class Problem:
    """Inputs, who computes the result from them, and what the truth is.

    inputs: passed to every contender; floating tensors that require gradients get them in the other
        directions.
    contenders: name -> function of the inputs. "fastattn" is ours. A function that raises is reported as
        not run.
    reference: the definition; called with float64 inputs for the truth and with the inputs for the error
        budget. None only in direction "step", where `check` or `compare` judges.
    select: the part of outputs, of their gradients and of the inputs' gradients that is compared, where the
        reference computes only that part (large problems).
    check: raises AssertionError when our result is wrong, in place of the comparison with `reference`.
    compare: the same of what the first call of each contender returned, by name, so that a slow peer is not called
        again.
    yardsticks: contenders that compute something else on purpose (the full mask against the causal one):
        timed and compared in time, not in value.
    flops, bytes: work of one call in the case's direction, 0 where it makes no sense.
    bandwidth: the limit that bytes are held against: "copy" or "read".
    terms: length of the reductions, for the error budget.
    """

    inputs: tuple
    contenders: Mapping[str, Callable]
    reference: Callable | None = None
    select: Callable | None = None
    check: Callable[[], None] | None = None
    compare: Callable[[Mapping[str, object]], None] | None = None
    yardsticks: Sequence[str] = ()
    flops: float = 0.0
    bytes: float = 0.0
    bandwidth: str = "copy"
    terms: int = 1


@dataclass(frozen=True)
class Case:
    """One row: op, shapes, dtype, direction, and the bar if there is one."""

    group: str
    op: str
    build: Callable[..., Problem]  # build(dtype, **shape)
    shape: Mapping[str, object]
    dtype: torch.dtype
    direction: str = "forward"
    bars: Sequence[Bar] = ()
    quick: bool = False  # also part of --quick
    series: str = ""  # rows of one series are a line in the picture, against shape["L"]
    options: Mapping[str, object] = field(default_factory=dict)  # passed to build, not shown
    needs: Mapping[str, float] = field(default_factory=dict)  # limits a machine must reach for the row to run
    device: str = "cpu"  # or "cuda": not run, with that reason, where there is none

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"Case: direction is {self.direction!r}, allowed are {', '.join(DIRECTIONS)}")

    @property
    def name(self) -> str:
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        return f"{self.op} {DTYPE_NAMES[self.dtype]} {shape} {self.direction}"

    def problem(self) -> Problem:
        return self.build(self.dtype, **self.shape, **self.options)


def all_cases() -> list[Case]:
    """Every row of every module in benchmarks/cases, in file order."""
    from benchmarks import cases

    found: list[Case] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        found += importlib.import_module(f"benchmarks.cases.{module}").CASES
    names = [(case.group, case.name) for case in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"benchmarks: rows with the same name: {sorted(twice)}")
    return found


def groups() -> list[str]:
    return sorted({case.group for case in all_cases()})


def select(group: str, *, quick: bool = False, pattern: str = "*") -> list[Case]:
    chosen = [case for case in all_cases() if case.group == group and (case.quick or not quick)]
    return [case for case in chosen if fnmatch.fnmatch(case.name, pattern)]
