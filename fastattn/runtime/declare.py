"""How an op is declared: once, from its `Call`.

`declare` defines `torch.ops.fastattn.<name>` (schema, fake, backends, autograd) and, where the op has gradients, the op
`<name>_backward`. The backward's schema, its fake, what autograd keeps and returns, and the reference's vector-Jacobian
products follow from the declaration; what does not follow is given by name in `Gradients`.
"""

import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import torch_private
from .registry import NUMBERS, OPS, TRACED, Backend, Op, dispatch, dispatch_values
from .schema import flat_fields, is_group, schema_of, type_of

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")


@dataclass(frozen=True)
class Gradients:
    """How an op is differentiated: by the op `<name>_backward`, whose members are the gradients of `outputs`, the inputs up to the
    last one in `of`, the outputs in `saved`, the other inputs and, with `optional` inputs, an integer `wanted`.

    of: the inputs that have a gradient, in order; the backward returns one for each.
    check, check_contents, backends: of the backward, as in `declare`. A backend "reference" is added where none is given: the
        vector-Jacobian products of the definition by recomputation.
    outputs: the outputs that are differentiable; a gradient that is zero comes as None where there are several.
    saved: the outputs that the backward reads.
    optional: inputs of `of` whose gradient is computed only where it is asked for: `wanted` has a bit for each, in this order; a
        gradient that is not wanted is (0,), and so is that of an input that is None.
    """

    of: tuple[str, ...]
    check: Callable[..., None]
    backends: Sequence[Backend]
    outputs: tuple[str, ...] = ("out",)
    saved: tuple[str, ...] = ()
    check_contents: Callable[..., None] | None = None
    optional: tuple[str, ...] = ()

    def is_wanted(self, name: str, wanted: int) -> bool:
        return name not in self.optional or bool(wanted >> self.optional.index(name) & 1)


@dataclass(frozen=True)
class Autograd:
    """An op's own autograd, as torch.library.register_autograd takes it, for what `Gradients` does not say.

    twice: the backward is made of differentiable operations; elsewhere create_graph raises NotImplementedError.
    """

    setup: Callable
    backward: Callable
    twice: bool = False


def declare(
    name: str,
    call: type,
    *,
    outputs: tuple[str, ...] = ("out",),
    fake: Callable,
    check: Callable[..., None],
    backends: Sequence[Backend],
    check_contents: Callable[..., None] | None = None,
    gradients: Gradients | Autograd | None = None,
    describe: Callable[..., str] | None = None,
) -> None:
    """Define `torch.ops.fastattn.<name>`.

    call: a NamedTuple of the op's members in the schema's order, with their types: Tensor, Tensor | None, list[Tensor],
        `Written` for a tensor that is written to, bool, str, float, float | None, int for one that is a constant of a graph and
        Size for one that is not; a member that is a NamedTuple itself stands flat in the schema. It gets a last argument,
        `str backend`.
    fake, check, check_contents take the members as positional arguments.
    fake: outputs of the right shapes, dtypes and strides, for tracing.
    check: raises ValueError, TypeError or NotImplementedError unless ranks, sizes, dtypes, devices and numbers are what the
        backends rely on. It runs before every call, whether from a public function, a compiled graph or torch.ops, and when one is
        traced; so it costs a microsecond or two and reads no tensor.
    check_contents: the same of what index tensors hold, before a call that computes.
    describe: what a call of these members computes, in lines that `explain` prints, where the members do not say it.
    """
    fields = typing.get_type_hints(call, include_extras=True)
    kept: tuple[str, ...] = ()
    if isinstance(gradients, Gradients):
        _declare_backward(name, fields, fake, outputs, backends, gradients)
        kept = tuple(n for n in gradients.saved if n not in gradients.outputs)
        gradients = _autograd(name, fields, outputs, gradients)
    _define(name, fields, outputs, fake, check, check_contents, backends, gradients, kept, describe)


# --- definition -----------------------------------------------------------------------------------------------------

# A schema's float is a constant of a compiled graph: one a number. So an op with floats has two overloads more. A graph of
# Dynamo calls the traced one, which takes a symbol as it is; below it a symbol becomes a tensor (0-dim float64 on the CPU, of
# which compilers make their own input), and the op that takes numbers as such tensors is what the graph keeps.
_FLOAT = re.compile(r"\bfloat(\??) ")


