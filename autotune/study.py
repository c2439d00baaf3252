"""What is known of one bucket's points, kept in an Optuna study so that runs resume and machines share.

Each evaluated point is one finished trial: its value is time over the default's time measured in the same
rounds, which means the same on any machine with the device. Failed trials carry their reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from fastattn.autotune.space import Space, numeric
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from fastattn.runtime.files import parse_json

logger = logging.getLogger("fastattn")
Point = tuple

INTERRUPTED = "interrupted"  # the run was killed meanwhile; not the candidate's doing
INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Outcome:
    """One evaluated point: a ratio to the default's time, or the reason there is none."""

    ratio: float | None
    reason: str = ""
    detail: str = ""
    seconds: float | None = None  # of a call, geometric mean over the bucket's shapes


class _KernelLock:
    """flock: let go by the system when its holder is killed, unlike Optuna's own lock files."""

    def __init__(self, path: str):
        self._lock = FileLock(path + ".flock")

    def acquire(self) -> bool:
        self._lock.acquire(timeout=60, poll_interval=0.005)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(url: str) -> Any:
    """Any Optuna storage: journal:PATH (also journal:///PATH), grpc://HOST:PORT, or a database's URL."""
    kind, _, rest = url.partition(":")
    if kind == "journal":
        path = Path(rest.removeprefix("//") or "studies.journal")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _KernelLock(str(path))
        mend_journal(path, lock)
        try:
            return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))
        except Exception:  # lines of JSON, but not Optuna's: whatever its replay stumbled over
            _set_aside(path)
            return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))
    if kind == "grpc":
        host, _, port = rest.removeprefix("//").partition(":")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    if "://" not in url:
        raise ValueError(
            f"tune: storage is {url!r}, expected journal:PATH, grpc://HOST:PORT or a database URL"
        )
    return _open_database(url, {"timeout": 60} if kind == "sqlite" else {})


def _open_database(url: str, options: dict[str, Any]) -> Any:
    from sqlalchemy.exc import SQLAlchemyError

    for wait in (0.2, 1.0, 3.0):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": options})
        except SQLAlchemyError:  # two runs that create the tables at once get in each other's way
            time.sleep(wait)
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": options})
    except SQLAlchemyError as error:  # the URL may hold a password
        raise ValueError(f"tune: storage {url.partition(':')[0]}:// cannot be opened: {error}") from error


def mend_journal(path: Path, lock: _KernelLock) -> None:
    """Cut a last line that a killed writer left unfinished; set a journal that is not one aside."""
    if not path.exists():
        return
    lock.acquire()
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            good = all(isinstance(parse_json(line), dict) for line in whole.splitlines())
        except ValueError:
            good = False
        if not good or (data and not whole):
            _set_aside(path)
        elif whole != data:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
    finally:
        lock.release()


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    os.replace(path, aside)
    logger.warning("%s is not a journal of trials: set aside as %s", path, aside.name)


