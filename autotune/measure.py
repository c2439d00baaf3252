"""Judging one configuration on the device: first right, then timed beside the default.

Times are of calls in interleaved rounds, each after the last-level cache was filled with something else, so
that neither a drifting clock nor a hot cache picks the winner. What is compared is a round's ratio to the
default's time in the same round; its median carries an interval, and a gain counts once the interval does.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastattn.autotune.space import Config, Shape, Workload

from fastattn import testing
from fastattn.runtime import device as _device
from fastattn.runtime import tuning

CPU_FLUSH = 64 << 20  # bytes read before a timed call at most
GPU_FLUSH = (
    512 << 20
)  # bytes written: long enough that the host has queued the call before the device is done
clock = time.perf_counter  # tests put one of their own here


class Case:
    """One shape of a workload, ready to run."""

    def __init__(self, workload: Workload, shape: Shape, device: torch.device, seed: int):
        self.workload, self.shape = workload, shape
        inputs = workload.inputs(shape, device, seed)
        self.inputs = _without_gradients(inputs) if workload.timed == "forward" else testing.fresh(inputs)
        self.grads: tuple = ()
        self._expected: tuple[tuple, tuple] | None = None
        if workload.timed != "forward":
            outputs = testing.as_tuple(workload.call(shape, *self.inputs))
            self.grads = testing.output_gradients(outputs)
        if workload.timed == "backward":
            pairs = [
                (output, grad.to(output))
                for output, grad in zip(outputs, self.grads, strict=True)
                if grad is not None and output.requires_grad
            ]
            self._pairs = tuple(zip(*pairs, strict=True))
            self._leaves = [x for x in self.inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(self) -> tuple:
        if self.workload.timed == "backward":
            outputs, grads = self._pairs
            return torch.autograd.grad(outputs, self._leaves, grads, retain_graph=True, allow_unused=True)
        return self._results(self.workload.call, self.inputs)

    def expected(self) -> tuple[tuple, tuple]:
        """(truth in float64, eager in the inputs' dtype), computed once."""
        if self._expected is None:
            precise = testing.to_float64(self.inputs)
            reference = self.workload.reference
            with testing.rounding_every_step():
                eager = self._results(reference, self.inputs)
            self._expected = self._results(reference, precise), eager
        return self._expected

    def _results(self, call: Callable[..., Any], inputs: Sequence[Any]) -> tuple:
        """What is compared: the outputs, the gradients, or both."""
        if self.workload.timed == "forward":
            with torch.no_grad():
                return testing.as_tuple(call(self.shape, *inputs))
        outputs, grads = testing.differentiate(lambda *given: call(self.shape, *given), inputs, self.grads)
        return grads if self.workload.timed == "backward" else (*outputs, *grads)

    def check(self, actual: tuple) -> None:
        """Raise AssertionError where a result is over the op's error budget."""
        truth, eager = self.expected()
        assert len(actual) == len(truth), f"{len(actual)} results, the reference has {len(truth)}"
        factor, terms = (2.0 if self.workload.timed == "forward" else 3.0), self.workload.terms(self.shape)
        for a, t, e in zip(actual, truth, eager, strict=True):
            if t is None:
                assert a is None or not a.any(), "a gradient should be absent or zero"
                continue
            testing.assert_close_to_truth(a, t, e, factor=factor, terms=terms)

    def budget(self) -> list[float]:
        """Each result's error budget over its largest value."""
        factor, terms = (2.0 if self.workload.timed == "forward" else 3.0), self.workload.terms(self.shape)
        shares = []
        for t, e in zip(*self.expected(), strict=True):
            largest = testing.max_finite(t) if t is not None else 0.0
            if largest == 0.0:
                shares.append(0.0)
                continue
            allowed = testing.rounding_band(t, e.dtype, terms) + factor * testing.max_error(e, t)
            shares.append(allowed / largest)
        return shares


def looked_up(workload: Workload, shape: Shape, device: torch.device) -> tuning.Lookup:
    """The key by which a call of this shape looks its configuration up; the call is made once."""
    case = Case(workload, shape, device, 0)
    with tuning.watch() as seen:
        case.run()
    for look in seen:
        if (look.op, look.backend) == (workload.op, workload.backend):
            return look
    raise ValueError(f"{workload.name}: the call with {shape} never looked its configuration up")


def _without_gradients(inputs: Sequence[Any]) -> tuple:
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)


def _spoil(results: tuple) -> None:
    for x in results:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.fill_(math.nan)


