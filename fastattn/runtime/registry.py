"""How a call of an op finds its backend.

An op is declared once (`declare.py`). A call's members are the values of the op's `Call` in order; a mask is one member, which
torch's schema flattens. Backends are tried in order, the reference last. If a backend is requested by name and cannot serve the
call, the call raises NotImplementedError.
"""

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd import forward_ad

from . import torch_private
from .checks import as_integer, as_number, has_contents, is_number
from .tuning import Choice

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. All functions take the members of a call as positional arguments.

    run: returns the outputs.
    supports: returns None when it can serve the call, else the reason why not.
    configure: returns the tile configuration it would use.
    devices: device types it serves; None means every one, () means none on this machine, for the reason that `supports` gives.
    leading: `run` for a caller that reads only the first outputs. It takes their number, then the members, and returns a tuple of
        at least that many. It is there to leave out statistics for the backward that cost as much as a small call.
    describe: returns lines for `explain` about what the backend makes of a call, beside those of the op.
    """

    name: str
    run: Callable
    supports: Callable[..., str | None] = lambda *members: None
    configure: Callable[..., Choice] | None = None
    devices: tuple[str, ...] | None = None
    leading: Callable | None = None
    describe: Callable[..., str] | None = None

    def refusal(self, device: torch.device, members: Sequence[Any]) -> str | None:
        if self.devices and device.type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device.type}"
        return self.supports(*members)


class Lazy:
    """The functions of a module that is imported when one of them is first called: importing Triton takes a second."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self):
        return importlib.import_module(self._name)

    def __getattr__(self, function: str) -> Callable:
        def run(*args):
            return getattr(self._module, function)(*args)

        return run


@dataclass(frozen=True)
class Op:
    name: str
    fake: Callable
    backends: tuple[Backend, ...]
    check: Callable[..., None]
    check_contents: Callable[..., None] | None = None
    numbers: tuple[tuple[int, str], ...] = ()  # (index, name) of the members that are floats
    integers: tuple[tuple[int, str], ...] = ()  # (index, name) of the members that are integers
    group: tuple[int, type] | None = None  # (index, NamedTuple) of the member that is flattened in the schema
    writes: bool = False  # whether it writes to an argument
    outputs: tuple[str, ...] = ("out",)
    # outputs that a backend saves for its own backward; backends may differ in them
    kept: tuple[str, ...] = ()
    describe: Callable[..., str] | None = None  # what a call computes, as text for `explain`

    def members(self, values: Sequence[Any]) -> Sequence[Any]:
        """The members of a call from its values in the order of torch's schema."""
        if self.group is None:
            return values
        start, kind = self.group
        end = start + len(kind._fields)
        return (*values[:start], kind(*values[start:end]), *values[end:])

    def values(self, members: Sequence[Any]) -> Sequence[Any]:
        """The values in the order of torch's schema from a call's members."""
        if self.group is None:
            return members
        index, _ = self.group
        return (*members[:index], *members[index], *members[index + 1 :])

    def plain(self, members: tuple) -> tuple:
        """members with numpy numbers and 0-dim tensors as Python numbers. Other types are left for `check` to refuse."""
        changed = None
        for i, name in self.numbers:
            value = members[i]
            if type(value) is not float and is_number(value):
                changed = changed or list(members)
                changed[i] = as_number(self.name, name, value)
        for i, _ in self.integers:
            value = members[i]
            if type(value) is not int and (integer := as_integer(value)) is not None:
                changed = changed or list(members)
                changed[i] = integer
        return members if changed is None else tuple(changed)

    def run(self, members: Sequence[Any], requested: str, reads: int | None = None) -> Any:
        """Run the first backend that serves these checked members. reads: the number of leading outputs that the caller uses; None: all."""
        if self.check_contents is not None:
            self.check_contents(*members)
        device = _device(members)
        if explaining.calls is not None:
            return self._explain(device, members, requested)
        for backend in self.backends:
            # `select` does the same and collects reasons
            if (
                (not requested or backend.name == requested)
                and (backend.devices is None or device.type in backend.devices)
                and backend.supports(*members) is None
            ):
                if reads is not None and backend.leading is not None:
                    return backend.leading(reads, *members)
                return backend.run(*members)
        self.select(device, members, requested)
        raise AssertionError(f"fastattn.{self.name}: a backend refused a call and then served it")

    def _explain(self, device: torch.device, members: Sequence[Any], requested: str) -> Any:
        backend, ruled_out = self.select(device, members, requested)
        explaining.calls.append((self, backend, ruled_out, members))
        return self.fake(*members)

    def select(
        self, device: torch.device, members: Sequence[Any], requested: str
    ) -> tuple[Backend, dict[str, str]]:
        """The backend that serves the call, and why each better one was ruled out."""
        ruled_out: dict[str, str] = {}
        for backend in self.backends:
            if requested and backend.name != requested:
                continue
            reason = backend.refusal(device, members)
            if reason is None:
                return backend, ruled_out
            ruled_out[backend.name] = reason
        if requested and requested not in ruled_out:
            names = ", ".join(b.name for b in self.backends)
            raise NotImplementedError(
                f"fastattn.{self.name}: there is no {requested} backend; there are: {names}"
            )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in ruled_out.items())
        raise NotImplementedError(f"fastattn.{self.name}: no backend can serve this call ({reasons})")