class Trials:
    """The points of a space that were evaluated, by this run or any other that shares the storage."""

    def __init__(self, storage: Any, name: str, space: Space, *, seed: int, startup: int = 8):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # An experimental option of a sampler is announced on every construction.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.space = space
        options = json.dumps([space.names, space.options])
        self.name = f"{name} #{hashlib.sha256(options.encode()).hexdigest()[:8]}"
        self.distributions = {
            name: IntDistribution(0, len(options) - 1)
            if numeric(options)
            else CategoricalDistribution(options)
            for name, options in zip(space.names, space.options, strict=True)
            if len(options) > 1
        }
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=startup, constant_liar=True
        )
        self._study = optuna.create_study(
            storage=storage, study_name=self.name, sampler=sampler, direction="minimize", load_if_exists=True
        )
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self.known: dict[Point, Outcome] = {}
        self.repeats = 0  # proposals answered from memory
        self._seen = 0
        self._recover()
        self.refresh()
        self.inherited = len(self.known)

    def _recover(self) -> None:
        """Free what a run on this machine was evaluating when it was killed."""
        host = socket.gethostname()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner, _, pid = trial.user_attrs.get("owner", "").rpartition(":")
            if owner == host and not _alive(int(pid)):
                with contextlib.suppress(Exception):  # another run may have freed it first
                    self._study._storage.set_trial_user_attr(trial._trial_id, "reason", INTERRUPTED)
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def refresh(self) -> None:
        """Learn what other runs have finished."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        if len(trials) == self._seen:
            return
        self._seen = len(trials)
        for trial in trials:
            point = self._point(trial.params)
            reason = trial.user_attrs.get("reason", "")
            if point is None or point in self.known or reason in (INTERRUPTED, INFEASIBLE):
                continue
            ratio = trial.value if trial.state == TrialState.COMPLETE else None
            if ratio is not None or reason:
                detail, seconds = trial.user_attrs.get("detail", ""), trial.user_attrs.get("seconds")
                self.known[point] = Outcome(ratio, reason, detail, seconds)

    def unknown(self) -> list[Point]:
        return [point for point in self.space.points if point not in self.known]

    def best(self, count: int) -> list[Point]:
        """The fastest points known, best first."""
        timed = [(outcome.ratio, point) for point, outcome in self.known.items() if outcome.ratio is not None]
        return [point for _, point in sorted(timed)[:count]]

    def importances(self) -> dict[str, float]:
        """The share of the times' variance that each parameter explains; empty where there is too little."""
        timed = [
            trial for trial in self._study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE
        ]
        if len(timed) < 4 or len({trial.value for trial in timed}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))

    def propose(self) -> tuple[Any, Point] | None:
        """A running trial at a point not known yet, or None where every point is."""
        for _ in range(100):
            self.refresh()
            trial = self._study.ask(self.distributions)
            point = self._point(trial.params)
            if point is not None and point not in self.known:
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # see _finish
                    trial.set_user_attr("owner", self.owner)
                return trial, point
            if point is None:
                trial.set_user_attr("reason", INFEASIBLE)
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self.repeats += 1
                self._finish(trial, self.known[point])
            near = self._nearest_unknown(trial.params)
            if near is None:
                return None
            self._study.enqueue_trial(self._params(near))
        return None

    def record(self, point: Point, outcome: Outcome, trial: Any = None) -> None:
        """Finish a proposed trial, or add one for a point chosen otherwise."""
        self.known[point] = outcome
        if trial is not None:
            self._finish(trial, outcome)
            return
        done = outcome.ratio is not None
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.FAIL,
                value=outcome.ratio,
                params=self._params(point),
                distributions=self.distributions,
                user_attrs=_attributes(outcome) | {"owner": self.owner},
            )
        )

    def _finish(self, trial: Any, outcome: Outcome) -> None:
        # Where a database locks no rows, two runs may take the same queued trial: the first to finish it has told.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, value in _attributes(outcome).items():
                trial.set_user_attr(name, value)
            if outcome.ratio is None:
                self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self._study.tell(trial, outcome.ratio, skip_if_finished=True)

    def _params(self, point: Point) -> dict[str, Any]:
        return {
            name: options.index(value) if numeric(options) else value
            for name, options, value in zip(self.space.names, self.space.options, point, strict=True)
            if len(options) > 1
        }

    def _point(self, params: dict[str, Any]) -> Point | None:
        """The feasible point a trial's parameters mean, or None."""
        point = []
        for name, options in zip(self.space.names, self.space.options, strict=True):
            value = params.get(name)
            if len(options) == 1:
                value = options[0]
            elif value is None:
                return None
            elif numeric(options):
                value = options[value]
            point.append(value)
        return tuple(point) if tuple(point) in self.space else None

    def _nearest_unknown(self, params: dict[str, Any]) -> Point | None:
        """The unknown point that differs least from a proposal (a variant counts as the whole range)."""

        def distance(point: Point) -> float:
            total = 0.0
            for name, options, value in zip(self.space.names, self.space.options, point, strict=True):
                if name not in params:
                    continue
                if numeric(options):
                    total += abs(options.index(value) - params[name]) / (len(options) - 1)
                else:
                    total += value != params[name]
            return total

        return min(self.unknown(), key=distance, default=None)


def _attributes(outcome: Outcome) -> dict[str, Any]:
    fields = {"reason": outcome.reason, "detail": outcome.detail, "seconds": outcome.seconds}
    return {name: value for name, value in fields.items() if value not in ("", None)}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
