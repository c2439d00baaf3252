"""`explain`: which backend would run a call, and why no better one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .hints import did_you_mean
from .registry import Backend, Op, explaining
from .tuning import Choice


@dataclass(frozen=True)
class Explanation:
    """Which backend would run an op, with which configuration and from which source, and why better backends were ruled out."""

    op: str
    backend: str
    config: dict[str, int | str] = field(default_factory=dict)
    source: str = ""
    ruled_out: dict[str, str] = field(default_factory=dict)
    details: str = ""  # what the call computes, where an op's arguments are a program

    def __str__(self) -> str:
        config = ", ".join(f"{k}={v}" for k, v in self.config.items()) or "none"
        lines = [f"{self.op}: {self.backend} backend", f"  config: {config} ({self.source})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.ruled_out.items()]
        lines += [f"  {line}" for line in self.details.splitlines()]
        return "\n".join(lines)


@contextmanager
def collecting() -> Iterator[list[tuple[Op, Backend, dict[str, str], Sequence[Any]]]]:
    """Collects the ops that this thread calls inside the block, without running them: (op, backend, reasons of others, members)."""
    previous, explaining.calls = explaining.calls, []
    try:
        yield explaining.calls
    finally:
        explaining.calls = previous


def explain(op_name: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `fastattn.<op_name>(*args, **kwargs)` would run, without running it: checks are made, no kernel starts.

    op_name: the op's name, or the public function itself.
    Returns an Explanation (printable) with backend, config, source of the config, the backends ruled out with reasons, and for
    flex_attention the program that its functions became.
    Raises what the call itself would raise; ValueError when there is no such op.

    >>> q = torch.randn(1, 2, 9, 16)
    >>> explanation = fastattn.explain(fastattn.attention, q, q, q)
    >>> backend, reasons = explanation.backend, explanation.ruled_out
    """
    op, backend, ruled_out, members = _first_call(op_name, args, kwargs)
    configure = backend.configure
    choice = configure(*members) if configure is not None else Choice({}, "nothing to configure")
    details = "\n".join(of.describe(*members) for of in (backend, op) if of.describe is not None)
    return Explanation(op.name, backend.name, dict(choice.values), choice.source, ruled_out, details)


def refusals(op_name: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """For the op behind a public function: {backend: why it would refuse the call on a device that it serves, or None}."""
    op, _, _, members = _first_call(op_name, args, kwargs)
    return {backend.name: backend.supports(*members) for backend in op.backends}


def _first_call(
    op_name: str | Callable[..., Any], args: Sequence[Any], kwargs: dict
) -> tuple[Op, Backend, dict, Sequence[Any]]:
    import fastattn

    argument = op_name
    if callable(op_name):
        op_name = getattr(op_name, "__name__", "")
    function = getattr(fastattn, op_name, None) if isinstance(op_name, str) else None
    if not callable(function) or op_name.startswith("_") or isinstance(function, type):
        near = did_you_mean(op_name, fastattn.__all__, "{!r}") if isinstance(op_name, str) else ""
        raise ValueError(f"fastattn.explain: op_name must name a fastattn op, given {argument!r}{near}")
    with torch.no_grad(), collecting() as calls:
        function(*args, **kwargs)
    if not calls:
        raise ValueError(f"fastattn.explain: {op_name} runs no fastattn op for these arguments")
    return calls[0]