class _Explaining(threading.local):
    """The calls that `explain` has collected in this thread. None outside of `explain`: calls run."""

    calls: list[tuple[Op, Backend, dict[str, str], Sequence[Any]]] | None = None


explaining = _Explaining()


def _device(members: Sequence[Any]) -> torch.device:
    return next(m.device for m in members if isinstance(m, torch.Tensor))


@contextmanager
def replaced(change: Callable[[Op, Backend], Backend]) -> Iterator[None]:
    """Inside the block every op's backends are replaced by `change(op, backend)`: for another device or implementation."""
    previous = [(op, op.backends) for op in OPS.values()]
    try:
        for op, backends in previous:
            object.__setattr__(op, "backends", tuple(change(op, b) for b in backends))
        yield
    finally:
        for op, backends in previous:
            object.__setattr__(op, "backends", backends)


NUMBERS, TRACED = "numbers", "traced"  # overloads of an op that has floats, see declare.py


def dispatch(name: str, *members: Any) -> Any:
    """Call torch.ops.fastattn.<name> with a call's members and a backend, choosing the overload by the types of its numbers."""
    return dispatch_values(name, *OPS[name].values(members))


def dispatch_values(name: str, *values: Any) -> Any:
    """`dispatch` with the values in the order of torch's schema."""
    packet, numbers = getattr(torch.ops.fastattn, name), OPS[name].numbers
    if not any(isinstance(values[i], (torch.SymFloat, torch.Tensor)) for i, _ in numbers):
        return packet.default(*values)
    values = list(values)
    for i, _ in numbers:
        if values[i] is not None and not isinstance(values[i], torch.Tensor):
            # multiplied by 1, so that a compiler makes a tensor of the symbol
            values[i] = torch.ones((), dtype=torch.float64, device="cpu") * values[i]
    return getattr(packet, NUMBERS)(*values)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# types of most arguments; a look-up in a set is faster than isinstance
_VALUES = frozenset((type(None), bool, int, float, str))


def _tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for a in args:
        if type(a) in _VALUES:
            continue
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from _tensors(a)


