"""How an op is registered and how a call finds its backend.

An op is one `torch.library` definition (schema, fake, autograd) whose last schema argument is `str backend`.
Its backends are tried in order, the reference last; one that is asked for by name and cannot serve the call raises.
"""

import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from .checks import as_integer, as_number, has_contents, is_number
from .tuning import Choice

BACKENDS = ("reference", "cpu", "triton", "cuda")
_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    load: returns the implementation, which takes the schema's arguments less `backend`; called at first use.
    supports: same arguments; None when the call can be served, else the reason why not.
    configure: same arguments; the tile configuration the implementation would use.
    devices: device types it serves; None means every one.
    """

    name: str
    load: Callable[[], Callable]
    supports: Callable[..., str | None] = lambda *args: None
    configure: Callable[..., Choice] | None = None
    devices: tuple[str, ...] | None = None

    @cached_property
    def implementation(self) -> Callable:
        return self.load()

    def refusal(self, device: torch.device, args: Sequence[Any]) -> str | None:
        if self.devices is not None and device.type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device.type}"
        return self.supports(*args)


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


@cache
def _module(name: str) -> ModuleType:
    """A module, imported once: importlib's own look for one that is there costs as much as a check of all arguments."""
    return importlib.import_module(name)


def triton_backend(
    module: str, name: str, *, refusal: str = "refusal", configure: str | None = None
) -> Backend:
    """The Triton backend of an op: functions of `module`, which is imported when a call first reaches it.

    It serves CUDA tensors, and CPU tensors where TRITON_INTERPRET=1 runs every kernel in the interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    def function(name):
        return getattr(_module(module), name)

    def supports(*args):
        return _triton_missing() or function(refusal)(*args)

    return Backend(
        "triton",
        lambda: function(name),
        supports,
        None if configure is None else lambda *args: function(configure)(*args),
        devices=("cuda", "cpu") if interpreted else ("cuda",),
    )


def cpu_backend(package: str, name: str, *, module: str = "cpu", tuned: bool = True) -> Backend:
    """The CPU backend of an op: `name`, `refusal` and, when tuned, `configure` of `package`.`module`.

    The module is imported when a call first reaches it; the last two functions take the op's name before its arguments.
    """

    def function(name):
        return getattr(_module(path), name)

    path = f"{package}.{module}"
    return Backend(
        "cpu",
        lambda: function(name),
        lambda *args: function("refusal")(name, *args),
        (lambda *args: function("configure")(name, *args)) if tuned else None,
        devices=("cpu",),
    )


def reference_backend(package: str, name: str) -> Backend:
    """The definition of an op: `name` of `package`.reference."""
    return Backend("reference", lambda: getattr(importlib.import_module(f"{package}.reference"), name))


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Keep tensors for backward. Those of torch.inference_mode are copied: autograd takes only others."""
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