class Bench:
    """The shapes of one bucket on one device."""

    def __init__(self, workload: Workload, shapes: Sequence[Shape], device: str, seed: int, default: Config):
        self.workload, self.default = workload, default
        self.device = torch.device(device)
        self.random = random.Random(seed)
        self.cases = [Case(workload, shape, self.device, seed) for shape in shapes]
        self.checks = [self._checked(case, seed) for case in self.cases]
        self._wanted: list[tuple] | None = None
        if self.device.type == "cpu":
            size = min(_device.target(self.device).l3 * 5 // 4 or CPU_FLUSH, CPU_FLUSH)
        else:
            size = GPU_FLUSH
        self._flush = torch.zeros(size // 4, device=self.device)

    def _checked(self, case: Case, seed: int) -> Case:
        smaller = self.workload.check_shape(case.shape)
        return case if smaller == case.shape else Case(self.workload, smaller, self.device, seed)

    def forced(self, config: Config):
        return tuning.override({(self.workload.op, self.workload.backend): config})

    def check(self, config: Config) -> None:
        """Raise AssertionError unless the configuration is right on every shape."""
        for case in self.checks:
            case.expected()
            with self.forced(config):
                _spoil(
                    case.run()
                )  # the allocator hands the same memory out again: what stays unwritten shows
                case.check(case.run())

    def agree(self, config: Config) -> None:
        """Raise AssertionError where the result at a full shape is not the default's.

        Two results within budget differ by at most two budgets; the budget over the largest value is taken
        from the checked shape, and doubled for what the longer sums of the full shape add.
        """
        if self._wanted is None:
            with self.forced(self.default):
                self._wanted = [case.run() for case in self.cases]
        for case, checked, wanted in zip(self.cases, self.checks, self._wanted, strict=True):
            with self.forced(config):
                actual = case.run()
            for a, w, share in zip(actual, wanted, checked.budget(), strict=True):
                if w is not None:
                    error, allowed = testing.max_error(a, w), 4 * share * testing.max_finite(w)
                    assert error <= allowed, f"differs from the default by {error:.3e}, allowed {allowed:.3e}"

    def time(
        self,
        configs: Sequence[Config],
        rounds: int,
        *,
        least: int = 1,
        seconds: float = math.inf,
        hopeless: float = math.inf,
    ) -> list[list[list[float]]]:
        """Seconds of each call: [config][shape][round], of whole rounds, `least` of them at least.

        Rounds end after `seconds`, and once every configuration but the first is over `hopeless` times it.
        """
        times: list[list[list[float]]] = [[[] for _ in self.cases] for _ in configs]
        for config in configs:  # warm up: compile, fault pages in
            with self.forced(config):
                for case in self.cases:
                    case.run()
        started = time.perf_counter()
        order = list(range(len(configs)))
        collecting = gc.isenabled()
        gc.disable()
        try:
            for done in range(1, rounds + 1):
                self.random.shuffle(order)
                for at, case in enumerate(self.cases):
                    for place in order:
                        with self.forced(configs[place]):
                            times[place][at].append(self._timed(case))
                if done >= least and time.perf_counter() - started > seconds:
                    break
                if done < rounds and all(geomean_ratio(one, times[0]) > hopeless for one in times[1:]):
                    break
        finally:
            if collecting:
                gc.enable()
        return times

    def _timed(self, case: Case) -> float:
        if self.device.type == "cpu":
            self._flush.sum()
            started = clock()
            case.run()
            return clock() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self._flush.zero_()
            start.record()
            case.run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Comparison:
    """A configuration beside the default: medians over rounds, of all shapes of a bucket together."""

    seconds: float  # geometric mean over shapes
    default_seconds: float
    ratio: float  # median of the rounds' ratios, below 1 is faster than the default
    spread: float  # half width of the ratio's 95 % interval

    @property
    def faster(self) -> bool:
        return self.ratio + self.spread < 1.0

    @property
    def slower(self) -> bool:
        return self.ratio - self.spread > 1.0


def round_ratios(times: Sequence[Sequence[float]], default: Sequence[Sequence[float]]) -> list[float]:
    """Each round's geometric mean over shapes of time / default time."""
    per_shape = [
        [one / other for one, other in zip(a, b, strict=False)] for a, b in zip(times, default, strict=True)
    ]
    return [math.exp(statistics.fmean(map(math.log, ratios))) for ratios in zip(*per_shape, strict=True)]


def geomean_ratio(times: Sequence[Sequence[float]], default: Sequence[Sequence[float]]) -> float:
    return statistics.median(round_ratios(times, default))


def compare(times: Sequence[Sequence[float]], default: Sequence[Sequence[float]]) -> Comparison:
    """Times are [shape][round] of the same rounds."""
    ratios = round_ratios(times, default)
    if len(ratios) >= 4:
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = 1.58 * (high - low) / math.sqrt(len(ratios))  # the notch of a box plot
    else:
        spread = 1.0  # too few rounds to tell
    return Comparison(
        typical_seconds(times),
        typical_seconds(default),
        statistics.median(ratios),
        spread,
    )


def typical_seconds(times: Sequence[Sequence[float]]) -> float:
    """The geometric mean over shapes of the median over rounds."""
    return math.exp(statistics.fmean(math.log(statistics.median(one)) for one in times))