def needs_grad(args: Sequence[Any]) -> bool:
    """Whether a call with these arguments would be recorded by autograd."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args))


def refuse_gradients(name: str, args: Sequence[Any]) -> None:
    if needs_grad(args):
        raise NotImplementedError(f"fastattn.{name}: it has no gradients; call it under torch.no_grad()")


def _unobserved(members: Sequence[Any]) -> bool:
    """Whether torch's dispatcher would do nothing but run the backend: no gradients, subclasses, modes, transforms, tracing or
    profiler are active."""
    return not torch_private.observed() and _all_plain(members, torch.is_grad_enabled())


def _all_plain(members: Sequence[Any], recording: bool) -> bool:
    for member in members:
        kind = type(member)
        if kind in _VALUES:
            continue
        if kind in _PLAIN:
            if member.is_meta or (recording and member.requires_grad):
                return False
        elif isinstance(member, list | tuple):
            if not _all_plain(member, recording):
                return False
        elif isinstance(member, torch.Tensor):
            return False
    return True


def serves(name: str, *args: Any) -> bool:
    """Whether a backend other than the reference would serve `name` (*args). If args request a backend: whether that one would."""
    *members, requested = args
    device = _device(members)
    return any(
        backend.refusal(device, members) is None
        for backend in OPS[name].backends
        if (backend.name == requested if requested else backend.name != "reference")
    )


def _refuse_tangents(name: str, members: Sequence[Any]) -> None:
    for a in members:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(
                f"fastattn.{name}: forward-mode differentiation (jvp, jacfwd) is not supported, backward is"
            )


def _refuse_functional_gradients(name: str, members: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(map(torch_private.has_functional_gradient, _tensors(members))):
        raise NotImplementedError(
            f"fastattn.{name}: torch.func's grad, vjp and jacrev are not supported, torch.autograd's backward and grad are"
        )


def call(name: str, *args: Any, reads: int | None = None) -> Any:
    """Call torch.ops.fastattn.<name> with a call's members and a backend. Where torch's dispatcher has nothing to do it is
    bypassed, because it takes longer than a small op.

    reads: the number of leading outputs that the caller uses; None: all. The others may be missing from the result.

    Raises NotImplementedError for forward-mode differentiation (the dispatcher would drop its tangents), for torch.func's
    gradients, and for vmap of an op that writes to an argument (torch's own errors for these two do not name the op).
    """
    op = OPS[name]
    members = op.plain(args[:-1])
    op.check(*members)
    if torch_private.differentiates_forward():
        _refuse_tangents(name, members)
    if _unobserved(members):
        return op.run(members, args[-1], reads)
    if torch.compiler.is_dynamo_compiling():
        values = op.values((*members, args[-1]))
        packet = getattr(torch.ops.fastattn, name)
        return packet.traced(*values) if any(type(a) is float for a in values) else packet.default(*values)
    if not torch.compiler.is_compiling() and torch_private.transformed():
        _refuse_functional_gradients(name, members)
        if op.writes and not all(map(has_contents, _tensors(members))):
            raise NotImplementedError(
                f"fastattn.{name}: torch.vmap is not supported, it writes to its caches"
            )
    return dispatch(name, *members, args[-1])


# --- which backend a call requests -------------------------------------------------------------------------------


def _known(name: str | None, where: str) -> str:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"fastattn.{where}: backend must be None or one of {', '.join(BACKENDS)}, given {name!r}"
        )
    return name or ""


_default = _known(os.environ.get("FASTATTN_BACKEND") or None, "set_backend (FASTATTN_BACKEND)")


class set_backend:
    """Make `name` the backend of every call that names none: at once, or inside a `with` block.

    name: "reference", "cpu", "triton", "cuda", or None for the best one that serves the call. Process-wide; the
    environment variable FASTATTN_BACKEND gives the value at import. Raises ValueError for an unknown name.

    >>> q = torch.randn(1, 2, 9, 16)
    >>> with fastattn.set_backend("reference"):
    ...     out = fastattn.attention(q, q, q)
    """

    def __init__(self, name: str | None) -> None:
        global _default
        self._previous = _default
        _default = _known(name, "set_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _default
        _default = self._previous


def requested(op: str, backend: str | None) -> str:
    """The schema's backend string for a public function's `backend` argument."""
    return _default if backend is None else _known(backend, op)
