"""Find a bucket's configuration: explore the feasible points, race the best, keep the default unless beaten.

A small space whose sweep fits the time is swept: every point a few rounds, the best quarter more, the best
five many. Otherwise Optuna's TPE proposes points, then every neighbour of the best one is tried. Either way
the finalists run in interleaved rounds, and the winner runs against the default once more, on its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastattn.autotune.measure import Comparison, compare
from fastattn.autotune.space import Config, Space
from fastattn.autotune.study import Outcome, Point, Trials
from fastattn.autotune.worker import Failure

SMALL = 300  # points that may be swept
ROUNDS = 3  # of a first look
HOPELESS = 2.0  # times the best ratio: not timed any further
SEMIFINAL_ROUNDS, FINAL_ROUNDS, GUARD_ROUNDS = 10, 50, 40
FINALISTS = 5
NEEDED = 16  # trials' worth of time below which a bucket tells too little: fewer buckets are better then
MIN_GAIN = 0.02  # a smaller gain is not worth a table entry that departs from the default
EXPLORE, RACE = 0.6, 0.8  # shares of the budget used when exploration and the race end


class Evaluator(Protocol):
    """Where candidates run; `worker.Candidates` is the real one, tests replay recorded sweeps."""

    def trial(self, config: Config, hopeless: float) -> Outcome:
        """Check a configuration and take a first look at its time."""

    def race(self, configs: Sequence[Config], rounds: int, seconds: float) -> list[list[list[float]]]:
        """[config][shape][round] in seconds, of worker.LEAST_ROUNDS at least; raises Failure."""

    def agree(self, config: Config) -> None:
        """Raise Failure where its result at full size is not the default's."""


