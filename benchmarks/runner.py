"""Runs a row: the result is checked first, then all contenders are timed in interleaved rounds.

A round times each contender once, in an order that rotates, so that a slow moment of the machine falls on
all of them. Times are medians over the rounds; a ratio is the ratio of medians, and its spread is the range
between the 10th and 90th percentile of the ratios within single rounds.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.registry import OWN, Bar, Case, Problem
from fastattn import testing

ROUNDS = 15
QUICK_ROUNDS = 5
SAMPLE_SECONDS = 0.02  # a shorter call is repeated within a sample
MINIMUM_ROUNDS = 3
CASE_SECONDS = 20.0  # of measuring; a slow contender takes part in fewer rounds, and a peer that needs more for its first
# call in none: that call is its time


@dataclass
class Timing:
    """Seconds a call."""

    median: float
    low: float
    high: float


@dataclass
class Result:
    case: Case
    correct: bool = False
    wrong: bool = False
    error: str = ""  # why there are no figures
    times: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, Timing] = field(default_factory=dict)  # peer's time over ours
    not_run: dict[str, str] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    bandwidth: str = "copy"
    share: float | None = None  # of the limit below
    limit: str = ""
    rounds: int = 0

    def bar_value(self, bar: Bar) -> float | None:
        """What the bar is about, or None where it could not be measured."""
        if bar.tflops is not None:
            return self.flops / self.times[OWN].median / 1e12 if self.flops and self.times else None
        if bar.milliseconds is not None:
            return self.times[OWN].median * 1e3 if self.times else None
        if bar.peer is None:
            return self.share
        if bar.peer not in self.ratios:
            return None
        ratio = self.ratios[bar.peer].median
        return ratio if bar.at_most is None else 1 / ratio

    def bar_met(self, bar: Bar) -> bool | None:
        value = self.bar_value(bar)
        if value is None:
            return None
        if bar.tflops is not None:
            return value >= bar.tflops
        if bar.milliseconds is not None:
            return value <= bar.milliseconds
        return value >= bar.at_least if bar.at_most is None else value <= bar.at_most


def run(case: Case, limits: Mapping[str, float], *, quick: bool = False, slow: bool = False) -> Result:
    """slow: also a row that needs a faster machine than this one."""
    result = Result(case)
    for name, least in case.needs.items():
        if limits.get(name, 0.0) < least and not slow:
            result.error = f"not run: needs {name} of {least:g}, this machine has {limits.get(name, 0.0):.3g}"
            return result
    if case.device == "cuda" and not torch.cuda.is_available():
        result.error = "not run: there is no CUDA device"
        return result
    problem = case.problem()
    result.flops, result.bytes, result.bandwidth = problem.flops, problem.bytes, problem.bandwidth
    calls: dict[str, Callable] = {}
    first: dict[str, object] = {}
    once: dict[str, float] = {}
    for name, fn in problem.contenders.items():
        try:
            call = _timed_call(fn, problem.inputs, case.direction)
            start = time.perf_counter()
            first[name] = call()
            seconds = time.perf_counter() - start
            calls[name] = call
            # elsewhere a first call may be a compilation
            if problem.compare is not None and name != OWN and seconds > CASE_SECONDS:
                once[name] = seconds
        except (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError) as error:
            # peers that a machine does not have are part of the picture, not a failure
            result.not_run[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    if OWN not in calls:
        result.error, result.wrong = f"not run: {result.not_run[OWN]}", True
        return result
    try:
        wrong = _check(case, problem, calls, first)
    except AssertionError as error:
        result.error, result.wrong = f"WRONG: {error}", True
        return result
    for name, why in wrong.items():
        result.not_run[name] = f"another result: {why}"
        del calls[name]
    result.correct = True
    first.clear()
    repeated = {name: call for name, call in calls.items() if name not in once}
    samples = interleave(repeated, QUICK_ROUNDS if quick else ROUNDS)
    samples |= {name: [seconds] for name, seconds in once.items() if name in calls}
    result.rounds = len(samples[OWN])
    result.times = {name: _timing(s) for name, s in samples.items()}
    for name in samples:
        if name != OWN:
            theirs = samples[name] * len(samples[OWN]) if name in once else samples[name]
            per_round = [a / b for a, b in zip(theirs, samples[OWN], strict=False)]
            spread = _timing(per_round)
            ratio = result.times[name].median / result.times[OWN].median
            result.ratios[name] = Timing(ratio, spread.low, spread.high)
    _share(result, limits)
    gc.collect()
    return result


def interleave(calls: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds a call for each contender, by round. A contender that has used up its share of CASE_SECONDS
    leaves after MINIMUM_ROUNDS."""
    repeats = {
        name: max(1, math.ceil(SAMPLE_SECONDS / max(_seconds(call, 1), 1e-7))) for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i >= MINIMUM_ROUNDS and spent[name] * (i + 1) / i > CASE_SECONDS / len(names):
                spent[name] = math.inf
                continue
            seconds = _seconds(calls[name], repeats[name])
            spent[name] += seconds
            samples[name].append(seconds / repeats[name])
    return samples


def _seconds(call: Callable, repeats: int) -> float:
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _timing(samples: Sequence[float]) -> Timing:
    x = torch.tensor(samples, dtype=torch.float64)
    low, median, high = (float(v) for v in x.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)))
    return Timing(median, low, high)


