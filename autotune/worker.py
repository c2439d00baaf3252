"""Candidates run in a process of their own: a crash, a hang or a lost device there is a failed trial here.

The worker reads one JSON request a line from its standard input and answers one a line; whatever kernels or
compilers print goes to standard error. `Worker` is the other end: it waits with a time-out, and starts a new
process when the old one is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

LEAST_ROUNDS = 5  # of a race, to tell anything by
START_LIMIT = 120.0  # seconds for a new process to import torch and reach the device
GRACE = 10.0  # seconds after a request's limit before a worker whose parent has gone ends itself


class Failure(Exception):
    """A candidate that cannot be used, and why."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Unavailable(OSError):
    """No worker can be started, or it cannot make what it is to measure; no candidate's doing."""


class Worker:
    """A process that measures on one device; restarted on demand after it died."""

    def __init__(self, device: str, *, threads: int | None = None):
        self.device, self.threads = device, threads
        self.starts = 0
        self._process: subprocess.Popen | None = None
        self._opened: dict[str, Any] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    def ask(self, request: dict[str, Any], limit: float) -> Any:
        """Send a request and wait at most `limit` seconds; raises Failure, or Unavailable."""
        self._start()
        return self._exchange(request, limit)

    def open(self, request: dict[str, Any], limit: float) -> Any:
        """Ask, and ask the same first of any process started later."""
        self._opened = None
        answer = self.ask(request, limit)
        self._opened = (request, limit)
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened = None
        self.close()
        self._log.close()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self.starts += 1
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            # -P: a folder named fastattn where the user stands is not the package
            [sys.executable, "-P", "-m", "fastattn.autotune.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
        )
        self._lines = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            self._exchange({"do": "start", "device": self.device, "threads": self.threads}, START_LIMIT)
            if self._opened is not None:
                self._exchange(*self._opened)
        except Failure as failure:
            raise Unavailable(f"no worker for {self.device}: {failure}") from None

    def _exchange(self, request: dict[str, Any], limit: float) -> Any:
        process = self._process
        try:
            process.stdin.write(json.dumps({**request, "limit": limit}) + "\n")
            process.stdin.flush()
            answer = self._lines.get(timeout=limit)
        except queue.Empty:
            process.kill()
            process.wait()
            raise Failure("timed out", f"no answer after {limit:.0f} s") from None
        except OSError:
            answer = ""
        if not answer:
            code = process.wait()
            raise Failure("crashed", f"{_exit_name(code)} {self._last_words()}".strip())
        reply = json.loads(answer)
        if "reason" in reply:
            raise Failure(reply["reason"], reply["detail"])
        return reply["value"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put("")


def _exit_name(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


class Server:
    """The worker's side: answers requests about one workload at a time."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.bench: Any = None

    def start(self, device: str, threads: int | None) -> None:
        import torch

        self.device = device
        if threads is not None:
            torch.set_num_threads(threads)
        torch.zeros(1, device=device)

    def survey(self, module: str, name: str, effort: str, given: list[dict] | None) -> dict:
        """The device, and (shape, structural, sizes) of every call worth tuning."""
        import torch
        from fastattn.autotune import measure, space

        from fastattn.runtime import device as _device

        workload = space.load_workloads([module])[name][1]
        target = _device.target(self.device)
        shapes = [dict(shape) for shape in workload.shapes(effort, target)]
        if given:
            shapes = [space.with_fields(workload, fields, target) for fields in given]
        calls = []
        for shape in shapes:
            look = measure.looked_up(workload, shape, torch.device(self.device))
            calls.append([shape, look.structural, look.sizes])
        return {"target": target.describe(), "calls": calls}

    def open(self, module: str, name: str, shapes: list[dict], seed: int, default: dict) -> None:
        from fastattn.autotune import measure, space

        workload = space.load_workloads([module])[name][1]
        self.bench = None
        self.bench = measure.Bench(workload, shapes, self.device, seed, default)
        self.bench.check(default)

    def trial(self, config: dict, rounds: int, hopeless: float | None) -> list:
        """Check, then time beside the default: [[default's], [its]] times."""
        from math import inf

        self.bench.check(config)
        configs = [self.bench.default, config]
        return self.bench.time(configs, rounds, hopeless=inf if hopeless is None else hopeless)

    def race(self, configs: list[dict], rounds: int, seconds: float) -> list:
        return self.bench.time(configs, rounds, least=LEAST_ROUNDS, seconds=seconds)

    def agree(self, config: dict) -> None:
        self.bench.agree(config)


def reason_of(error: BaseException) -> str:
    if isinstance(error, AssertionError):
        return "wrong"
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "OutOfResources"):
        return "out of resources"
    return "error"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a kernel or compiler prints must not look like an answer
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        # Its own thread, needing no interpreter lock: an orphan in a hung kernel still ends.
        faulthandler.dump_traceback_later(request.pop("limit") + GRACE, exit=True)
        try:
            reply = {"value": getattr(server, request.pop("do"))(**request)}
        except Failure as failure:
            reply = {"reason": failure.reason, "detail": failure.detail}
        except Exception as error:
            reply = {"reason": reason_of(error), "detail": f"{type(error).__name__}: {error}"[:500]}
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