def save_inputs(ctx: Any, inputs: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
    """Keep an op's inputs and some results for its backward; a gradient that is zero comes as None."""
    ctx.where = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.inputs = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    save(ctx, *(inputs[i] for i in ctx.where), *results)
    ctx.set_materialize_grads(False)


def saved_inputs(ctx: Any) -> tuple[list, tuple]:
    """(inputs, results) as `save_inputs` kept them."""
    # read once: a checkpoint recomputes them for one reading
    inputs, saved = list(ctx.inputs), ctx.saved_tensors
    for i, t in zip(ctx.where, saved, strict=False):
        inputs[i] = t
    return inputs, saved[len(ctx.where) :]


@dataclass(frozen=True)
class Op:
    name: str
    fake: Callable
    backends: tuple[Backend, ...]
    check: Callable[..., None]
    check_contents: Callable[..., None] | None = None
    numbers: tuple[tuple[int, str], ...] = ()  # (place, name) of the schema's floats
    integers: tuple[tuple[int, str], ...] = ()  # and of its integers
    writes: bool = False  # to an argument

    def plain(self, args: tuple) -> tuple:
        """args with numbers of numpy and 0-dim tensors as Python's; what is no number stays for `check` to refuse."""
        changed = None
        for i, name in self.numbers:
            value = args[i]
            if type(value) is not float and is_number(value):
                changed = changed or list(args)
                changed[i] = as_number(self.name, name, value)
        for i, _ in self.integers:
            value = args[i]
            if type(value) is not int and (integer := as_integer(value)) is not None:
                changed = changed or list(args)
                changed[i] = integer
        return args if changed is None else tuple(changed)

    def run(self, *args: Any) -> Any:
        """The schema's arguments, checked, to the backend that serves them."""
        self.check(*args[:-1])
        return self.run_checked(*args)

    def run_checked(self, *args: Any) -> Any:
        *args, requested = args
        if self.check_contents is not None:
            self.check_contents(*args)
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        explained = _explained_here.calls
        if explained is None:
            for backend in self.backends:
                # what `select` does, without the reasons
                if (
                    (not requested or backend.name == requested)
                    and (backend.devices is None or device.type in backend.devices)
                    and backend.supports(*args) is None
                ):
                    return backend.implementation(*args)
        backend, ruled_out = self.select(device, requested, args)
        configure = backend.configure
        choice = configure(*args) if configure is not None else Choice({}, "nothing to configure")
        found = Explanation(self.name, backend.name, dict(choice.values), choice.source, ruled_out)
        explained.append((found, self, args))
        return self.fake(*args)

    def select(
        self, device: torch.device, requested: str, args: Sequence[Any]
    ) -> tuple[Backend, dict[str, str]]:
        """The backend that serves the call, and why each better one was ruled out."""
        ruled_out: dict[str, str] = {}
        for backend in self.backends:
            if requested and backend.name != requested:
                continue
            reason = backend.refusal(device, args)
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


def register_op(
    name: str,
    schema: str,
    *,
    fake: Callable,
    backends: Sequence[Backend],
    check: Callable[..., None],
    check_contents: Callable[..., None] | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    twice: bool = False,
) -> None:
    """Define `torch.ops.fastattn.<name>`; `schema` is the part after the name, its last argument `str backend`.

    fake, check and check_contents take the schema's arguments less `backend`; backward and setup_context are as in
    torch.library.register_autograd.
    check: raises ValueError, TypeError or NotImplementedError unless ranks, sizes, dtypes, devices and numbers are what the
    backends rely on. It runs before every call, whether from a public function, a compiled graph or torch.ops, and when one is
    traced; so it costs a microsecond or two and reads no tensor.
    check_contents: the same of what index tensors hold, before a call that computes.
    twice: the backward is made of differentiable operations; elsewhere create_graph raises NotImplementedError.
    """
    arguments = [argument.split() for argument in schema[1 : schema.index(") ->")].split(", ")]
    kinds = {
        kind: tuple((i, a[1]) for i, a in enumerate(arguments) if a[0].rstrip("?") in kind) for kind in _KINDS
    }
    op = Op(name, fake, tuple(backends), check, check_contents, *kinds.values(), writes="!" in schema)
    _OPS[name] = op
    places = {i for i, _ in op.numbers}

    def run(*args):
        if backward is not None:
            return op.run(*args)
        with torch.no_grad():
            return op.run(*args)

    def run_numbers(*args):
        return run(*(float(a) if i in places and a is not None else a for i, a in enumerate(args)))

    def run_fake(*args):
        # numbers that are tensors have been checked as what they were before
        check(*(1.0 if i in places and isinstance(a, torch.Tensor) else a for i, a in enumerate(args[:-1])))
        return fake(*args[:-1])

    overloads = {name: (schema, run)}
    if places:
        overloads[f"{name}.{_NUMBERS}"] = (_FLOAT.sub(r"Tensor\1 ", schema), run_numbers)
        _LIBRARY.define(f"{name}.{_TRACED}" + _FLOAT.sub(r"Scalar\1 ", schema))
        _LIBRARY.impl(f"{name}.{_TRACED}", partial(dispatch, name), "CompositeImplicitAutograd")
    for overload, (signature, implementation) in overloads.items():
        _LIBRARY.define(overload + signature)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(overload, implementation, key)
        torch.library.register_fake(f"fastattn::{overload}", run_fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"fastattn::{overload}",
                backward if twice else _differentiable_once(name, backward),
                setup_context=setup_context,
                lib=_LIBRARY,
            )


# A schema's float is a constant of a compiled graph: one a number. So an op with floats has two overloads more. A graph of
# Dynamo calls the traced one, which takes a symbol as it is; below it a symbol becomes a tensor (0-dim float64 on the CPU, of
# which compilers make their own input), and the op that takes numbers as such tensors is what the graph keeps.
_NUMBERS, _TRACED = "numbers", "traced"
_FLOAT = re.compile(r"\bfloat(\??) ")
_KINDS = (("float",), ("int", "SymInt"))


def dispatch(name: str, *args: Any) -> Any:
    """torch.ops.fastattn.<name>(*args) by the overload that takes its numbers as they are."""
    packet, numbers = getattr(torch.ops.fastattn, name), _OPS[name].numbers
    if not any(isinstance(args[i], (torch.SymFloat, torch.Tensor)) for i, _ in numbers):
        return packet.default(*args)
    args = list(args)
    for i, _ in numbers:
        if args[i] is not None and not isinstance(args[i], torch.Tensor):
            # a product is what compilers make of tensors in place of symbols
            args[i] = torch.ones((), dtype=torch.float64, device="cpu") * args[i]
    return getattr(packet, _NUMBERS)(*args)


def _differentiable_once(name: str, backward: Callable) -> Callable:
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"fastattn.{name}: create_graph is not supported, it is differentiable once"
            )
        return backward(ctx, *grads)

    return run


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_VALUES = frozenset(
    (type(None), bool, int, float, str)
)  # the most of an op's arguments, and quicker to know by type


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