def _leaves(inputs: Sequence[object]) -> list[torch.Tensor]:
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def _timed_call(fn: Callable, inputs: tuple, direction: str) -> Callable[[], object]:
    if direction == "step":
        return lambda: fn(*inputs)
    if direction == "forward":
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)

        def forward():
            with torch.no_grad():
                return fn(*plain)

        return forward
    own = testing.fresh(inputs)
    leaves = _leaves(own)

    def record():
        outputs = [o for o in testing.as_tuple(fn(*own)) if o.requires_grad]
        return outputs, [g.to(o) for o, g in zip(outputs, testing.output_gradients(outputs), strict=True)]

    outputs, grads = record()
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def forward_backward():
        outputs = [o for o in testing.as_tuple(fn(*own)) if o.requires_grad]
        return torch.autograd.grad(outputs, leaves, grads)

    return forward_backward


def _check(
    case: Case, problem: Problem, calls: Mapping[str, Callable], first: Mapping[str, object]
) -> dict[str, str]:
    """Raises AssertionError where our result is wrong; returns peers whose result is another, and why."""
    if problem.check is not None:
        problem.check()
        return {}
    if problem.compare is not None:
        missing = [name for name in problem.contenders if name not in calls]
        if missing:
            raise AssertionError(f"nothing to compare with: {', '.join(missing)} did not run")
        problem.compare(first)
        return {}
    if problem.reference is None:
        raise AssertionError(f"{case.name} has no reference, check or compare")
    pick = problem.select or (lambda x: x)
    forward = case.direction == "forward"
    inputs = tuple(x.detach() if forward and isinstance(x, torch.Tensor) else x for x in problem.inputs)

    def differentiate(fn: Callable, inputs: tuple, picked: bool) -> tuple:
        """Outputs and gradients of fn, each narrowed to what the reference computes."""
        inputs = testing.fresh(inputs)
        with torch.set_grad_enabled(not forward):
            outputs = testing.as_tuple(fn(*inputs))
        gradients: tuple = ()
        if not forward:
            leaves = _leaves(inputs)
            full = testing.output_gradients(outputs if picked else full_outputs)
            grads = full if picked else [pick(g) for g in full]
            pairs = [(o, g.to(o)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])
        return tuple(pick(o) if picked else o for o in outputs), tuple(pick(g) for g in gradients)

    with torch.no_grad():
        full_outputs = testing.as_tuple(problem.contenders[OWN](*inputs))
    truth = differentiate(problem.reference, testing.to_float64(inputs), False)
    with testing.rounding_every_step():
        eager = differentiate(problem.reference, inputs, False)
    wrong: dict[str, str] = {}
    for name in calls:
        if name in problem.yardsticks:
            continue
        actual = differentiate(problem.contenders[name], inputs, True)
        # a peer needs only to compute the same thing: its own rounding is its own affair
        loosen = 1 if name == OWN else 16
        try:
            for factor, a, t, e in zip((2.0, 3.0), actual, truth, eager, strict=True):
                for i, (x, y, z) in enumerate(zip(a, t, e, strict=True)):
                    testing.assert_close_to_truth(
                        x, y, z, factor=loosen * factor, terms=loosen**2 * problem.terms, name=f"{name} {i}"
                    )
        except AssertionError as error:
            if name == OWN:
                raise
            wrong[name] = str(error)
    return wrong


def _share(result: Result, limits: Mapping[str, float]) -> None:
    """Share of the measured limit: arithmetic where the row counts operations, bandwidth where it counts
    bytes."""
    if result.case.device != "cpu":  # the limits are the processor's
        return
    seconds = result.times[OWN].median
    if result.flops:
        dot = result.case.dtype == torch.bfloat16 and limits.get("bf16 dot")
        result.limit = "bf16 dot" if dot else "fp32 fma"
        if result.limit in limits:
            result.share = result.flops / seconds / 1e9 / limits[result.limit]
    elif result.bytes:
        result.limit = result.bandwidth
        if result.limit in limits:
            result.share = result.bytes / seconds / 1e9 / limits[result.limit]