def _define(
    name: str,
    fields: dict[str, Any],
    outputs: tuple[str, ...],
    fake: Callable,
    check: Callable,
    check_contents: Callable | None,
    backends: Sequence[Backend],
    autograd: Autograd | None,
    kept: tuple[str, ...] = (),
    describe: Callable[..., str] | None = None,
) -> None:
    schema = schema_of(fields, len(outputs))
    group = next(((i, kind) for i, kind in enumerate(fields.values()) if is_group(kind)), None)
    kinds = [None if is_group(kind) else type_of(kind).rstrip("?") for kind in fields.values()]

    def of(*wanted: str) -> tuple[tuple[int, str], ...]:
        return tuple((i, n) for i, (n, kind) in enumerate(zip(fields, kinds, strict=True)) if kind in wanted)

    op = Op(
        name,
        fake,
        tuple(backends),
        check,
        check_contents,
        of("float"),
        of("int", "SymInt"),
        group,
        writes="!" in schema,
        outputs=outputs,
        kept=kept,
        describe=describe,
    )
    OPS[name] = op
    places = {i for i, _ in op.numbers}
    if group is not None and any(i > group[0] for i in places):
        raise ValueError(
            f"{name}: floats stand before {list(fields)[group[0]]}, where members and schema agree"
        )

    def run(*values):
        members = op.members(values[:-1])
        check(*members)
        if autograd is not None:
            return op.run(members, values[-1])
        with torch.no_grad():
            return op.run(members, values[-1])

    def run_numbers(*values):
        return run(*(float(a) if i in places and a is not None else a for i, a in enumerate(values)))

    def run_fake(*values):
        members = op.members(values[:-1])
        # numbers that are tensors have been checked as what they were before
        check(*(1.0 if i in places and isinstance(a, torch.Tensor) else a for i, a in enumerate(members)))
        return fake(*members)

    overloads = {name: (schema, run)}
    if places:
        overloads[f"{name}.{NUMBERS}"] = (_FLOAT.sub(r"Tensor\1 ", schema), run_numbers)
        _LIBRARY.define(f"{name}.{TRACED}" + _FLOAT.sub(r"Scalar\1 ", schema))
        _LIBRARY.impl(f"{name}.{TRACED}", partial(dispatch_values, name), "CompositeImplicitAutograd")
    for overload, (signature, implementation) in overloads.items():
        _LIBRARY.define(overload + signature)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(overload, implementation, key)
        torch.library.register_fake(f"fastattn::{overload}", run_fake, lib=_LIBRARY)
        if autograd is not None:
            torch.library.register_autograd(
                f"fastattn::{overload}",
                autograd.backward if autograd.twice else _differentiable_once(name, autograd.backward),
                setup_context=autograd.setup,
                lib=_LIBRARY,
            )


# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_once(name: str, backward: Callable) -> Callable:
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"fastattn.{name}: create_graph is not supported, it is differentiable once"
            )
        return backward(ctx, *grads)

    return run


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Save tensors for the backward. Inference tensors are copied, because autograd cannot save them."""
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


def gradient_like(t: torch.Tensor | None, of: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """An uninitialised contiguous gradient of t; of shape (0,), like `of`, if t is None or its gradient is not wanted."""
    if t is None or not wanted:
        return of.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _cut(fields: dict[str, Any], of: tuple[str, ...]) -> int:
    """The number of inputs before the saved outputs in a backward's members."""
    return 1 + max(list(fields).index(name) for name in of)