def _unobserved(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would do nothing with the call but run the backend: no gradients, subclasses, modes,
    transforms, tracing or profiler."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    recording = torch.is_grad_enabled()
    for t in _tensors(args):
        if type(t) not in _PLAIN or t.is_meta or (recording and t.requires_grad):
            return False
    return True


def serves(name: str, *args: Any) -> bool:
    """Whether a backend other than the reference would serve `name` (*args), or the reference was asked for by default."""
    *args, requested = args
    device = next(_tensors(args)).device
    return any(
        backend.refusal(device, args) is None
        for backend in _OPS[name].backends
        if (backend.name == requested if requested else backend.name != "reference")
    )


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(
                f"fastattn.{name}: forward-mode differentiation (jvp, jacfwd) is not supported, backward is"
            )


def _refuse_functional_gradients(name: str, args: Sequence[Any]) -> None:
    functorch = torch._C._functorch

    def tracked(t: torch.Tensor) -> bool:
        while functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_gradtrackingtensor(t) and t.requires_grad:
                return True
            t = functorch.get_unwrapped(t)
        return False

    if torch.is_grad_enabled() and any(tracked(t) for t in _tensors(args)):
        raise NotImplementedError(
            f"fastattn.{name}: torch.func's grad, vjp and jacrev are not supported, torch.autograd's backward and grad are"
        )


def call(name: str, *args: Any) -> Any:
    """torch.ops.fastattn.<name>(*args); past the dispatcher, which costs more than a small op, where it has no part.

    Raises NotImplementedError for tangents of forward-mode differentiation, which the dispatcher would drop, and for
    torch.func's gradients, and vmap of what writes to an argument, which it refuses with no word of the op.
    """
    op = _OPS[name]
    args = op.plain(args)
    op.check(*args[:-1])
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    if _unobserved(args):
        return op.run_checked(*args)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_functional_gradients(name, args)
        if op.writes and not all(map(has_contents, _tensors(args))):
            raise NotImplementedError(
                f"fastattn.{name}: torch.vmap is not supported, it writes to its caches"
            )
    if torch.compiler.is_dynamo_compiling():
        packet = getattr(torch.ops.fastattn, name)
        return packet.traced(*args) if any(type(a) is float for a in args) else packet.default(*args)
    return dispatch(name, *args)


@contextmanager
def _autograd_inside_an_op():
    """Record gradients although an op's implementation runs below autograd."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    exclude = torch._C._dispatch_tls_local_exclude_set() - keys
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude),
        torch.enable_grad(),
    ):
        yield


def reference_backward(fn: Callable, outputs: int, wrt: Sequence[int]) -> Callable:
    """The reference backend of an op's backward: vector-Jacobian products of `fn` by recomputation.

    The implementation takes `outputs` gradients (None for one that is zero), then fn's arguments, and returns one
    gradient for each argument numbered in `wrt` (an empty tensor where that argument is None).
    """

    def implementation(*args):
        grads, args = args[:outputs], args[outputs:]
        present = [i for i in wrt if args[i] is not None]
        full = list(args)
        with _autograd_inside_an_op():
            for i in present:
                full[i] = args[i].detach().requires_grad_()
            result = fn(*full)
            result = result if isinstance(result, tuple) else (result,)
            pairs = [(r, g) for r, g in zip(result, grads, strict=True) if g is not None]
            pulled = torch.autograd.grad(
                [r for r, _ in pairs],
                [full[i] for i in present],
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        found = dict(zip(present, pulled, strict=True))
        absent = next(a for a in args if isinstance(a, torch.Tensor)).new_empty(0)
        result = tuple(found[i].contiguous() if i in found else absent.clone() for i in wrt)
        return result if len(result) > 1 else result[0]

    return implementation


# --- which backend a call asks for -------------------------------------------------------------------------------


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


# --- explain -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which backend would run an op, with which configuration, from where, and what was ruled out."""

    op: str
    backend: str
    config: dict[str, int | str] = field(default_factory=dict)
    source: str = ""
    ruled_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        config = ", ".join(f"{k}={v}" for k, v in self.config.items()) or "none"
        lines = [f"{self.op}: {self.backend} backend", f"  config: {config} ({self.source})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.ruled_out.items()]
        return "\n".join(lines)


class _Explained(threading.local):
    """What `explain` has collected in this thread, None outside of it: other threads' calls run."""

    calls: list[tuple[Explanation, Op, Sequence[Any]]] | None = None


_explained_here = _Explained()


@contextmanager
def _explaining():
    previous, _explained_here.calls = _explained_here.calls, []
    try:
        yield _explained_here.calls
    finally:
        _explained_here.calls = previous


def explain(op_name: str, *args: Any, **kwargs: Any) -> Explanation:
    """What `fastattn.<op_name>(*args, **kwargs)` would run, without running it: checks are made, no kernel starts.

    Returns an Explanation (printable) with backend, config, source of the config, and the backends ruled out with reasons.
    Raises what the call itself would raise; ValueError when there is no such op.
    """
    return _explained(op_name, args, kwargs)[0]


def refusals(op_name: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """{backend: why it would refuse the call on a device that it serves, or None} of the op behind a public function."""
    _, op, arguments = _explained(op_name, args, kwargs)
    return {backend.name: backend.supports(*arguments) for backend in op.backends}


def _explained(op_name: str, args: Sequence[Any], kwargs: dict) -> tuple[Explanation, Op, Sequence[Any]]:
    import fastattn

    function = getattr(fastattn, op_name, None)
    if not callable(function) or op_name.startswith("_") or isinstance(function, type):
        raise ValueError(f"fastattn.explain: op_name must name a fastattn op, given {op_name!r}")
    with torch.no_grad(), _explaining() as found:
        function(*args, **kwargs)
    if not found:
        raise ValueError(f"fastattn.explain: {op_name} runs no fastattn op for these arguments")
    return found[0]
