"""A tuning run: which buckets, how long each, what becomes of the results."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.autotune import search, space, study, table
from fastattn.autotune.measure import Comparison, geomean_ratio, typical_seconds
from fastattn.autotune.space import Bucket, Config, Space
from fastattn.autotune.study import Outcome
from fastattn.autotune.worker import Failure, Unavailable, Worker

from fastattn.runtime import device as _device
from fastattn.runtime import tables, tuning

BUDGETS = {"quick": 50.0, "full": 1800.0}  # seconds; quick leaves room for starting up within a minute
LEAST = 1.5  # seconds that a bucket has at least; with less left it is not begun
OPEN_LIMIT = 120.0  # making inputs and running the reference
TRIAL_LIMITS = {"cpu": 5.0, "cuda": 60.0}  # GPU candidates may have to be compiled


@dataclass
class BucketResult:
    """What a run found out about one bucket."""

    bucket: Bucket
    total: int = 0  # points of the whole product
    feasible: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # infeasible points by reason
    trials: list[tuple[Config, Outcome]] = field(default_factory=list)  # this run's, in order
    inherited: int = 0  # points known from earlier runs or other machines
    repeats: int = 0  # proposals answered from memory
    default: Config = field(default_factory=dict)
    config: Config | None = None
    comparison: Comparison | None = None
    kept: str = ""
    failure: str = ""
    seconds: float = 0.0
    importances: dict[str, float] = field(default_factory=dict)

    @property
    def rejected(self) -> Counter[str]:
        """This run's failed trials by reason."""
        return Counter(outcome.reason for _, outcome in self.trials if outcome.ratio is None)


class Listener:
    """Told what a run does; the command line shows it."""

    def budgeted(self, seconds: float) -> None: ...
    def planned(self, buckets: Sequence[Bucket]) -> None: ...
    def started(self, result: BucketResult, seconds: float) -> None: ...
    def tried(self, result: BucketResult, config: Config, outcome: Outcome) -> None: ...
    def deciding(self, result: BucketResult) -> None: ...
    def finished(self, result: BucketResult) -> None: ...


@dataclass
class Run:
    """Everything a report is made from."""

    target: _device.Target
    results: list[BucketResult]
    failures: dict[str, str]  # ops that could not be surveyed
    skipped: list[Bucket]  # not begun for want of time
    seconds: float
    storage: str
    path: str  # the table that was written
    versions: dict[str, str]


class Candidates:
    """A bucket's configurations, run in a worker."""

    def __init__(self, worker: Worker, module: str, bucket: Bucket, default: Config, seed: int):
        self.worker = worker
        self.limit = TRIAL_LIMITS.get(worker.device.partition(":")[0], TRIAL_LIMITS["cuda"])
        request = {
            "do": "open",
            "module": module,
            "name": bucket.name,
            "shapes": [dict(shape) for shape in bucket.shapes],
            "seed": seed,
            "default": default,
        }
        worker.open(request, OPEN_LIMIT)

    def trial(self, config: Config, hopeless: float) -> Outcome:
        request = {"do": "trial", "config": config, "rounds": search.ROUNDS, "hopeless": hopeless}
        try:
            times = self.worker.ask(request, self.limit)
        except Failure as failure:
            return Outcome(None, failure.reason, failure.detail)
        return Outcome(geomean_ratio(times[1], times[0]), seconds=typical_seconds(times[1]))

    def race(self, configs: Sequence[Config], rounds: int, seconds: float) -> list[list[list[float]]]:
        request = {"do": "race", "configs": list(configs), "rounds": rounds, "seconds": seconds}
        return self.worker.ask(request, max(seconds, 0.0) + 4 * self.limit)

    def agree(self, config: Config) -> None:
        self.worker.ask({"do": "agree", "config": config}, 2 * self.limit)


def plan(
    worker: Worker, modules: Sequence[str], ops: Sequence[str], shapes: Sequence[dict], effort: str
) -> tuple[list[tuple[str, Bucket]], dict[str, str], _device.Target]:
    """(module, bucket) of what to tune, one of each op in turn, first of those of most worth; what could not be planned; the
    device."""
    workloads = space.load_workloads(modules)
    kind = worker.device.partition(":")[0]
    able = {name: found for name, found in workloads.items() if kind in found[1].devices}
    unknown = [op for op in ops if not any(op in (name, found[1].op) for name, found in able.items())]
    if unknown:
        raise ValueError(
            f"tune: nothing to tune for {unknown[0]} on {kind}; there is {', '.join(sorted(able))}"
        )
    target, failures, queues = None, {}, []
    asked = {name: found for name, found in able.items() if not ops or name in ops or found[1].op in ops}
    if shapes:
        _check_shapes(
            [workload for _, workload in asked.values()], shapes, _device.target(worker.device), bool(ops)
        )
    for name, (module, workload) in sorted(asked.items(), key=lambda item: -item[1][1].worth):
        lacking = space.lacks(workload, shapes, _device.target(worker.device)) if shapes else ""
        if lacking:
            failures[name] = f"has no field {lacking}"
            continue
        request = {"module": module, "name": name, "effort": effort, "given": list(shapes) or None}
        try:
            answer = worker.ask({"do": "survey", **request}, OPEN_LIMIT)
        except Failure as failure:
            failures[name] = str(failure)
            continue
        target = _device.Target(**answer["target"])
        queues.append(
            [(module, one) for one in space.make_buckets(workload.op, workload.backend, answer["calls"])]
        )
    turns = itertools.zip_longest(*queues)
    buckets = [one for turn in turns for one in turn if one is not None]
    return buckets, failures, target or _device.target(worker.device)