@dataclass
class Clock:
    """A budget in seconds that has started running."""

    seconds: float
    limit: float = 0.0  # seconds that `need` may extend the budget to
    started: float = field(default_factory=time.monotonic)

    def need(self, seconds: float) -> None:
        self.seconds = max(self.seconds, min(seconds, self.limit))

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the budget is used."""
        return self.started + self.seconds * share - time.monotonic()


@dataclass(frozen=True)
class Winner:
    """What a bucket is to launch with; `kept` says why that is the default, where it is."""

    config: Config
    comparison: Comparison
    kept: str = ""


Progress = Callable[[Point, Outcome], None]


def explore(
    space: Space,
    trials: Trials,
    evaluator: Evaluator,
    clock: Clock,
    *,
    seed: int = 0,
    most: int | None = None,
    every: bool | None = None,
    progress: Progress | None = None,
) -> None:
    """Evaluate points until the budget's share is used, all are known, or `most` new ones were evaluated.

    every says whether to sweep the space; None decides by its size and the time a sweep would take.
    Raises Failure where the default itself cannot run.
    """
    explorer = _Explorer(space, trials, evaluator, clock, most, progress)
    if space.default not in space:
        raise Failure("error", f"the default {space.config(space.default)} is not feasible here")
    if space.default not in trials.known:
        explorer.evaluate(space.default)
        clock.need(NEEDED * explorer.cost)
    outcome = trials.known[space.default]
    if outcome.ratio is None:
        raise Failure(outcome.reason, f"the default fails: {outcome.detail}")
    unknown = trials.unknown()
    if every is None:
        time_needed = explorer.cost * len(unknown)
        every = len(space) <= SMALL and time_needed <= clock.left(EXPLORE)
    if every:
        random.Random(f"{seed} {trials.inherited}").shuffle(unknown)
        for point in unknown:
            if explorer.over():
                return
            trials.refresh()
            if point not in trials.known:
                explorer.evaluate(point)
        return
    explorer.model(reserve=0.25)
    explorer.neighbours()
    explorer.model(reserve=0.0)


class _Explorer:
    def __init__(self, space: Space, trials: Trials, evaluator: Evaluator, clock: Clock, most, progress):
        self.space, self.trials, self.evaluator, self.clock = space, trials, evaluator, clock
        self.most = math.inf if most is None else most
        self.progress = progress
        self.new = 0
        self.cost = 0.0  # seconds of the dearest evaluation so far

    def over(self, reserve: float = 0.0) -> bool:
        return self.new >= self.most * (1 - reserve) or self.clock.left(EXPLORE * (1 - reserve)) <= self.cost

    def evaluate(self, point: Point, trial=None) -> None:
        best = self.trials.best(1)
        fastest = self.trials.known[best[0]].ratio if best else 1.0
        started = time.monotonic()
        outcome = self.evaluator.trial(self.space.config(point), HOPELESS * min(fastest, 1.0))
        if outcome.ratio is not None:
            self.cost = max(self.cost, time.monotonic() - started)
        self.new += 1
        self.trials.record(point, outcome, trial)
        if self.progress is not None:
            self.progress(point, outcome)

    def model(self, reserve: float) -> None:
        while not self.over(reserve):
            proposal = self.trials.propose()
            if proposal is None:
                return
            trial, point = proposal
            self.evaluate(point, trial)

    def neighbours(self) -> None:
        """Step from the best point to its best neighbour while that is faster."""
        while True:
            best = self.trials.best(1)[0]
            for near in self.space.neighbours(best):
                if near not in self.trials.known:
                    if self.over():
                        return
                    self.evaluate(near)
            if self.trials.best(1)[0] == best:
                return


def decide(space: Space, trials: Trials, evaluator: Evaluator, clock: Clock) -> Winner:
    """Race the best points and hold the winner against the default; the default stays unless it loses.

    Raises Failure where no time is left to.
    """
    if clock.left() <= 0:
        raise Failure("out of time", "before the finalists could race")
    default = space.config(space.default)
    timed = sum(outcome.ratio is not None for outcome in trials.known.values())
    runners = [point for point in trials.best(max(FINALISTS, timed // 4)) if point != space.default]
    while runners:
        if len(runners) > FINALISTS:
            if clock.left(0.7) > 0:
                runners = _race(space, evaluator, runners, SEMIFINAL_ROUNDS, clock.left(0.7))
            runners = runners[:FINALISTS]
        runners = _race(space, evaluator, runners, FINAL_ROUNDS, clock.left(RACE))
        if not runners:
            break
        config = space.config(runners[0])
        try:
            evaluator.agree(config)
            times = evaluator.race([default, config], GUARD_ROUNDS, clock.left())
        except Failure as failure:
            trials.known[runners[0]] = Outcome(None, failure.reason, failure.detail)
            runners = runners[1:]
            continue
        comparison = compare(times[1], times[0])
        if comparison.faster and comparison.ratio <= 1 - MIN_GAIN:
            return Winner(config, comparison)
        alone = compare(times[0], times[0])
        return Winner(
            default, alone, kept=f"best other took {comparison.ratio:.2f} ± {comparison.spread:.2f}"
        )
    times = evaluator.race([default], SEMIFINAL_ROUNDS, clock.left())
    return Winner(default, compare(times[0], times[0]), kept="nothing else ran")


def _race(
    space: Space, evaluator: Evaluator, points: list[Point], rounds: int, seconds: float
) -> list[Point]:
    """The points by their median ratio to the default, best first; those that fail drop out."""
    configs = [space.config(point) for point in (space.default, *points)]
    try:
        times = evaluator.race(configs, rounds, seconds)
    except Failure:
        survivors = [point for point in points if _runs(space, evaluator, point)]
        return _race(space, evaluator, survivors, rounds, seconds) if len(survivors) < len(points) else []
    ratios = {point: compare(one, times[0]).ratio for point, one in zip(points, times[1:], strict=True)}
    return sorted(points, key=ratios.__getitem__)


def _runs(space: Space, evaluator: Evaluator, point: Point) -> bool:
    return evaluator.trial(space.config(point), math.inf).ratio is not None