def _autograd(name: str, fields: dict[str, Any], outputs: tuple[str, ...], g: Gradients) -> Autograd:
    flat = list(flat_fields(fields))
    places = {n: flat.index(n) for n in g.of}
    kept = [outputs.index(n) for n in g.saved]
    incoming = [outputs.index(n) for n in g.outputs]
    constant = [i for i in range(len(outputs)) if i not in incoming]
    cut = _cut(
        fields, g.of
    )  # none of these inputs is a group, so they are at the same places in values and members

    def setup(ctx, inputs, output):
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(results[i] for i in constant))
        ctx.where = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        ctx.inputs = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        save(ctx, *(inputs[i] for i in ctx.where), *(results[i] for i in kept))
        first = results[incoming[0]]
        ctx.first = (first.shape, first.dtype, first.device)  # of a zero gradient, where only others have one
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        result = [None] * (len(flat) + 1)
        grads = [grads[i] for i in incoming]
        if all(grad is None for grad in grads):
            return tuple(result)
        # ctx.saved_tensors is read once: under a checkpoint every read computes them again
        values, tensors = list(ctx.inputs), ctx.saved_tensors
        for i, t in zip(ctx.where, tensors, strict=False):
            values[i] = t
        saved = tensors[len(ctx.where) :]
        if grads[0] is None:
            shape, dtype, device = ctx.first
            grads[0] = torch.zeros(shape, dtype=dtype, device=device)
        *rest, backend = values[cut:]
        needed = {n: values[i] is not None and ctx.needs_input_grad[i] for n, i in places.items()}
        rest += [bits([needed[n] for n in g.optional])] if g.optional else []
        results = dispatch_values(f"{name}_backward", *grads, *values[:cut], *saved, *rest, backend)
        for n, gradient in zip(g.of, results if isinstance(results, tuple) else (results,), strict=True):
            if needed[n]:
                result[places[n]] = gradient
        return tuple(result)

    return Autograd(setup, backward)


def _declare_backward(
    name: str,
    fields: dict[str, Any],
    fake: Callable,
    outputs: tuple[str, ...],
    backends: Sequence[Backend],
    g: Gradients,
) -> None:
    optional = torch.Tensor | None
    cut, inputs = _cut(fields, g.of), list(fields.items())
    members: dict[str, Any] = {f"grad_{n}": optional if i else torch.Tensor for i, n in enumerate(g.outputs)}
    before, saved = len(members), len(g.saved)
    members |= dict(inputs[:cut]) | dict.fromkeys(g.saved, torch.Tensor) | dict(inputs[cut:])
    members |= {"wanted": int} if g.optional else {}
    places = {n: list(fields).index(n) for n in g.of}

    def inputs_of(args: Sequence[Any]) -> list:
        """The forward's members from the backward's."""
        end = len(args) - bool(g.optional)
        return [*args[before : before + cut], *args[before + cut + saved : end]]

    def fake_backward(*args):
        given = inputs_of(args)
        of = next(t for t in given if isinstance(t, torch.Tensor))
        return _one_or_all([gradient_like(given[i], of, g.is_wanted(n, args[-1])) for n, i in places.items()])

    def reference(*args):
        given = inputs_of(args)
        wrt = [i for n, i in places.items() if g.is_wanted(n, args[-1])]
        pulled = dict(zip(wrt, pull(definition, args[:before], given, wrt), strict=True))
        of = next(t for t in given if isinstance(t, torch.Tensor))
        return _one_or_all([of.new_empty(0) if pulled.get(i) is None else pulled[i] for i in places.values()])

    definition = next(b.run for b in backends if b.name == "reference")
    given = list(g.backends)
    if not any(b.name == "reference" for b in given):
        given.append(Backend("reference", reference))
    _define(
        f"{name}_backward",
        members,
        tuple(f"grad_{n}" for n in g.of),
        fake_backward,
        g.check,
        g.check_contents,
        given,
        None,
    )


def _one_or_all(results: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(results)


def pull(
    definition: Callable, grads: Sequence[torch.Tensor | None], members: Sequence[Any], wrt: Sequence[int]
) -> list[torch.Tensor | None]:
    """Vector-Jacobian products of a definition by recomputation: the gradient of each member numbered in `wrt`, contiguous.

    grads: of the definition's first outputs, None for one that is zero. None comes back for a member that is None.
    """
    present = [i for i in wrt if members[i] is not None]
    if not present:
        return [None] * len(wrt)
    full = list(members)
    with torch_private.autograd_inside_an_op():
        for i in present:
            full[i] = members[i].detach().requires_grad_()
        result = definition(*full)
        result = result if isinstance(result, tuple) else (result,)
        pairs = [(r, g) for r, g in zip(result, grads, strict=False) if g is not None and r.requires_grad]
        gradients = torch.autograd.grad(
            [r for r, _ in pairs],
            [full[i] for i in present],
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    by_place = {i: g.contiguous() for i, g in zip(present, gradients, strict=True)}
    return [by_place.get(i) for i in wrt]


__all__ = [
    "Autograd",
    "Backend",
    "Gradients",
    "bits",
    "declare",
    "dispatch",
    "gradient_like",
    "pull",
    "save",
]