def _check_shapes(
    workloads: Sequence[space.Workload], shapes: Sequence[dict], target: _device.Target, named: bool
) -> None:
    """ValueError for a value of the wrong kind, or a field that no op has; of ops that were asked for by name, that one has not."""
    able = [one for one in workloads if not space.lacks(one, shapes, target)]
    for workload in able or workloads:
        for fields in shapes:
            space.with_fields(workload, fields, target)
    if named and len(able) < len(workloads):
        other = next(one for one in workloads if one not in able)
        raise ValueError(
            f"tune: {other.name} has no field {space.lacks(other, shapes, target)!r}; --ops names it"
        )


def tune(
    *,
    modules: Sequence[str] | None = None,
    ops: Sequence[str] = (),
    shapes: Sequence[dict] = (),
    budget: float | None = None,
    effort: str = "quick",
    storage: str = "",
    device: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    listener: Listener | None = None,
    started: float | None = None,
) -> Run:
    """Tune ops on a device and merge what was found into the user's table, bucket by bucket.

    budget is in seconds, counted from `started` (time.monotonic(), by default now); storage is any Optuna storage, by default a journal in the cache.
    """
    if effort not in BUDGETS:
        raise ValueError(f"tune: effort is {effort!r}, allowed are {', '.join(BUDGETS)}")
    clock = search.Clock(BUDGETS[effort] if budget is None else budget)
    if started is not None:
        clock.started = started
    listener = listener or Listener()
    listener.budgeted(clock.seconds)
    trials_storage = study.open_storage(storage) if storage else None
    results, skipped = [], []
    with Worker(device, threads=threads) as worker:
        modules = space.workload_modules() if modules is None else modules
        buckets, failures, target = plan(worker, modules, ops, shapes, effort)
        listener.planned([bucket for _, bucket in buckets])
        path = table.user_path(target)
        if trials_storage is None:
            storage = f"journal:{tables.cache_dir() / 'studies' / target.slug}.journal"
            trials_storage = study.open_storage(storage)
        for at, (module, bucket) in enumerate(buckets):
            # where the time is too short for all, the first have enough
            share = max(LEAST, clock.left() / (len(buckets) - at))
            if clock.left() < LEAST:
                skipped = [bucket for _, bucket in buckets[at:]]
                break
            result = BucketResult(bucket)
            results.append(result)
            bucket_clock = search.Clock(share, limit=clock.left())
            _tune_bucket(result, worker, module, target, trials_storage, bucket_clock, seed, listener)
            if result.config is not None:
                table.merge(path, target, {(bucket.op, bucket.backend): [entry_of(result)]})
            listener.finished(result)
    return Run(
        target,
        results,
        failures,
        skipped,
        clock.seconds - clock.left(),
        storage,
        str(path),
        table.tuned_with(),
    )


def _tune_bucket(
    result: BucketResult,
    worker: Worker,
    module: str,
    target: _device.Target,
    storage: Any,
    clock: search.Clock,
    seed: int,
    listener: Listener,
) -> None:
    listener.started(result, clock.seconds)
    try:
        points = Space(tuning.declared()[result.bucket.op, result.bucket.backend], result.bucket.keys, target)
        result.total, result.feasible, result.refused = points.total, len(points), points.refused
        result.default = points.config(points.default)
        candidates = Candidates(worker, module, result.bucket, result.default, seed)
        trials = study.Trials(storage, result.bucket.study_name(target), points, seed=seed)
        result.inherited = trials.inherited

        def progress(point: tuple, outcome: Outcome) -> None:
            result.trials.append((points.config(point), outcome))
            listener.tried(result, points.config(point), outcome)

        search.explore(points, trials, candidates, clock, seed=seed, progress=progress)
        listener.deciding(result)
        winner = search.decide(points, trials, candidates, clock)
        result.config, result.comparison, result.kept = winner.config, winner.comparison, winner.kept
        result.repeats = trials.repeats
        result.importances = trials.importances()
    except (Failure, Unavailable) as failure:
        result.failure = str(failure)
    result.seconds = clock.seconds - clock.left()


def entry_of(result: BucketResult) -> table.Entry:
    """A tuned bucket as an entry of a table."""
    bucket, comparison = result.bucket, result.comparison
    return {
        "key": dict(bucket.structural),
        "sizes": dict(bucket.sizes),
        "config": result.config,
        "time_us": round(comparison.seconds * 1e6, 2),
        "default_us": round(comparison.default_seconds * 1e6, 2),
        "ratio": round(comparison.ratio, 4),
        "spread": round(comparison.spread, 4),
        "trials": len(result.trials) + result.inherited,
        "shapes": [dict(shape) for shape in bucket.shapes],
    }
